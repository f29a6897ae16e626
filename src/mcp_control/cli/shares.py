"""`mcpctl shares`: whose tasks get which part of the slots while several wait."""

from typing import Annotated

import typer

from mcp_control.cli.connection import connect
from mcp_control.cli.options import Fields, Json, Limit, Out
from mcp_control.cli.output import View

app = typer.Typer(
    name="shares",
    help="Whose tasks get which part of the slots while several wait: list, weight.",
    no_args_is_help=True,
)
COLUMNS = ("key", "weight", "ordered", "waiting", "served")
WIDE = ("updated_at",)
Key = Annotated[str, typer.Argument(metavar="KEY", help="Key of the share; '' is that of all tasks without one.")]


@app.command("ls")
def ls(limit: Limit = None, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """List shares by key: their weights, what waits and what they were served."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.many(client.shares.iter(), COLUMNS, WIDE, key="key", limit=limit)


@app.command("set")
def set_share(
    key: Key,
    weight: Annotated[
        float | None,
        typer.Option(
            "--weight",
            min=0.1,
            max=100,
            help="Its part in relation to others; without, its tasks say.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Give a share a weight whatever its tasks say, or leave it to them again. It counts at once."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.one(client.shares.set(key, weight), COLUMNS, key="key")
