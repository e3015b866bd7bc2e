"""Following a RayJob: what passes is outlived, no line of the log is lost or printed twice, and a driver's end is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.cli import kuberay as cli
from service.config import load_run
from service.errors import ClusterError, TrainingError
from service.kuberay import api as kuberay_api
from service.settings import Settings
from tests.k8s.kubernetes_api import Broken, FakeApi, Stream, serving

NAME = "r-20261127-101500-tickets-0a1b"
INITIALIZING = {"jobDeploymentStatus": "Initializing", "rayClusterName": "a"}
RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING", "rayClusterName": "a"}
COMPLETE = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED", "rayClusterName": "a"}
DEADLINE = {"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded"}
LINES = ["step 1/4: é\n", "step 2/4: ü\n", "step 3/4: ñ\n", "step 4/4: ß\n"]


class Clock:
    """The follower's time, which passes only while it sleeps: minutes in no time."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    """Has a RayJob already, that does what `script` says."""
    fake = FakeApi()
    fake.objects[f"/apis/ray.io/v1/namespaces/loray/rayjobs/{NAME}"] = {"spec": {}}
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(kuberay_api, "time", Clock())
    with serving(fake, tmp_path / "kubeconfig"):
        yield fake


def follow(printed: list[str]) -> kuberay_api.JobStatus:
    """To its end; what is told is appended."""
    return kuberay_api.follow(kuberay_api.Kubernetes("loray"), NAME, printed.append)


def states(printed: list[str]) -> list[str]:
    return [text.split(": ", 1)[1].strip() for text in printed if text.startswith("RayJob")]


@pytest.mark.parametrize("failure", [401, 403, 429, 500, 502, 503, 504, "closed"])  # refusals: it has just begun
def test_an_api_server_that_is_away_for_a_while_is_told_once_and_outlived(failure: Any, api: FakeApi) -> None:
    api.script = [RUNNING, failure, failure, failure, COMPLETE]
    printed: list[str] = []
    assert follow(printed).outcome == "SUCCEEDED"
    assert states(printed) == ["Running", "Complete"]
    assert "".join(printed).count("trying again") == 1


def test_an_api_server_that_stays_away_ends_the_following_and_not_the_run(api: FakeApi) -> None:
    api.script = [RUNNING, 503]
    told = (
        rf"(?s)503 .* for 5 minutes\. The run itself goes on\. .*kubectl -n loray get rayjob {NAME} .*loray runs show"
    )
    with pytest.raises(ClusterError, match=told):
        follow([])
    assert 300 / kuberay_api.LOOK_EVERY_S <= len(api.requests) <= 300 / kuberay_api.LOOK_EVERY_S + 5


def test_patience_is_for_failures_in_a_row(api: FakeApi) -> None:
    for _ in range(3):
        api.script += [*[503] * 100, RUNNING]
    api.script.append(COMPLETE)
    assert follow([]).outcome == "SUCCEEDED"


@pytest.mark.parametrize("code", [401, 403, 404])
def test_an_answer_that_will_not_change_is_told_at_once(code: int, api: FakeApi) -> None:
    api.script = [code, COMPLETE]
    printed: list[str] = []
    with pytest.raises(ClusterError, match=f"asking for RayJob {NAME}: Kubernetes answered {code}"):
        follow(printed)
    assert printed == []


def test_a_status_that_never_comes_is_asked_for_again(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kuberay_api, "TIMEOUT_S", (5.0, 0.1), raising=False)
    api.script = ["silent", COMPLETE]
    printed: list[str] = []
    assert follow(printed).outcome == "SUCCEEDED"
    assert "timed out" in printed[0] and "trying again" in printed[0]


@pytest.mark.parametrize("then", ["end", "closed"])
def test_a_log_that_breaks_off_is_taken_up_where_it_was(then: Any, api: FakeApi) -> None:
    api.streams = [*(Stream("".join(LINES[:n]), then) for n in (1, 1, 2, 3)), Stream("".join(LINES))]
    api.script = [RUNNING, RUNNING, RUNNING, RUNNING, COMPLETE]
    printed: list[str] = []
    assert follow(printed).outcome == "SUCCEEDED"
    text = "".join(printed)
    assert [text.count(line) for line in LINES] == [1, 1, 1, 1]
    assert text.count("The run goes on") == (then == "closed"), "told once, though it happened four times"
    if then == "end":
        assert "".join(part for part in printed if not part.startswith("RayJob")) == "".join(LINES)


def test_a_log_that_was_rotated_is_told_to_be_and_goes_on(api: FakeApi) -> None:
    api.streams = [Stream("".join(lines)) for lines in (LINES[:3], LINES[2:3], LINES[2:], LINES[2:])]
    api.script = [RUNNING, RUNNING, RUNNING, COMPLETE]
    printed: list[str] = []
    follow(printed)
    text = "".join(printed)
    assert [text.count(line) for line in LINES] == [1, 1, 1, 1]
    assert text.count("the log was rotated") == 1


def test_the_log_of_a_driver_that_has_ended_is_read_to_its_end_once(api: FakeApi) -> None:
    api.exit_code = 0
    api.log = "".join(LINES)
    api.script = [RUNNING, RUNNING, RUNNING, COMPLETE]
    printed: list[str] = []
    follow(printed)
    assert "".join(printed).count(LINES[-1]) == 1
    assert sum(request.endswith("/log") for request in api.requests) == 1


def test_a_log_that_breaks_off_at_the_very_end_is_read_to_it(api: FakeApi) -> None:
    api.streams = [Stream(LINES[0], "closed"), Stream("".join(LINES))]
    api.script, api.exit_code = [COMPLETE], 0
    printed: list[str] = []
    follow(printed)
    text = "".join(printed)
    assert [text.count(line) for line in LINES] == [1, 1, 1, 1]


@pytest.mark.parametrize("first", [Stream(LINES[0], "silent"), "silent"], ids=["after a line", "before any"])
def test_states_are_told_while_the_log_is_quiet(
    first: Stream | Broken, api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kuberay_api, "QUIET_S", 0.1, raising=False)
    api.streams = [first, Stream(LINES[0], "silent"), Stream("".join(LINES))]
    api.script = [INITIALIZING, RUNNING, COMPLETE]
    printed: list[str] = []
    assert follow(printed).outcome == "SUCCEEDED"
    assert states(printed) == ["Initializing", "Running", "Complete"]
    assert "".join(part for part in printed if not part.startswith("RayJob")) == "".join(LINES), "and nothing else"


@pytest.mark.parametrize(("exit_code", "outcome"), [(0, "succeeded"), (0, "was stopped"), (1, "failed")])
def test_a_driver_whose_end_the_operator_does_not_notice_is_the_outcome(
    exit_code: int, outcome: str, api: FakeApi
) -> None:
    """`ray job submit` ends with 1 where the job has failed, and else with 0; it says which as its last words."""
    api.exit_code, api.log = exit_code, "".join([*LINES, f"Job 'tickets-abcde' {outcome}\n"])
    api.script = [*[INITIALIZING] * 100, DEADLINE]
    printed: list[str] = []
    status = follow(printed)
    assert (status.state, status.outcome) == ("Initializing", outcome.split()[-1].upper())
    text = "".join(printed)
    assert (
        text.count(f"the driver has ended, its submitter with exit code {exit_code}. The operator has not noticed yet")
        == 1
    )
    assert "kubectl -n loray get pods -l ray.io/cluster=a\n" in text
    assert text.count(LINES[-1]) == 1


def test_a_driver_whose_end_the_operator_notices_in_time_is_not_told(api: FakeApi) -> None:
    api.exit_code = 1
    api.script = [*[INITIALIZING] * 50, RUNNING, COMPLETE]
    printed: list[str] = []
    assert follow(printed).state == "Complete"
    assert "has not noticed" not in "".join(printed)


def test_training_ends_as_a_driver_that_the_operator_does_not_notice(
    api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.yaml").write_text("model: org/base\ndata: {train: 's3://bucket/rows.jsonl'}\n")
    resolved, settings = load_run(str(tmp_path / "run.yaml")), Settings(str(tmp_path / "home"), tmp_path / "cache")
    names = iter(["r-1", "r-2"])

    def planned(*_: object) -> tuple[str, list[dict[str, Any]]]:  # its planning needs the base model
        name = next(names)
        return name, [{"metadata": {"name": name}, "spec": {}} for _ in range(3)]

    monkeypatch.setattr(cli, "_planned", planned)
    api.script, api.exit_code, api.log = [*[INITIALIZING] * 100, DEADLINE], 0, "Job 'r' succeeded\n"
    cli.train_on_kubernetes(resolved, settings, detach=False)
    api.script, api.exit_code = [*[INITIALIZING] * 100, DEADLINE], 1
    with pytest.raises(TrainingError, match=r"ended Initializing \(.* exit code 1\), Ray's job FAILED"):
        cli.train_on_kubernetes(resolved, settings, detach=False)


def test_a_machine_without_a_kubeconfig_is_told_in_one_error_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ClusterError, match=r"no Kubernetes cluster is configured: .* Set KUBECONFIG"):
        kuberay_api.Kubernetes("loray")
    assert capfd.readouterr() == ("", "")


def test_a_kubeconfig_in_its_usual_place_is_found(
    api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".kube").mkdir()
    (tmp_path / "kubeconfig").rename(tmp_path / ".kube" / "config")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG")
    api.script = [COMPLETE]
    assert follow([]).outcome == "SUCCEEDED"
