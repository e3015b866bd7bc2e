"""`loray data ...`: data as training sees it, before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.terminal import console, print_json, say
from service.errors import ConfigError

if TYPE_CHECKING:
    from service.config import ReadingBlock, RunConfig
    from service.render import Renderer

app = typer.Typer(help="Look at data as training sees it.", no_args_is_help=True)

DEFAULT_MODEL = "smollm2-135m-instruct"

File = Annotated[str, typer.Argument(help="a data file or a directory of them, here or on s3://", metavar="FILE")]
Model = Annotated[str | None, typer.Option(help=f"the base model that renders; {DEFAULT_MODEL} unless given")]
AsRun = Annotated[
    str | None, typer.Option("--run", metavar="RUN.YAML", help="read and render as this run file's model and data say")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON for machines")]


@app.command()
def show(
    file: File,
    row: Annotated[int, typer.Option(min=1, help="its number; in a JSONL file, its line")] = 1,
    model: Model = None,
    run: AsRun = None,
    json: Json = False,
) -> None:
    """Show one row as training sees it: its tokens, the special ones too, and which of them are trained."""
    config = run_config(file, model, run)
    from service.data import shown
    from service.data.rendered import examples_of

    found = shown.find_row(file, row, reading_of(file, config))
    renderer = renderer_of(config)
    examples = examples_of(found, renderer, config.data.train_on)
    tokenizer = renderer.tokenizer
    if json:
        about = {"file": file, "row": row, "model": config.model.id, "train_on": config.data.train_on}
        print_json({**about, "examples": [shown.as_json(example, tokenizer) for example in examples]})
        return
    colours = console.color_system is not None and not console.no_color
    say(f"{file}, row {row}, rendered for {config.model.id}, trained on: {config.data.train_on}")
    for number, example in enumerate(examples, 1):
        if len(examples) > 1:
            say(f"\nexample {number} of {len(examples)}: the chat template rewrites earlier turns")
        console.print(shown.legend(example, tokenizer, colours=colours), soft_wrap=True)
        console.print()
        console.print(shown.tokens_shown(example, tokenizer, colours=colours), soft_wrap=True)
        if (tokens := len(example.ids)) > config.data.seq_len:
            say(f"\n{tokens:,} tokens are more than data.seq_len, {config.data.seq_len:,}: {config.data.over_long}")


@app.command()
def prepare(
    run_file: Annotated[str, typer.Argument(help="a YAML run file", metavar="RUN.YAML")],
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="override one field, by dotted name")
    ] = [],  # noqa: B006 - typer copies it
    json: Json = False,
) -> None:
    """Tokenise a run's data, or find it tokenised; large sources on all CPUs of the cluster. Training does it by itself."""
    from service.config import load_run
    from service.settings import load_settings

    config, settings = load_run(run_file, overrides).config, load_settings()
    from service.cli.planned import data_table, findings_table
    from service.data.prepare import prepare_for

    prepared = prepare_for(config, settings)
    if json:
        print_json(prepared.as_json())
        return
    for table in (data_table(prepared), *findings_table(prepared)):
        console.print(table)


@app.command()
def check(
    file: File,
    against: Annotated[
        str | None,
        typer.Option(metavar="EVAL", help="evaluation data that no row may ask too; the run file's unless given"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="the base model by which tokens are counted")] = None,
    run: AsRun = None,
    strict: Annotated[bool, typer.Option("--strict", help="exit with 1 on warnings too")] = False,
    quarantine: Annotated[
        str | None, typer.Option(metavar="OUT", help="write OUT/good.jsonl, and OUT/bad.jsonl with the reasons")
    ] = None,
    markdown: Annotated[str | None, typer.Option(metavar="OUT", help="write the card as Markdown too")] = None,
    json: Json = False,
) -> None:
    """Find what is wrong with data before it costs anything: a card, findings with row numbers, the remedy for each.

    Exits with 1 where an error was found: it would stop a training. Warnings are for you to judge.
    """
    config = run_config(file, model, run)
    from service.cli.checked import Outputs, check_file

    evaluation = against or (
        config.data.eval if config.data.eval and _place(config.data.eval) != _place(file) else None
    )
    checkup = check_file(
        (file, reading_of(file, config)),
        (evaluation, reading_of(evaluation, config)) if evaluation else None,
        config.data,
        renderer_of(config) if model or run else None,
        Outputs(quarantine, markdown, json),
    )
    if checkup.errors or (strict and checkup.warnings):
        raise typer.Exit(1)


def run_config(file: str, model: str | None, run: str | None) -> RunConfig:
    """The run file's config, or that of the shortest run that trains this model on this file."""
    from service.config import RunConfig, load_run

    if run is None:
        return RunConfig.model_validate({"model": model or DEFAULT_MODEL, "data": {"train": file}})
    if model is not None:
        raise ConfigError(f"--run {run} names a model, and --model {model} another. Give one of the two.")
    return load_run(run).config


def reading_of(file: str, config: RunConfig) -> ReadingBlock:
    """How the rows of a file are understood: as its source says where it is one of the run's, else as `data` does."""

    return next((source for source in config.data.sources if _place(source.uri) == _place(file)), config.data)


def _place(uri: str) -> str:
    from service import storage

    return str(storage.local_path(uri)) if storage.is_local(uri) else uri


def renderer_of(config: RunConfig) -> Renderer:
    """The renderer of the config's base model."""
    from service.base_models import resolve_base_model
    from service.data.rendered import renderer_for
    from service.settings import load_settings

    settings = load_settings()
    base = resolve_base_model(config.model.id, settings.cache, config.model.revision, settings.home)
    return renderer_for(config, base.path)
