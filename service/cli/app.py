"""The command line, `loray`: reads arguments, calls one thing, prints the answer. `--help` imports no torch and no Ray.

Every heavy import stands inside the command that needs it. Commands about runs are in `runs.py`, about sweeps in
`sweeps.py`, about models in `models.py`, about data in `data.py`; what they do is done elsewhere. Errors of the tree in
`errors.py` become one message and an exit code: 2 for wrong input, 1 for what failed.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import nullcontext
from typing import Annotated

import typer

from service.cli import data, models, runs, sweeps
from service.cli.terminal import console, kept_for_documents, print_document, print_json
from service.errors import ConfigError, LorayError

app = typer.Typer(
    name="loray",
    help="Fine-tune language models, sweep their hyperparameters, and serve the results, on one Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
keys = typer.Typer(no_args_is_help=True, help="API keys of endpoints.")
app.add_typer(keys, name="keys")
app.add_typer(data.app, name="data")
k8s = typer.Typer(no_args_is_help=True, help="Runs on Kubernetes, through KubeRay.")
app.add_typer(k8s, name="k8s")
app.add_typer(runs.app, name="runs")
app.add_typer(models.app, name="models")
app.add_typer(sweeps.app, name="sweep")

RunFile = Annotated[str, typer.Argument(help="a YAML run file", metavar="RUN.YAML")]
Overrides = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="override one field, by dotted name")]
Json = Annotated[bool, typer.Option("--json", help="print JSON for machines")]
Address = Annotated[str | None, typer.Option(help="a Ray dashboard, http://host:8265; this machine unless given")]


@app.command()
def plan(
    run_file: RunFile,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    probe: Annotated[
        bool, typer.Option("--probe", help="make two real steps, and tell time and memory by them")
    ] = False,
    json: Json = False,
) -> None:
    """Show what a run would do: config, data card, steps, parameters, memory per worker, time, advice. Trains nothing."""
    from service.config import load_run
    from service.settings import load_settings

    resolved, settings = load_run(run_file, overrides), load_settings()  # a typo is told before torch is imported
    from service.cli.planned import plan_tables
    from service.training import repeats
    from service.training.plan import detailed, make_run_plan

    trainings = repeats.variants(resolved)
    if trainings:
        resolved = trainings[0].resolved
        typer.echo(f"{len(trainings)} trainings, one after the other. The first, {trainings[0].name}:", err=True)
    run_plan = detailed(make_run_plan(resolved, settings), resolved, settings, probe=probe)
    if json:
        print_json({"plan": run_plan.as_json(), "resolved": resolved.as_json(), "trainings": max(1, len(trainings))})
        return
    for table in plan_tables(resolved, run_plan):
        console.print(table)


@app.command()
def train(
    context: typer.Context,
    run_file: Annotated[str | None, typer.Argument(help="a YAML run file", metavar="RUN.YAML")] = None,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    resume: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="go on from a run's newest checkpoint: its id, latest, or its run file"),
    ] = None,
    no_wait: Annotated[
        bool,
        typer.Option("--no-wait", help="fail at once where the cluster has no room, instead of waiting scale.wait_s"),
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="leave a trace of a few steps in the run")] = False,
    detach: Annotated[bool, typer.Option("-d", "--detach", help="return at once; the run goes on")] = False,
    address: Address = None,
    kuberay: Annotated[
        bool, typer.Option("--kuberay", help="as a RayJob on Kubernetes, as the run file's kubernetes block says")
    ] = False,
) -> None:
    """Train a run file, or go on with a run, here or on a cluster; check and publish the result.

    With --resume, --set takes fields of scale, memory, checkpoint, evaluate, stop and publish: the others are the run's own.
    """
    from service.cli import training
    from service.launcher import NO_WAIT

    if (run_file is None) == (resume is None):
        raise ConfigError("loray train takes a run file or --resume RUN, one of the two. Try: loray train run.yaml")
    given = (*overrides, NO_WAIT) if no_wait else tuple(overrides)
    if kuberay:
        _train_on_kubernetes(run_file, given, address=address, profile=profile, detach=detach)
        return
    asked = training.Asked(run_file, resume, given, profile, context.obj)
    if address:
        training.train_on_cluster(asked, address, detach=detach)
    elif detach:
        training.train_detached(asked)
    else:
        training.train_here(asked)


def _train_on_kubernetes(
    run_file: str | None, overrides: tuple[str, ...], *, address: str | None, profile: bool, detach: bool
) -> None:
    given = {"--resume": run_file is None, "--address": address is not None, "--profile": profile}
    for option in (option for option, is_given in given.items() if is_given):
        raise ConfigError(f"{option} does not go with --kuberay: a RayJob is a new run on a cluster of its own.")
    from service.cli.kuberay import train_on_kubernetes
    from service.config import load_run
    from service.settings import load_settings

    assert run_file is not None, "it is --resume that comes without one"
    train_on_kubernetes(load_run(run_file, overrides), load_settings(), detach=detach)


@k8s.command("render")
def render(run_file: RunFile, overrides: Overrides = []) -> None:  # noqa: B006 - typer copies it
    """Print the RayJob of a run file, with the sizes of its plan, for `kubectl create -f -`."""
    from service.cli.kuberay import render
    from service.config import load_run
    from service.settings import load_settings

    print_document(render(load_run(run_file, overrides), load_settings()))


@app.command()
def serve(serve_file: Annotated[str, typer.Argument(help="a YAML serve file", metavar="SERVE.YAML")]) -> None:
    """Serve a base model and its adapters over HTTP on this machine, until Ctrl-C."""
    from service.cli.serving import serve_here
    from service.config import load_serve
    from service.settings import load_settings

    serve_here(load_serve(serve_file), load_settings())


@keys.command("new")
def new_key(
    name: Annotated[str, typer.Argument(help="whose key it is")],
    scope: Annotated[list[str], typer.Option(help="infer, train, experiment or admin (which may do everything)")],
) -> None:
    """Make an API key: the secret, shown once, and its line for the file that a serve file names in `keys:`."""
    from serve.api_keys import new_key

    secret, line = new_key(name, tuple(scope))
    print(f"# secret, for clients: {secret}\n{line}", end="")


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="a published model, for example tickets@1")],
    max_tokens: Annotated[int, typer.Option(help="tokens of an answer at most")] = 256,
) -> None:
    """Talk to a published model in this process: a line in, an answer out; end with Ctrl-D."""
    from service.cli.talk import chat_lines

    chat_lines(model, max_tokens, sys.stdin)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="a published model, for example tickets@1")],
    data: Annotated[str, typer.Option(help="a data file with prompts and their reference answers")],
    base_prompt: Annotated[
        str | None, typer.Option(help="a data file of one row, put before each prompt for the base only")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first rows")] = None,
    show: Annotated[int, typer.Option(min=0, help="answers to show side by side")] = 3,
    json: Json = False,
) -> None:
    """Score a model's answers on a data file, its base beside it."""
    from service.domain import ModelRef
    from service.evaluation import answers
    from service.settings import load_settings

    ref = ModelRef.parse(model)
    before = answers.read_prompt(base_prompt) if base_prompt else ()
    comparison = answers.compare(ref, data, load_settings(), base_prompt=before, limit=limit)
    if json:
        scores = {"base": comparison.base.as_metrics(), "tuned": comparison.tuned.as_metrics()}
        print_json({"model": comparison.model, "prompts": len(comparison.rows), **scores})
        return
    if show:
        console.print(answers.side_by_side(comparison, show))
    console.print(answers.summary(comparison), markup=False, highlight=False)


@app.command()
def doctor(
    address: Address = None,
    workers: Annotated[int, typer.Option(min=1, help="workers that a run would want")] = 1,
    json: Json = False,
) -> None:
    """Check a cluster before a run: versions, shared storage, disk, memory, room for workers, bandwidth between nodes."""
    from service.cli.checks import doctor

    if not doctor(address, workers, json=json):
        raise typer.Exit(1)


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be deleted")] = False,
    json: Json = False,
) -> None:
    """Delete what interrupted publishers left behind. Readers never see it; it only takes space."""
    from service.cli.garbage import collect
    from service.settings import load_settings

    found = collect(load_settings(), delete=not dry_run)
    if json:
        print_json([{"uri": uri, "reason": reason, "deleted": not dry_run} for uri, reason in found])
        return
    for uri, reason in found:
        console.print(f"{'would delete' if dry_run else 'deleted'} {uri}: {reason}", soft_wrap=True, highlight=False)
    if not found:
        console.print("Nothing to collect.")


def main() -> None:
    """The console script: loray's own errors become a message and an exit code, everything else is a bug and shows."""
    asked_at = time.time()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # ours say more, and --json is for machines
    for_machines = ("--json" in sys.argv or sys.argv[1:3] == ["k8s", "render"]) and "--help" not in sys.argv
    try:
        with kept_for_documents() if for_machines else nullcontext():
            app(obj=asked_at)
    except LorayError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(2 if isinstance(error, (ValueError, LookupError)) else 1)


if __name__ == "__main__":
    main()
