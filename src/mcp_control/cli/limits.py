"""`mcpctl limits`: how many tasks of a key may be under way at once, or start in a time."""

import re
from typing import Annotated, Any

import typer

from mcp_control.cli.connection import connect
from mcp_control.cli.errors import USAGE, CliError
from mcp_control.cli.options import Fields, Json, Labels, Limit, Out, confirm, pairs, seconds
from mcp_control.cli.output import View, say

app = typer.Typer(
    name="limits",
    help="How many tasks of a key may be under way at once, or start in a time: list, set, remove.",
    no_args_is_help=True,
)
COLUMNS = ("name", "match", "key", "concurrency", "rate")
WIDE = ("changed_at", "changed_by")
SHOWN = (*COLUMNS, "use", *WIDE)
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the limit.")]


@app.command("ls")
def ls(limit: Limit = None, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """List limits by name."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.many(client.limits.iter(), COLUMNS, WIDE, key="name", limit=limit)


@app.command("show")
def show(name: Name, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Show a limit, with its busiest keys, who holds them and how many wait."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.one(client.limits.get(name), SHOWN, key="name")


@app.command("set")
def set_limit(
    name: Name,
    type_: Annotated[str, typer.Option("--type", metavar="PATTERN", help="Task types it is for; * and ? match.")] = "*",
    label: Labels = None,
    key: Annotated[
        str,
        typer.Option(
            "--key", metavar="CEL", help="Over type, labels, payload: tasks of one value share it.", show_default=False
        ),
    ] = "",
    concurrency: Annotated[
        str,
        typer.Option(
            "--concurrency",
            metavar="N|CEL",
            help="How many at once: a number, or CEL that gives one.",
            show_default=False,
        ),
    ] = "",
    rate: Annotated[
        str,
        typer.Option(
            "--rate", metavar="COUNT/TIME", help="How many starts in a time: 10/1s, 100/1h.", show_default=False
        ),
    ] = "",
    burst: Annotated[
        int | None, typer.Option("--burst", min=1, help="Starts at once after a pause.", show_default=False)
    ] = None,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Make a limit, or change it. It counts at once; nothing that runs is ended."""
    view = View.of(out, as_json, fields)
    if bool(concurrency) == bool(rate):
        raise CliError("say how much: --concurrency or --rate", USAGE)
    spec: dict[str, Any] = {"match": {"type": type_, "labels": pairs(label)}, "key": key}
    if concurrency:
        spec["concurrency"] = int(concurrency) if concurrency.isdigit() else concurrency
    else:
        found = re.fullmatch(r"(\d+)/(.+)", rate)
        if found is None:
            raise CliError(f"{rate!r} is no rate", USAGE, "write COUNT/TIME, as in 10/1s or 100/1h")
        spec["rate"] = {"count": int(found[1]), "seconds": seconds(found[2]), "burst": burst}
    with connect() as client:
        view.one(client.limits.set(name, spec), COLUMNS, key="name")


@app.command("rm")
def rm(name: Name) -> None:
    """Remove a limit; what waits for it goes on."""
    confirm(f"Remove the limit {name}?")
    with connect() as client:
        client.limits.remove(name)
    say(f"removed {name}")
