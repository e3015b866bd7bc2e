"""`loray sweep ...`: running sweeps, and what their directories say. `loray sweep FILE` is short for `loray sweep run FILE`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from service.cli.terminal import console, print_json, say
from service.errors import ConfigError
from service.settings import load_settings

if TYPE_CHECKING:
    from tune.directory import Sweep


class _RunUnlessNamed(TyperGroup):
    """A group whose first argument may be a sweep file, or an option of `run`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunUnlessNamed,
    help="Search hyperparameters: loray sweep SWEEP.YAML. SWEEP is an id or `latest`.",
    no_args_is_help=True,
)

SweepId = Annotated[str, typer.Argument(metavar="SWEEP", help="a sweep's id, or latest")]
Json = Annotated[bool, typer.Option("--json", help="print JSON for machines")]


def _open(sweep: str) -> Sweep:
    from tune.directory import Sweep

    return Sweep.open(load_settings().home, sweep)


@app.command()
def run(
    sweep_file: Annotated[
        str | None, typer.Argument(help="a YAML sweep file, or a run file with ranges in it", metavar="SWEEP.YAML")
    ] = None,
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="override one field, of the sweep or of its base")
    ] = [],  # noqa: B006 - typer copies it
    resume: Annotated[str | None, typer.Option(metavar="SWEEP", help="go on with a sweep: its id, or latest")] = None,
    share_base: Annotated[
        bool, typer.Option("--share-base", help="all trials in one worker, on one copy of the frozen base")
    ] = False,
) -> None:
    """Run a sweep file, or go on with a sweep; rank its trials and publish the best one's model.

    With --resume, --set takes search.trials, search.parallel, search.budget and publish: all else is the sweep's own.
    """
    if (sweep_file is None) == (resume is None):
        raise ConfigError(
            "loray sweep takes a sweep file or --resume SWEEP, one of the two. Try: loray sweep sweep.yaml"
        )
    from jobs.sweep import run as run_here

    run_here(sweep_file, resume, [*overrides, *(["search.share_base=true"] if share_base else [])], console)


@app.command("list")
def list_(json: Json = False) -> None:
    """All sweeps, oldest first."""
    from rich.markup import escape
    from rich.table import Table

    from tune.directory import list_sweeps

    rows = [{"sweep": one.id, **one.status().model_dump(mode="json")} for one in list_sweeps(load_settings().home)]
    if json:
        print_json(rows)
        return
    table = Table("sweep", "state", "best trial", "model", "updated", "message")
    for row in rows:
        best, model = (str(row["details"].get(key, "")) for key in ("best", "model"))
        message = escape(row["message"].split("\n")[0][:80])
        table.add_row(row["sweep"], row["state"], best, model, row["updated_at"][:19], message)
    console.print(table if rows else "No sweeps yet. Start one: loray sweep SWEEP.YAML")


@app.command()
def show(sweep: SweepId, json: Json = False) -> None:
    """One sweep: its trials, best first, what mattered, and where its plots are. Of a running one, as far as it is."""
    from tune import leaderboard
    from tune.table import best_so_far, summary
    from tune.trials import Trials

    found = _open(sweep)
    status, resolved = found.status(), found.resolved()
    search, trials = resolved.config.search, Trials(found, resolved).look()
    board = leaderboard.as_json(trials, search.metric, search.mode, status.details.get("model"))
    if json:
        print_json({"sweep": found.id, "uri": found.uri, "status": status.model_dump(mode="json"), **board})
        return
    say(f"{found.id}  {status.state}  {status.message}")
    say(found.uri)
    console.print(summary(trials, search.metric, search.mode))
    say(best_so_far(trials, search.metric, search.mode))
    say(f"{board['tokens']:,} tokens read" + (f", published as {board['model']}" if board["model"] else ""))
    for key, share in board["importance"].items():
        say(f"  {key} alone explains {share:.0%} of the differences")
    for row in board["trials"]:
        if row["why"]:
            say(f"  trial {row['trial']}: {row['why']}")
    for name in _pages(found):
        say(f"  {found.path(name)}")


def _pages(sweep: Sweep) -> list[str]:
    """What a sweep leaves when it ends."""
    from service import storage

    return [name for name in storage.list_names(sweep.uri) if name.endswith((".png", ".md"))]


@app.command()
def stop(sweep: SweepId, reason: Annotated[str, typer.Option(help="is kept in the runs")] = "loray sweep stop") -> None:
    """Ask a sweep to stop: running trials end with a checkpoint, no other begins."""
    from service.domain import RunState
    from service.errors import ConflictError

    found = _open(sweep)
    state = found.status().state
    if state is not RunState.RUNNING:
        raise ConflictError(f"sweep {found.id} is {state}, so there is nothing to stop.")
    found.request_stop(reason)
    say(f"Asked {found.id} to stop. It goes on with: loray sweep --resume {found.id}")


@app.command()
def publish(
    sweep: SweepId, name: Annotated[str, typer.Argument(help="a registry name such as tickets")], json: Json = False
) -> None:
    """Publish the model of a sweep's best finished trial as the next version of NAME; what is published stays as it is."""
    from service.domain import ModelRef

    if ModelRef.parse(name).selector is not None:
        raise ConfigError(f"{name!r} must be a bare name such as tickets: the version is given when it is published.")
    from tune.sweep import publish_best

    manifest = publish_best(_open(sweep), name, load_settings())
    if json:
        print_json({"model": manifest.ref, "digest": manifest.digest, "run": manifest.run})
    else:
        say(f"Published {manifest.ref}, of run {manifest.run}  (sha256 {manifest.digest[:12]})")
