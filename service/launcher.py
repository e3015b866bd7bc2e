"""Ray as loray uses it: authentication, connecting, and submitting runs as Ray jobs.

A token guards every cluster that loray starts, and both sides are told to use it: since Ray 2.59 a token file in the home
directory makes `ray start --head` enforce it, while a client that was not told gets 401
(https://docs.ray.io/en/latest/ray-security/token-auth.html). Nothing here turns authentication off.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from service import storage
from service.config import ResolvedRun
from service.errors import ClusterError, ConfigError, NotFoundError

PACKAGES = ("service", "jobs", "tune", "serve")
STAGED_LIMIT_BYTES = 100 * 2**20  # Ray's own limit for a working directory
STOP_WAIT_S = 120  # between SIGTERM and SIGKILL: time for a checkpoint


def use_token_authentication() -> None:
    """Tell this process, and the Ray processes it starts, to authenticate by token; make a token where there is none.

    An explicit RAY_AUTH_MODE is the operator's decision and is kept.
    """
    if os.environ.setdefault("RAY_AUTH_MODE", "token") != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(secrets.token_hex(32))


def connect() -> None:
    """Join the cluster of RAY_ADDRESS (a submitted job has it), or start one on this machine. Idempotent."""
    use_token_authentication()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"Ray could not be reached or started at {address!r}: {error}") from error


def submit(resolved: ResolvedRun, run_id: str, address: str, env_vars: dict[str, str], *, resume: bool = False) -> str:
    """Submit `python -m jobs.train` for a run as a Ray job and return the job's id. Raises ClusterError.

    The first job of a run has the run's id, a resumed run's job the id and a number: Ray never takes an id twice.
    """
    client = job_client(address)
    earlier = len(_jobs_of(client, run_id))
    with staged(resolved) as directory:
        try:
            job_id: str = client.submit_job(
                entrypoint="python -m jobs.train "
                + (f"--resume {run_id}" if resume else f"run.yaml --run-id {run_id}"),
                submission_id=f"{run_id}-{earlier + 1}" if earlier else run_id,
                runtime_env={
                    "working_dir": str(directory),
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **env_vars},
                },
                metadata={"loray_run": run_id},
            )
        except (RuntimeError, ValueError, ConnectionError, OSError) as error:
            raise ClusterError(f"the cluster at {address} did not take the job: {error}") from error
    return job_id


def job_client(address: str) -> Any:
    """A JobSubmissionClient for `http://host:8265`; RAY_ADDRESS would override the address, so it is set aside."""
    use_token_authentication()
    from ray.job_submission import JobSubmissionClient

    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(variable, None)
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        hint = " Both sides need RAY_AUTH_MODE=token and the same token." if "401" in str(error) else ""
        raise ClusterError(f"no Ray dashboard answers at {address!r}: {error}{hint}") from error


def newest_job(client: Any, run_id: str) -> str:
    """The id of the last job submitted for a run. Raises NotFoundError."""
    jobs = _jobs_of(client, run_id)
    if not jobs:
        raise NotFoundError(
            f"the cluster knows no job of run {run_id}. Its runs' directories outlive it: loray runs list"
        )
    return str(max(jobs, key=lambda job: job.start_time or 0).submission_id)


def _jobs_of(client: Any, run_id: str) -> list[Any]:
    return [job for job in client.list_jobs() if (job.metadata or {}).get("loray_run") == run_id]


def follow(client: Any, job_id: str, echo: Callable[[str], None]) -> tuple[str, str]:
    """Print a job's log until it ends; its final status and message. The log's socket may close early: it is reopened."""

    async def tail() -> None:
        async for lines in client.tail_job_logs(job_id):
            echo(lines)

    while True:
        asyncio.run(tail())
        info = client.get_job_info(job_id)
        if info.status.is_terminal():
            return str(info.status), str(info.message or "")


@contextmanager
def staged(resolved: ResolvedRun) -> Iterator[Path]:
    """A directory with our packages, the run file and its small local data: what travels to the cluster.

    Not the user's directory, which may hold anything. Raises ConfigError when the data is too large to travel.
    """
    with tempfile.TemporaryDirectory(prefix="loray-stage-") as name:
        stage = Path(name)
        root = Path(__file__).resolve().parent.parent
        for package in PACKAGES:
            if (root / package).is_dir():
                shutil.copytree(root / package, stage / package, ignore=shutil.ignore_patterns("__pycache__"))
        config = resolved.config.model_dump(mode="json", by_alias=True)
        for key, uri in _local_files(config):
            source = Path(uri)
            if not source.is_file():
                raise ConfigError(f"{'.'.join(key)}: {uri!r} does not exist under {Path.cwd()}.")
            travelling = Path("data") / f"{key[-1]}-{source.name}"
            (stage / "data").mkdir(exist_ok=True)
            shutil.copyfile(source, stage / travelling)
            config[key[0]][key[1]] = str(travelling)
        size = sum(file.stat().st_size for file in stage.rglob("*") if file.is_file())
        if size > STAGED_LIMIT_BYTES:
            raise ConfigError(
                f"the run file's local data makes {size / 2**20:.0f} MiB to send, Ray takes at most 100 MiB. "
                "Put the data on shared storage (s3://...) and name it there."
            )
        (stage / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        yield stage


def _local_files(config: dict[str, Any]) -> Iterator[tuple[Sequence[str], str]]:
    for key in (("data", "train"), ("data", "eval"), ("model", "chat_template")):
        value = config[key[0]][key[1]]
        if value is not None and storage.is_local(value):
            yield key, value
