"""What travels to a cluster with a run: the command line of its job, and the files beside it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from jobs import train
from service import launcher
from service.config import LoraBlock, ResolvedRun, load_run
from service.errors import ConfigError

RUN = "model: base\ndata: {train: rows.jsonl}\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run file and its rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return tmp_path


def test_a_job_gets_everything_that_was_asked_for() -> None:
    command = launcher.train_command("r", ("seed=1",), run_file="run.yaml", profile=True, asked_at=12.5)
    given = train.parsed(command[2:])
    assert command[:2] == ["-m", "jobs.train"]
    assert (given.run_file, given.resume, given.run_id) == ("run.yaml", None, "r")
    assert (given.set, given.profile, given.asked_at) == (["seed=1"], True, 12.5)


def test_a_job_that_goes_on_gets_the_new_overrides() -> None:
    overrides = ("scale.workers={min: 1, max: 2}", launcher.NO_WAIT)
    given = train.parsed(launcher.train_command("r", overrides, run_file=None, profile=False, asked_at=1.0)[2:])
    assert (given.run_file, given.resume, given.run_id, given.profile) == (None, "r", None, False)
    assert given.set == list(overrides)


def test_a_bare_job_may_wait_or_not_and_was_asked_for_now(here: Path) -> None:
    before = time.time()
    given = train.parsed(["run.yaml", "--set", "seed=1", "--no-wait"])
    assert before <= given.asked_at <= time.time()
    resolved = load_run(given.run_file, given.set)
    assert (resolved.config.seed, resolved.config.scale.wait_s) == (1, 0.0)
    assert resolved.sources["scale.wait_s"] == "--set"


@pytest.mark.parametrize("arguments", [[], ["run.yaml", "--resume", "r"], ["--resume", "r", "--run-id", "s"]])
def test_a_job_takes_a_run_file_or_a_run_to_go_on_with(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        train.parsed(arguments)
    assert ended.value.code == 2 and "--resume" in capsys.readouterr().err


def test_a_staged_run_reads_as_the_same_run_from_what_travels(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_config.json").write_text("{}")
    (here / "run.yaml").write_text(f"{RUN}method: {{init_from: ./adapter}}\n")
    resolved = load_run("run.yaml", ["seed=3", "method.r=4"])
    with launcher.staged(resolved) as (directory, overrides):
        monkeypatch.chdir(directory)
        there = load_run("run.yaml", overrides)
        assert isinstance(there.config.data.train, str)
        assert Path(there.config.data.train).read_text() == (here / "rows.jsonl").read_text()
        assert isinstance(there.config.method, LoraBlock) and there.config.method.init_from is not None
        assert (Path(there.config.method.init_from) / "adapter_config.json").is_file()
        assert _without_places(there) == _without_places(resolved)
        assert (directory / "service").is_dir() and (directory / "jobs").is_dir()


def test_several_sources_a_directory_the_test_rows_and_the_synonyms_travel_too(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "more").mkdir()
    for name in ("more/rows.jsonl", "more/others.jsonl", "held.jsonl", "test.jsonl", "table.tsv"):
        (here / name).write_text(name)
    train = "[rows.jsonl, {uri: more, weight: 2.0, format: qa}, 's3://bucket/rows.jsonl', 'hub:owner/name']"
    sides = "eval: held.jsonl, test: test.jsonl, mix: {by: weights}"
    augment = "augment: {copies: 1, synonym: 0.1, synonyms: table.tsv}"
    (here / "run.yaml").write_text(f"model: base\ndata: {{train: {train}, {sides}, {augment}}}\n")
    with launcher.staged(load_run("run.yaml")) as (directory, overrides):
        monkeypatch.chdir(directory)
        data = load_run("run.yaml", overrides).config.data
        first, second, *others = data.sources
        assert Path(first.uri).read_text() == (here / "rows.jsonl").read_text()
        assert sorted(file.name for file in Path(second.uri).iterdir()) == ["others.jsonl", "rows.jsonl"]
        assert (second.weight, second.format) == (2.0, "qa")
        assert [source.uri for source in others] == ["s3://bucket/rows.jsonl", "hub:owner/name"]
        for uri, name in ((data.eval, "held.jsonl"), (data.test, "test.jsonl"), (data.augment.synonyms, "table.tsv")):
            assert uri is not None and uri != name and Path(uri).read_text() == name


def _without_places(resolved: ResolvedRun) -> dict[str, object]:
    config = resolved.config.model_dump(mode="json")
    config["data"].pop("train")
    config["method"].pop("init_from")
    return dict(config)


def test_without_a_run_only_the_packages_travel() -> None:
    with launcher.staged(None) as (directory, overrides):
        assert overrides == [] and not (directory / "run.yaml").exists() and (directory / "jobs").is_dir()


def test_a_run_whose_data_is_not_here_cannot_travel(here: Path) -> None:
    (here / "rows.jsonl").unlink()
    with (
        pytest.raises(ConfigError, match=r"data\.train: 'rows.jsonl' does not exist"),
        launcher.staged(load_run("run.yaml")),
    ):
        pass
