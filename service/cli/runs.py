"""`loray runs ...`: what the run directories say, and asking a run to stop. Reads `service/runs.py`, trains nothing."""

from __future__ import annotations

from typing import Annotated

import typer

from service.cli.terminal import console, print_json, print_json_lines, say
from service.runs import Run
from service.settings import load_settings

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
    document = {"run": found.id, "uri": found.uri, "status": status, "last": last}
    if json:
        print_json({**document, "resolved": found.resolved(), "events": found.events()})
        return
    say(f"{found.id}  {status['state']}  {status['message']}")
    say(found.uri)
    for name, value in {**status["details"], **last}.items():
        say(f"  {name}: {value}")
    for event in found.events():
        say(f"  {event['kind']}: {event['text']}")
    console.print(found.run_yaml(), markup=False, highlight=False)


@app.command()
def logs(run: RunId) -> None:
    """The log of every worker, attempt by attempt."""
    from service import storage

    found = _open(run)
    names = storage.list_names(found.path("logs"))
    for name in names:
        console.print(f"--- {name}", highlight=False)
        text = storage.read_bytes(found.path("logs", name)).decode(errors="replace")
        console.print(text, markup=False, highlight=False, soft_wrap=True, end="")
    if not names:
        console.print(f"No log yet in {found.path('logs')}.", highlight=False, soft_wrap=True)


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
        table.add_row(str(row["step"]), *(f"{row[name]:.5g}" if name in row else "" for name in names))
    console.print(table)


@app.command()
def ledger(run: RunId, json: Json = False) -> None:
    """Which rows of the training file every step has drawn."""
    rows = _open(run).ledger()
    if json:
        print_json_lines(rows)
        return
    for row in rows:
        say(f"step {row['step']}: rows {row['ids']}")
