"""What a run file may say to Kubernetes, and what of this machine goes to the pods with it: all of it, unchanged, or an error."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from service.base_models import BUNDLED
from service.cli.app import main
from service.config import ResolvedRun, load_run, read_text, run_from_text
from service.errors import ConfigError
from service.kuberay.manifests import Manifest, as_yaml, manifests, size_pods
from service.launcher import stage_files
from service.training.memory import MemoryPlan
from tests.integration.small_runs import small_base, write_run_file
from tests.k8s import schemas

RUN_ID = "20261127-101500-tickets-0a1b"
MEMORY = MemoryPlan("cpu", {}, {"train": 2**30}, 0, 1, 512, 256)
ROW = '{"prompt": "a", "completion": "b"}\n'


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, which is the home directory too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def written(here: Path, **blocks: Any) -> ResolvedRun:
    text = yaml.safe_dump({"model": "org/base", "data": {"train": "s3://b/rows.jsonl"}, **blocks})
    (here / "run.yaml").write_text(text.replace("1e5", "'1e5'"))  # a number to our reader, as in YAML 1.2
    return load_run("run.yaml")


def config_map(run: ResolvedRun) -> Manifest:
    return manifests(run, RUN_ID, size_pods(run, MEMORY, trainable_bytes=0, base_bytes=0))[0]


def refused(run: ResolvedRun) -> list[str]:
    """The lines of the error, a problem each."""
    with pytest.raises(ConfigError) as error:
        config_map(run)
    first, *lines = str(error.value).splitlines()
    assert first.startswith(f"the run file: {len(lines)} problem")
    return [line.strip() for line in lines]


@pytest.mark.parametrize("name", ["{here}/base", "./base", "../x", "~/base", "base", "~nobody/base"])
def test_a_base_model_of_this_machine_is_refused_with_what_pods_could_fetch(name: str, here: Path) -> None:
    (here / "base").mkdir()
    name = name.format(here=here)
    (line,) = refused(written(here, model=name))
    assert line.startswith(f"model.id: {name!r} is a directory of this machine, which pods do not see.")
    assert all(word in line for word in ("hub id (org/name)", *BUNDLED, "published model (name@version)", "s3:// URI"))


def test_render_refuses_a_base_model_of_this_machine(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORAY_CACHE", str(here / "cache"))
    run_file = write_run_file(here / "small", small_base(here / "base"))
    monkeypatch.setattr(sys, "argv", ["loray", "k8s", "render", str(run_file)])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert ended.value.code == 2 and "kind:" not in printed.out
    assert f"model.id: '{here / 'base'}' is a directory of this machine" in " ".join(printed.err.split())


@pytest.mark.parametrize("name", ["org/base", "merged@1", "s3://bucket/base", *BUNDLED])
def test_a_base_model_that_pods_can_fetch_is_taken(name: str, here: Path) -> None:
    (here / next(iter(BUNDLED))).mkdir()  # a bundled name comes before a directory
    assert set(config_map(written(here, model=name))["data"]) == {"run-id", "run.yaml"}


def test_all_that_pods_would_not_find_is_told_at_once(here: Path) -> None:
    for name in ("base", "shards", "sets"):
        (here / name).mkdir()
    (here / "rows.jsonl.gz").write_bytes(b"\x1f\x8b\xff")
    run = written(
        here,
        model={"id": "./base", "chat_template": "missing.jinja"},
        method={"init_from": "./missing"},
        data={
            "train": ["shards", {"uri": "hub:sets?split=train"}, "hub:org/rows", "s3://bucket/rows.jsonl"],
            "eval": "rows.jsonl.gz",
            "test": f"hub:{here}/sets",
            "augment": {"copies": 1, "synonym": 0.1, "synonyms": "missing.tsv"},
        },
    )
    problems = {line.split(" ", 2)[1]: line for line in refused(run)}
    assert {value: line.split(":", 1)[0] for value, line in problems.items()} == {
        "'./base'": "model.id",
        "'./missing'": "method.init_from",
        "'shards'": "data.train",
        "'hub:sets?split=train'": "data.train",
        "'rows.jsonl.gz'": "data.eval",
        f"'hub:{here}/sets'": "data.test",
        "'missing.tsv'": "data.augment.synonyms",
        "'missing.jinja'": "model.chat_template",
    }
    assert "Name a published adapter (name@version) or an s3:// URI." in problems["'./missing'"]
    assert f"cannot be read under {here}: No such file" in problems["'missing.tsv'"]
    assert "is no text" in problems["'rows.jsonl.gz'"] and "hub:owner/name" in problems["'hub:sets?split=train'"]


def test_every_file_that_a_run_file_names_is_carried_as_it_is(here: Path) -> None:
    named = {
        "data": {
            "train": ["a.csv", {"uri": "b.csv", "template": "\U0001f600 {prompt}\x85\x7f"}],
            **{"eval": "c.csv", "test": f"file://{here}/d.csv"},
            "augment": {"copies": 1, "synonym": 0.1, "synonyms": "e.tsv"},
        },
        "model": {"id": "org/base", "chat_template": "f.jinja", "revision": "1e5"},
    }
    for name in ("a.csv", "b.csv", "c.csv", "d.csv", "e.tsv", "f.jinja"):
        (here / name).write_bytes(f'{name}\r\n"é\x85\u2028\r"\n'.encode())
    data = config_map(written(here, **named))["data"]
    (here / "there.yaml").write_text(data["run.yaml"])
    there = load_run("there.yaml").config
    rows, augment = there.data, there.data.augment
    named_there = [*(s.uri for s in rows.sources), rows.eval, rows.test, augment.synonyms, there.model.chat_template]
    for name, path in zip(("a.csv", "b.csv", "c.csv", "d.csv", "e.tsv", "f.jinja"), named_there, strict=True):
        assert data[Path(str(path)).name].encode() == (here / name).read_bytes()
    assert there.model.revision == "1e5", "text that looks like a number stays text"
    assert rows.sources[1].template == "\U0001f600 {prompt}\x85\x7f"


@pytest.mark.parametrize(
    "names",
    [
        ["my tickets.jsonl", "my:tickets.jsonl", "my-tickets.jsonl", "tïckets.jsonl", "tickets\u2028\U0001f600.csv"],
        [
            "1-rows.jsonl",
            *(f"rows{number}.jsonl" for number in range(9)),
            "rows.jsonl",
            "..jsonl",
            "a" * 240 + ".jsonl",
        ],
    ],
)
def test_names_of_files_become_keys_that_a_config_map_takes_and_no_two_the_same(names: list[str], here: Path) -> None:
    for name in names:
        (here / name).write_text(ROW + name)
    found = config_map(written(here, data={"train": names, "eval": names[0]}))
    assert list(schemas.problems(found, {})) == []
    assert len(found["data"]) == len(names) + 3
    (here / "there.yaml").write_text(found["data"]["run.yaml"])
    for name, source in zip(names, load_run("there.yaml").config.data.sources, strict=True):
        there = Path(source.uri)
        assert found["data"][there.name] == ROW + name and there.suffix == Path(name).suffix


def test_an_adapter_travels_to_a_cluster_under_such_a_name_too(here: Path) -> None:
    (here / "my ädapter").mkdir()
    (here / "stage").mkdir()
    run = written(here, method={"init_from": "./my ädapter"})
    assert list(stage_files(run, here / "stage", Path("data"))) == ['method.init_from="data/init_from-my--dapter"']
    assert (here / "stage" / "data" / "init_from-my--dapter").is_dir()


@pytest.mark.parametrize("key", ["my tickets", "tïckets", "", "a" * 254, "..", ".", "..a", "a\n"])
@pytest.mark.parametrize("field", ["data", "binaryData"])
def test_a_key_that_the_api_server_refuses_is_a_problem(key: str, field: str) -> None:
    document = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "run"}, field: {key: "", "a.b_C-1": ""}}
    (line,) = schemas.problems(document, {})
    assert line.startswith(f"ConfigMap run: the key {key!r} ")


@pytest.mark.parametrize(
    "text", ["a\x85b\n", "a\u2028b\n", "a\u2029b\n", "a\x85b", "a\r\nb\r", "\ufeffa\n", " a\n b", "\n\n"]
)
def test_text_with_any_line_break_is_printed_so_that_it_reads_back(text: str) -> None:
    assert yaml.safe_load(as_yaml([{"data": {"rows.jsonl": text}}])) == {"data": {"rows.jsonl": text}}


@settings(deadline=None)
@given(st.lists(st.text() | st.text(alphabet=" -#:\n\r\t\"'\\\x85\u2028\u2029\ufeff\0a")))
def test_a_config_map_of_any_text_reads_back_the_same(texts: list[str]) -> None:
    document = {"kind": "ConfigMap", "data": {f"key-{number}": text for number, text in enumerate(texts)}}
    assert list(yaml.safe_load_all(as_yaml([document]))) == [document]


def with_kubernetes(block: str) -> ResolvedRun:
    return run_from_text(f"model: base\ndata: {{train: rows.jsonl}}\nkubernetes: {{{block}}}\n", "run.yaml")


@pytest.mark.parametrize(
    ("block", "line"),
    [
        ('image: "my image; rm -rf"', "image: must be an image such as .*, not 'my image; rm -rf'"),
        ("image: Foo/Bar", "image: must be an image such as .* in small letters up to the tag, not 'Foo/Bar'"),
        ('image: ""', "image: must be an image such as .*, not ''"),
        ('image: "loray:0.1\\n"', "image: must be an image such as"),
        ("image: 'loray:'", "image: must be an image such as"),
        ("image: 'loray@sha256:12'", "image: must be an image such as"),
        ("image: https://r.io/loray", "image: must be an image such as"),
        ('nodes: {"a b/c/d": a}', r"nodes\.a b/c/d: must be a label's name such as .*, not 'a b/c/d'"),
        ("nodes: {a_b.io/c: a}", r"nodes\.a_b\.io/c: must be a label's name"),
        ("nodes: {/c: a}", r"nodes\./c: must be a label's name"),
        (f"nodes: {{{'a' * 64}: a}}", r"nodes\.a+: must be a label's name .* at most 63 letters"),
        (f"nodes: {{{'a' * 254}/c: a}}", r"nodes\.a+/c: must be a label's name"),
        ('nodes: {zone: "x y$"}', r"nodes\.zone: must be a label's value: .*, not 'x y\$'"),
        (f"nodes: {{zone: {'a' * 64}}}", r"nodes\.zone: must be a label's value: at most 63 letters"),
        ("nodes: {gpu: true}", r'nodes\.gpu: must be text, in quotes \("true", "1"\), not True'),
        ("nodes: {gpu: 1}", r'nodes\.gpu: must be text, in quotes \("true", "1"\), not 1'),
        ("nodes: {gpu: }", r"nodes\.gpu: must be text, in quotes .*, not None"),
        ("nodes: {1: a}", r"nodes\.1: must be text, in quotes .*, not 1"),
        ("retries: 9999999999", "retries: must be less than or equal to 2147483647, not 9999999999"),
        ("deadline_s: 99999999999", "deadline_s: must be less than or equal to 2147483647, not 99999999999"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused_here(block: str, line: str) -> None:
    with pytest.raises(ConfigError, match=rf"1 problem\. .*\n  kubernetes\.{line}"):
        with_kubernetes(block)


@pytest.mark.parametrize(
    "image",
    [
        "loray",
        "loray:0.1.0-cuda",
        "team/loray",
        "localhost:5000/team/loray:1",
        "123.dkr.ecr.eu-west-1.amazonaws.com/a/b/c_d__e---f.g:V1_x",
        "[::1]:5000/loray",
        f"ghcr.io/org/loray:1@sha256:{'0a' * 32}",
    ],
)
def test_images_as_registries_have_them_are_taken(image: str) -> None:
    assert with_kubernetes(f"image: '{image}'").config.kubernetes.image == image


def test_labels_as_nodes_have_them_are_taken() -> None:
    nodes = {
        "topology.kubernetes.io/zone": "eu-west-1a",
        "node-role.kubernetes.io/gpu": "",
        "zone": "a" * 63,
        "n" * 63: "A_1.b",
        "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3",
        "gpu": "true",
    }
    assert with_kubernetes(f"nodes: {json.dumps(nodes)}").config.kubernetes.nodes == nodes


def test_a_missing_file_is_told_with_what_kind_of_file_is_wanted(here: Path) -> None:
    with pytest.raises(ConfigError, match=rf"model.chat_template 'none' does not exist under {here}. .* a Jinja file"):
        read_text("none", "model.chat_template", "Jinja")


@pytest.mark.parametrize("text", ["y", "N", "08", "0o14", "0X1F", "1e5", "-1", ".5", "true", "null", "0.1.0"])
def test_text_that_kubectl_would_take_for_something_else_is_quoted(text: str) -> None:
    """It reads YAML 1.1, and more bases than PyYAML."""
    assert as_yaml([{"nodes": {"pool": text}}]) in (f'nodes:\n  pool: "{text}"\n', f"nodes:\n  pool: '{text}'\n")
