"""`loray runs ...`: what the run directories say, and asking a run to stop. Reads `service/runs.py`, trains nothing."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.terminal import console, print_json, print_json_lines, say
from service.logs import figure
from service.runs import Run
from service.settings import load_settings

if TYPE_CHECKING:
    from service.training.stacks import Stacks

app = typer.Typer(help="List, follow and stop runs. RUN is an id or `latest`.", no_args_is_help=True)

RunId = Annotated[str, typer.Argument(metavar="RUN", help="a run's id, or latest")]
Json = Annotated[bool, typer.Option("--json", help="print JSON for machines")]


def _open(run: str) -> Run:
    return Run.open(load_settings().home, run)


@app.command("list")
def list_(json: Json = False) -> None:
    """All runs, oldest first."""
    from rich.markup import escape
    from rich.table import Table

    from service.runs import list_runs

    rows = [{"run": run.id, **run.status().model_dump(mode="json")} for run in list_runs(load_settings().home)]
    if json:
        print_json(rows)
        return
    table = Table("run", "state", "step", "updated", "message")
    for row in rows:
        step = "" if row["step"] is None else str(row["step"])
        table.add_row(
            row["run"], row["state"], step, row["updated_at"][:19], escape(row["message"].split("\n")[0][:80])
        )
    console.print(table if rows else "No runs yet. Start one: loray train RUN.YAML")


@app.command()
def show(run: RunId, json: Json = False) -> None:
    """One run: its state, config with sources, and last figures."""
    found = _open(run)
    status, metrics = found.status().model_dump(mode="json"), found.metrics()
    last = metrics[-1] if metrics else {}
    children = [_child(found.home, id) for id in status["details"].pop("children", [])]
    document = {"run": found.id, "uri": found.uri, "status": status, "last": last, "children": children}
    if json:
        print_json({**document, "resolved": found.resolved(), "events": found.events()})
        return
    say(f"{found.id}  {status['state']}  {status['message']}")
    say(found.uri)
    for name, value in {**status["details"], **last}.items():
        say(f"  {name}: {value}")
    for event in found.events():
        say(f"  {_event_line(event)}")
    for child in children:
        figures = "  ".join(
            f"{name} {figure(child[name]):.4f}" for name in ("train/loss", "eval/loss", "test/loss") if name in child
        )
        say(f"  {child['run']}  {child['state']}  {figures}".rstrip())
    console.print(found.run_yaml(), markup=False, highlight=False)


def _child(home: str, id: str) -> dict[str, Any]:
    """A training of a run of several: its state and last figures. Its run is made when its turn has come."""
    from service.errors import NotFoundError

    try:
        child = Run.open(home, id)
    except NotFoundError:
        return {"run": id, "state": "not begun"}
    metrics = child.metrics()
    return {"run": id, "state": child.status().state, **(metrics[-1] if metrics else {})}


def _event_line(event: dict[str, Any]) -> str:
    """`2026-11-23 14:03:05 UTC  ready: 12.3 s: ...`; an event has its kind, and mostly a time and a text."""
    known = {"time", "kind", "text"}
    rest = [f"{name}: {value}" for name, value in event.items() if name not in known]
    at = event.get("time")
    when = f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC  " if isinstance(at, int | float) else ""
    what = [str(event[name]) for name in ("kind", "text") if name in event]
    return when + "  ".join([": ".join(what), *rest])


@app.command()
def logs(run: RunId) -> None:
    """The log of every worker, attempt by attempt."""
    from service import storage
    from service.training.ranklog import log_names

    found = _open(run)
    names = log_names(found)
    for name in names:
        console.print(f"--- {name}", highlight=False)
        text = storage.read_bytes(found.path("logs", name)).decode(errors="replace")
        console.print(text, markup=False, highlight=False, soft_wrap=True, end="")
    if not names:
        console.print(f"No log yet in {found.path('logs')}.", highlight=False, soft_wrap=True)


@app.command()
def stacks(
    run: RunId,
    timeout: Annotated[float, typer.Option(min=0, help="seconds to wait for the workers' answers")] = 30.0,
    json: Json = False,
) -> None:
    """Where every worker stands just now: the Python stacks of its threads. Of an ended run, those that it left."""
    from service.domain import RunState
    from service.training.stacks import read

    found = _open(run)
    status = found.status()
    asked = status.state in (RunState.RUNNING, RunState.LOST)  # lost: its driver is, the workers may still be there
    id, shown, missing = _ask_for_stacks(found, status.details.get("workers"), timeout) if asked else (None, [], [])
    answered = bool(shown) and not missing
    shown = shown or read(found)
    if json:
        texts = [asdict(worker) for worker in shown]
        print_json({"run": found.id, "state": status.state, "request": id, "missing": missing, "stacks": texts})
    for worker in [] if json else shown:
        say(f"--- worker {worker.rank}, attempt {worker.attempt}, {worker.id}\n{worker.text}")
    if asked and not answered:
        who = f"worker(s) {', '.join(map(str, missing))}" if missing else "any worker"
        typer.echo(
            f"No answer from {who} within {timeout:g} s: the process is gone, has not begun yet, or cannot reach "
            f"{found.uri}.",
            err=True,
        )
        raise typer.Exit(1)
    if not shown and not json:
        say(f"Run {found.id} is {status.state} and left no stacks. A worker that stalls leaves some: scale.stall_s.")


def _ask_for_stacks(run: Run, workers: int | None, timeout_s: float) -> tuple[str, list[Stacks], list[int]]:
    """The request's id, the answers, and the workers that gave none."""
    from service.training.stacks import await_answers, request, withdraw

    id = request(run)
    try:
        answers = await_answers(run, id, workers=workers, timeout_s=timeout_s)
    finally:
        withdraw(run, id)
    return id, answers, sorted(set(range(workers or 0)) - {answer.rank for answer in answers})


@app.command()
def attach(
    run: RunId, address: Annotated[str | None, typer.Option(help="follow the Ray job at this dashboard instead")] = None
) -> None:
    """Follow a run to its end. Ctrl-C leaves it running."""
    from service.cli import training

    if address:
        training.follow_job(run, address)
    else:
        training.follow_run(_open(run))


@app.command()
def stop(run: RunId, reason: Annotated[str, typer.Option(help="is kept in the run")] = "loray runs stop") -> None:
    """Ask a run to stop after its open step, with a checkpoint."""
    from service.domain import RunState
    from service.errors import ConflictError

    found = _open(run)
    state = found.status().state
    if state not in (RunState.CREATED, RunState.RUNNING):
        raise ConflictError(f"run {found.id} is {state}, so there is nothing to stop.")
    found.request_stop(reason)
    console.print(f"Asked {found.id} to stop. Follow it: loray runs attach {found.id}", highlight=False)


@app.command()
def metrics(run: RunId, json: Json = False) -> None:
    """The metric row of every step."""
    from rich.table import Table

    rows = _open(run).metrics()
    if json:
        print_json_lines(rows)
        return
    names = ["train/loss", "eval/loss", "optim/lr", "train/grad_norm", "train/tokens_per_s"]
    table = Table("step", *names)
    for row in rows:
        table.add_row(str(row["step"]), *(f"{figure(row[name]):.5g}" if name in row else "" for name in names))
    console.print(table)


@app.command()
def ledger(
    run: RunId,
    check: Annotated[
        bool, typer.Option("--check", help="compare with the plan; exit code 1 where they differ")
    ] = False,
    json: Json = False,
) -> None:
    """Which rows of the training file every step has drawn; with --check, whether just those that were planned."""
    found = _open(run)
    if check:
        _check_ledger(found, json)
        return
    rows = found.ledger()
    if json:
        print_json_lines(rows)
        return
    for row in rows:
        say(f"step {row['step']}: rows {row['ids']}")


def _check_ledger(run: Run, json: bool) -> None:
    from service.training.ledger import check_ledger

    found = check_ledger(run, load_settings().cache)
    if json:
        print_json({"run": run.id, "ok": found.ok, **asdict(found)})
    else:
        say(str(found))
    if not found.ok:
        raise typer.Exit(1)
