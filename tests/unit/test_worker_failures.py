"""Which of the workers' failures is told, and what may be tried next: with the exceptions that Ray and Ray Train raise."""

from __future__ import annotations

import pytest
import ray.exceptions
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError

from service.errors import ModelError, OutOfMemoryError, TrainingError, WorkerLostError
from service.training.trainer import cause_of

SAID = "Task was killed due to the node running low on memory.\nMemory on the node (IP: 10.0.0.1) was 15.3GB / 16GB"


def killed_for_memory() -> Exception:
    failure: Exception = WorkerHealthCheckFailedError(
        "A worker health check failed.", ray.exceptions.OutOfMemoryError(SAID)
    )
    return failure


def killed() -> Exception:
    # What Ray says of every SIGKILL: that it may have been memory is no sign of memory.
    text = "Worker exit detail: connection error code 2. (1) the process was killed by the OOM killer due to high memory usage"
    died = ray.exceptions.ActorDiedError(ActorDiedErrorContext(error_message=text, actor_id=b"0" * 16))
    failure: Exception = WorkerHealthCheckFailedError("A worker health check failed.", died)
    return failure


def peer_lost() -> Exception:
    return WorkerLostError("another worker was killed")


@pytest.mark.parametrize("others", [{}, {1: peer_lost()}, {1: killed()}], ids=["alone", "a peer", "another death"])
def test_a_worker_that_ray_killed_for_memory_halves_the_micro_batch(others: dict[int, Exception]) -> None:
    cause = cause_of({0: killed_for_memory(), **others}, "run", lambda: 8)
    assert isinstance(cause, OutOfMemoryError) and cause.micro == 8
    assert "running low on memory" in str(cause) and "worker 0" in str(cause)


def test_what_cannot_be_halved_is_a_lost_worker_which_is_tried_again_as_it_is() -> None:
    cause = cause_of({0: killed_for_memory()}, "run", lambda: 1)
    assert isinstance(cause, WorkerLostError) and "running low on memory" in str(cause)


def test_a_kill_that_ray_does_not_put_down_to_memory_is_a_lost_worker() -> None:
    assert isinstance(cause_of({0: killed(), 1: peer_lost()}, "run", lambda: 8), WorkerLostError)


def test_the_loops_own_error_comes_before_any_death() -> None:
    own = ModelError("not a causal model")
    assert cause_of({0: peer_lost(), 1: own, 2: killed_for_memory()}, "run", lambda: 8) is own


def test_an_error_in_the_code_is_not_taken_for_a_death() -> None:
    failure = UserExceptionWithTraceback(KeyError("x"), "Traceback ... KeyError: 'x'")
    cause = cause_of({0: failure}, "run", lambda: 8)
    assert isinstance(cause, TrainingError) and not isinstance(cause, OutOfMemoryError) and "KeyError" in str(cause)
