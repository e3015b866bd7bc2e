"""What is ended when the process that started it is gone, and what is not."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator

import pytest

from serve.watchdog import started_at, watchdog

DEADLINE_S = 30.0
STUBBORN = "trap '' TERM; echo ready; while :; do sleep 1; done"


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two that do not end by themselves; the second one does not heed SIGTERM."""
    both = [
        subprocess.Popen(["/bin/sh", "-c", script], stdout=subprocess.PIPE) for script in ("exec sleep 600", STUBBORN)
    ]
    assert both[1].stdout and both[1].stdout.readline() == b"ready\n"
    yield both
    for process in both:
        process.kill()
        process.communicate()


def test_what_is_left_is_terminated_then_killed(processes: list[subprocess.Popen[bytes]]) -> None:
    dog = watchdog({process.pid: started_at(process.pid) for process in processes}, kill_after_s=1)
    assert dog.stdin is not None
    dog.stdin.close()
    assert [process.wait(DEADLINE_S) for process in processes] == [-signal.SIGTERM, -signal.SIGKILL]
    dog.wait(DEADLINE_S)


def test_it_leaves_once_all_are_gone(processes: list[subprocess.Popen[bytes]]) -> None:
    dog = watchdog({processes[0].pid: started_at(processes[0].pid)}, kill_after_s=10**6)
    assert dog.stdin is not None
    dog.stdin.close()
    assert dog.wait(DEADLINE_S) == 0


def test_a_process_that_was_given_an_id_later_is_left_alone(processes: list[subprocess.Popen[bytes]]) -> None:
    dog = watchdog({processes[0].pid: str(int(started_at(processes[0].pid)) - 1)}, kill_after_s=0)
    assert dog.stdin is not None
    dog.stdin.close()
    dog.wait(DEADLINE_S)
    assert processes[0].poll() is None
