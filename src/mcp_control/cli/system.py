"""`mcpctl status` and the other commands about the server as a whole."""

from typing import Any

from mcp_control.cli.connection import connect
from mcp_control.cli.options import Fields, Json, Out
from mcp_control.cli.output import View


def status(as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Show the server at a glance."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        found: dict[str, Any] = {"url": client.url, **client.status()}
    view.one(found, tuple(found), key="node")
