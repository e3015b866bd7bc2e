"""Ray as loray uses it: authentication, connecting, and submitting runs as Ray jobs.

A token guards every cluster that loray starts, and both sides are told to use it: since Ray 2.59 a token file in the home
directory makes `ray start --head` enforce it, while a client that was not told gets 401
(https://docs.ray.io/en/latest/ray-security/token-auth.html). Nothing here turns authentication off.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from service import storage
from service.config import LoraBlock, ResolvedRun, SourceBlock
from service.errors import ClusterError, ConfigError, LorayError, NotFoundError

PACKAGES = ("service", "jobs", "tune", "serve")
STAGED_LIMIT_BYTES = 100 * 2**20  # Ray's own limit for a working directory
# Ray runs training and serving in threads, where glibc's allocator gives every large tensor back to the kernel and takes
# it anew: seen to cost a quarter of a training step on a CPU. One arena, which keeps what it has, undoes that.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}
# Ray reads these when it is imported, or when a cluster starts. Serve's messages by gRPC instead of Ray's object store take
# half the processor time a token (tests/benchmarks/serve_http.py); the channels carry the same token.
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "PYTHON worker processes have been started",  # drivers of trials; Ray warns from 8 on 2 cores
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),  # answers with log-probabilities are larger than 4 MiB
}
NO_WAIT = "scale.wait_s=0"  # what `--no-wait` stands for
AGENT_WAIT_S = 60.0  # for a cluster to be able to take a job
STOP_WAIT_S = 120  # between SIGTERM and SIGKILL: time for a checkpoint


def use_token_authentication(*, make_token: bool = False) -> None:
    """Tell this process, and the Ray processes it starts, to authenticate by token, where there is a token.

    `make_token` makes one where there is none: for a cluster about to be started here; a token made here would not be
    another cluster's. An explicit RAY_AUTH_MODE is the operator's decision and is kept. Ray reads the mode when it is
    imported: call this before, or ClusterError.
    """
    if "RAY_AUTH_MODE" in os.environ and os.environ["RAY_AUTH_MODE"] != "token":
        return
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if make_token and not os.environ.get("RAY_AUTH_TOKEN") and not file.is_file():
        _write_token(file)
    if "RAY_AUTH_MODE" in os.environ or not (os.environ.get("RAY_AUTH_TOKEN") or file.is_file()):
        return
    if "ray" in sys.modules:
        raise ClusterError(
            "Ray was imported before its authentication mode was set. Set RAY_AUTH_MODE=token in the environment, or call "
            "service.launcher.use_token_authentication() before anything imports ray."
        )
    os.environ["RAY_AUTH_MODE"] = "token"


def prepare_environment() -> None:
    """What `connect` does before it imports Ray, for callers that must import Ray before they connect."""
    use_token_authentication(make_token=_address() == "local")
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _address() -> str:
    return os.environ.get("RAY_ADDRESS") or "local"


def started_here() -> bool:
    """Whether the cluster is one that this process starts for itself, to which no node will ever be added."""
    return _address() == "local"


def _write_token(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent) as aside:  # readable by its owner only
        aside.write(secrets.token_hex(32))
        aside.flush()
        with suppress(FileExistsError):  # another process has just made one, and it counts for both
            os.link(aside.name, file)


def connect() -> None:
    """Join the cluster of RAY_ADDRESS (a submitted job has it), or start one on this machine. Idempotent."""
    loaded = sys.modules.get("ray")
    if loaded is not None and loaded.is_initialized():
        return
    address = _address()
    prepare_environment()
    import ray

    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"Ray could not be reached or started at {address!r}: {error}") from error


def gcs_client() -> Any:
    """A client of the connected cluster's GCS, for what Ray's public calls do not tell. Its calls raise RpcError."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # made in Cython

    return GcsClient(address=ray.get_runtime_context().gcs_address)


def train_command(
    run_id: str, overrides: Sequence[str], *, run_file: str | None, profile: bool, asked_at: float
) -> list[str]:
    """`-m jobs.train` with its arguments: for a new run of `run_file`, or without one for a run that goes on.

    `asked_at` (seconds since the epoch) travels along: start-up is counted from the user's command, not from the job's.
    """
    what = [run_file, "--run-id", run_id] if run_file else ["--resume", run_id]
    sets = [part for override in overrides for part in ("--set", override)]
    return ["-m", "jobs.train", *what, *sets, *(["--profile"] if profile else []), "--asked-at", repr(asked_at)]


def submit(
    resolved: ResolvedRun | None,
    run_id: str,
    address: str,
    env_vars: dict[str, str],
    *,
    overrides: Sequence[str] = (),
    profile: bool = False,
    asked_at: float,
) -> str:
    """Submit `python -m jobs.train` for a run as a Ray job and return the job's id. Raises ClusterError.

    Without `resolved` the run goes on, with `overrides`. The first job of a run has the run's id, a resumed run's job the id
    and a number: Ray never takes an id twice.
    """
    client = job_client(address)
    try:
        with staged(resolved) as (directory, staged_overrides):
            run_file = "run.yaml" if resolved else None
            given = [*overrides, *staged_overrides]
            command = train_command(run_id, given, run_file=run_file, profile=profile, asked_at=asked_at)
            earlier = len(_jobs_of(client, run_id))
            return _submit(
                client, command, directory, {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **env_vars},
                submission_id=f"{run_id}-{earlier + 1}" if earlier else run_id, metadata={"loray_run": run_id},
            )  # fmt: skip
    except LorayError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        raise ClusterError(f"the cluster at {address} did not take the job: {error}") from error


def run_doctor(address: str, workers: int, env_vars: dict[str, str]) -> str:
    """Submit `python -m jobs.doctor --json` as a Ray job, wait for its end, and return its log. Raises ClusterError."""
    client = job_client(address)
    log: list[str] = []
    try:
        with staged(None) as (directory, _):
            command = ["-m", "jobs.doctor", "--json", "--workers", str(workers)]
            job_id = _submit(client, command, directory, env_vars)
        follow(client, job_id, log.append)
    except (RuntimeError, ValueError, OSError) as error:
        raise ClusterError(f"the cluster at {address} could not be examined: {error}") from error
    return "".join(log)


def _submit(client: Any, command: list[str], directory: Path, env_vars: dict[str, str], **options: Any) -> str:
    """The id of the job. A cluster that has just started refuses jobs until an agent has registered: it is asked again."""
    deadline = time.monotonic() + AGENT_WAIT_S
    while True:
        try:
            return str(
                client.submit_job(
                    entrypoint=shlex.join(["python", *command]),
                    runtime_env={"working_dir": str(directory), "env_vars": env_vars},
                    **options,
                )
            )
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(1.0)


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
    """Print a job's log until it ends; its final status and message. The log's socket may close early: it is reopened.

    Ray sends the log from its beginning each time, so what was printed already is skipped.
    """
    printed = 0

    async def tail() -> None:
        nonlocal printed
        sent = 0
        async for lines in client.tail_job_logs(job_id):
            new = lines[max(0, printed - sent) :]
            sent += len(lines)
            if new:
                echo(new)
                printed = sent

    while True:
        try:
            asyncio.run(tail())
            info = client.get_job_info(job_id)
        except (RuntimeError, OSError) as error:
            raise ClusterError(f"the cluster no longer answers about job {job_id}: {error}") from error
        if info.status.is_terminal():
            return str(info.status), str(info.message or "")
        time.sleep(1.0)


@contextmanager
def staged(resolved: ResolvedRun | None) -> Iterator[tuple[Path, list[str]]]:
    """A directory with our packages, the run file and its small local data: what travels to the cluster.

    Not the user's directory, which may hold anything. Beside it the overrides: what `--set` was given, and where the data
    lies there. Without a run, the packages only. Raises ConfigError when the data is too large to travel.
    """
    with tempfile.TemporaryDirectory(prefix="loray-stage-") as name:
        stage = Path(name)
        root = Path(__file__).resolve().parent.parent
        for package in PACKAGES:
            if (root / package).is_dir():
                shutil.copytree(root / package, stage / package, ignore=shutil.ignore_patterns("__pycache__"))
        overrides = [*resolved.overrides, *stage_files(resolved, stage, Path("data"))] if resolved else []
        size = sum(file.stat().st_size for file in stage.rglob("*") if file.is_file())
        if size > STAGED_LIMIT_BYTES:
            raise ConfigError(
                f"the run file's local data makes {size / 2**20:.0f} MiB to send, Ray takes at most 100 MiB. "
                "Put the data on shared storage (s3://...) and name it there."
            )
        yield stage, overrides


def stage_files(resolved: ResolvedRun, stage: Path, there: Path) -> Iterator[str]:
    """Copy the run file, and into `data` what it names on this machine; an override for each file: it will lie in `there`."""
    (stage / "run.yaml").write_text(resolved.text, encoding="utf-8")
    (stage / "data").mkdir()
    model, data = resolved.config.model, resolved.config.data
    named = {
        **{"data.train": data.train, "data.eval": data.eval, "data.test": data.test},
        **{"data.augment.synonyms": data.augment.synonyms, "model.chat_template": model.chat_template},
    }
    for key, given in named.items():
        staged = _staged(given, key, key.split(".")[-1], stage, there)
        if staged != given:
            yield _override(key, staged)
    method = resolved.config.method
    adapter = Path(method.init_from).expanduser() if isinstance(method, LoraBlock) and method.init_from else None
    if adapter is not None and adapter.is_dir():
        name = _copied("init_from", adapter.resolve())
        shutil.copytree(adapter, stage / "data" / name)
        yield _override("method.init_from", str(there / name))


def _override(key: str, value: Any) -> str:
    """In letters that YAML and a shell take as they are: JSON writes those above U+FFFF as two, which YAML leaves so."""
    text = re.sub("[^ -~]", lambda letter: f"\\U{ord(letter[0]):08x}", json.dumps(value, ensure_ascii=False))
    return f"{key}={text}"


def _staged(given: Any, key: str, name: str, stage: Path, there: Path) -> Any:
    """A value of a config, as it is when the file or directory that it names lies `there`, called after `name`."""
    from service.data.hub import is_hub

    if isinstance(given, tuple):
        return [_staged(one, key, f"{name}-{number}", stage, there) for number, one in enumerate(given, 1)]
    if isinstance(given, SourceBlock):
        return given.model_dump(exclude_unset=True) | {"uri": _staged(given.uri, key, name, stage, there)}
    if given is None or is_hub(given) or not storage.is_local(given):
        return given
    source = storage.local_path(given)
    if not source.exists():
        raise ConfigError(f"{key}: {given!r} does not exist under {Path.cwd()}.")
    copied = _copied(name, source)
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, stage / "data" / copied)
    return str(there / copied)


def _copied(name: str, source: Path) -> str:
    """What the copy is called: `name` is no other copy's, and the rest is what a ConfigMap takes in a key."""
    return f"{name}-{re.sub('[^-._a-zA-Z0-9]', '-', source.name)[-200:]}"
