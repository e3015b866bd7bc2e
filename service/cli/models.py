"""`loray models ...`: the registry's versions and aliases (`service/registry.py`), and merging (`service/merging.py`)."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer

from service.cli.terminal import console, print_json, say
from service.domain import ModelRef
from service.errors import ConfigError
from service.registry import Registry
from service.settings import load_settings

app = typer.Typer(help="List, show, alias, delete and merge published models.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="print JSON for machines")]


def _registry() -> Registry:
    return Registry(load_settings().home)


@app.command("list")
def list_(json: Json = False) -> None:
    """All models with their versions and aliases."""
    from rich.table import Table

    registry = _registry()
    rows = [
        {"model": family, "versions": registry.versions(family), "aliases": registry.aliases(family)}
        for family in registry.models()
    ]
    if json:
        print_json(rows)
        return
    table = Table("model", "versions", "aliases")
    for family in registry.models():
        aliases = ", ".join(f"{name} -> {version}" for name, version in registry.aliases(family).items())
        table.add_row(family, ", ".join(map(str, registry.versions(family))), aliases)
    console.print(table if rows else "No models yet. A run with `publish: NAME` makes one.")


@app.command()
def show(model: str, json: Json = False) -> None:
    """One version's manifest: digests, base, data, metrics, the run it came from."""
    manifest = _registry().manifest(ModelRef.parse(model))
    if json:
        print_json(manifest.model_dump(mode="json"))
        return
    console.print(
        f"[bold]{manifest.ref}[/]  {manifest.kind}, sha256 {manifest.digest}", highlight=False, soft_wrap=True
    )
    hidden = {"ref", "kind", "digest", "config", "files", "manifest_schema"}
    hidden |= {"rank", "alpha"} if manifest.kind == "full" else set()
    hidden |= {"merged_from"} if manifest.merged_from is None else set()
    fields = manifest.model_dump(mode="json", exclude=hidden)
    for name, value in fields.items():
        say(f"  {name}: {value}")
    for name, entry in manifest.files.items():
        console.print(f"  {name}: {entry.bytes:,} bytes", highlight=False)


@app.command()
def merge(
    model: Annotated[str, typer.Argument(help="a published adapter, for example tickets@3")],
    publish: Annotated[str, typer.Option(metavar="NAME", help="the full model's name, for example tickets-merged")],
    max_kl: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="refuse if the mean KL(adapter || merged), in nats per token, is over this; unless given 0.001, or 0.01 "
            "and 0.2 for an adapter trained on a base in 8 and 4 bits",
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="rows to compare on; else the data of the adapter's run")] = None,
    json: Json = False,
) -> None:
    """Merge an adapter into its base, and publish the full model if it answers the same."""
    from service import merging

    ref, settings = ModelRef.parse(model), load_settings()
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed's log, where it is installed, goes to standard output
        manifest = merging.merge(ref, publish, settings, max_kl=max_kl, data=data)
    if json:
        print_json(manifest.model_dump(mode="json"))
        return
    for line in merging.summary(manifest):
        say(line)


@app.command()
def alias(
    pointer: Annotated[str, typer.Argument(metavar="NAME@ALIAS", help="for example tickets@production")],
    version: Annotated[int | None, typer.Argument(min=1, help="the version it shall point to")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="remove the alias")] = False,
) -> None:
    """Move an alias to a version, or remove it."""
    ref = ModelRef.parse(pointer)
    if ref.alias is None:
        raise ConfigError(f"{pointer!r} names no alias. Write for example: loray models alias tickets@production 3")
    if delete == (version is not None):
        raise ConfigError("give either a version to point to, or --delete.")
    if version is None:
        _registry().delete_alias(ref.family, ref.alias)
        console.print(f"{ref} is gone.", highlight=False)
    else:
        _registry().set_alias(ref.family, ref.alias, version)
        console.print(f"{ref} -> {ref.at(version)}", highlight=False)


@app.command()
def delete(model: Annotated[str, typer.Argument(metavar="NAME@VERSION")]) -> None:
    """Delete a version. Refused while an alias or an endpoint points at it."""
    ref = ModelRef.parse(model)
    if ref.version is None:
        raise ConfigError(f"{model!r} names no version. Write for example: loray models delete tickets@3")
    _registry().delete(ref)
    console.print(f"{ref} is deleted. Its number is not used again.", highlight=False)
