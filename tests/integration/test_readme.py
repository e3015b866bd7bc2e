"""The README's commands, run as they stand there, by a user with an empty home: all but `make test` and the clone.

They start clusters and servers on the usual ports, so they need a pytest call without the session's cluster.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.waiting import wait_until

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
DEADLINE_S = 1500.0


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An environment without anything of ours or Ray's in it, and a home that is empty."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("RAY_", "LORAY_", "KUBERNETES_", "PYTHONPATH", "OMP_", "MAKE", "MFLAGS"))
    }
    # Ray's sockets live below its temporary directory, and their paths may have 107 characters at most.
    ray_directory = tempfile.mkdtemp(prefix="lr-", dir="/tmp")
    yield {**kept, "HOME": str(tmp_path_factory.mktemp("home")), "RAY_TMPDIR": ray_directory, "HF_HUB_OFFLINE": "1"}
    for pid in processes_of(
        ray_directory
    ):  # the cluster that `ray start` left; never `ray stop`, which ends all others
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(ray_directory, ignore_errors=True)


def processes_of(ray_directory: str) -> list[int]:
    """The processes of the cluster that lives in this directory, which stands in their command lines."""
    lines = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [int(line.split()[0]) for line in lines if ray_directory in line]


def blocks() -> list[str]:
    return re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)


def shell(script: str, environment: dict[str, str]) -> str:
    """Run a script as a user's shell would, stopping at the first failure; whatever it left behind is ended."""
    process = subprocess.Popen(
        ["/bin/bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=DEADLINE_S)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.poll()  # everything had ended by itself
    assert process.returncode == 0, f"{script}\nended with {process.returncode}:\n{output[-4000:]}"
    return output


def test_make_demo_ends_with_a_tuned_model_that_beats_its_base(newcomer: dict[str, str]) -> None:
    output = shell("make demo", newcomer)
    last = output.strip().splitlines()[-1]
    match = re.fullmatch(
        r"exact fields: base (\d\.\d\d) -> tickets@1 (\d\.\d\d) \| valid JSON: (\d\.\d\d) -> (\d\.\d\d) \| 64 prompts",
        last,
    )
    assert match, output[-2000:]
    base, tuned, _, valid = map(float, match.groups())
    assert tuned >= 0.90
    assert base <= 0.50
    assert valid >= 0.95
    runs = Path(newcomer["HOME"]) / ".loray" / "runs"
    (run,) = runs.iterdir()
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "Held-out prompts, over HTTP" in (run / "report.md").read_text()
    # Ray's processes end a moment after the one that shut them down.
    wait_until(lambda: not processes_of(newcomer["RAY_TMPDIR"]), "all that the demo started is stopped", 30.0)


def test_the_commands_of_using_it_work(newcomer: dict[str, str]) -> None:
    output = shell(blocks()[0], newcomer)
    assert "trainable parameters" in output
    assert "SUCCEEDED" in output or "succeeded" in output
    assert '"product"' in output  # the chat's answer
    assert "tickets@production -> tickets@1" in output


def test_the_commands_of_serving_work(newcomer: dict[str, str]) -> None:
    output = shell(f'export PATH="$PWD/.venv/bin:$PATH"\n{blocks()[1]}', newcomer)
    assert '"model":"tickets@1"' in output.replace(": ", ":")
    assert "speaker" in output


def test_the_commands_of_a_cluster_work(newcomer: dict[str, str]) -> None:
    output = shell(f'export PATH="$PWD/.venv/bin:$PATH"\n{blocks()[2]}', newcomer)
    assert "succeeded" in output  # Ray's word for the submitted job
    assert "ended SUCCEEDED" in output  # ours
