"""`mcpctl breakers`: who leaves whom alone after failures."""

from typing import Annotated, Literal

import typer

from mcp_control.cli.connection import connect
from mcp_control.cli.options import Fields, Json, Limit, Out
from mcp_control.cli.output import View

app = typer.Typer(
    name="breakers",
    help="Circuit breakers of servers and agents: who leaves whom alone after failures.",
    no_args_is_help=True,
)
COLUMNS = ("owner", "name", "state", "since", "failures", "probe_at", "error")
WIDE = ("owner_kind", "instance", "opened", "fallback")


@app.command("ls")
def ls(
    state: Annotated[
        Literal["closed", "open", "half_open"] | None, typer.Option("--state", help="Only these.", show_default=False)
    ] = None,
    limit: Limit = None,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """List breakers by owner and name: how they stand, since when, and when the next call goes through as a probe."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.many(client.breakers.iter(state=state), COLUMNS, WIDE, key="name", limit=limit)
