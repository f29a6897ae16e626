"""`mcpctl doctor`: looks at everything a server needs, and says what to do."""

import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from mcp_control.cli.errors import told
from mcp_control.cli.options import Fields, Json, Out
from mcp_control.cli.output import View

_MARKS: Final = {"ok": "\N{CHECK MARK}", "warn": "!", "fail": "\N{BALLOT X}"}


def doctor(
    config: Annotated[
        Path | None, typer.Option("--config", help="TOML file with settings, as `up` would get it.", show_default=False)
    ] = None,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Look whether a server can run here with its databases, and whether the chosen one answers; say what to do.

    Exit code 1 when something fails; what only deserves a look does not count. Nothing is changed by looking.
    """
    from mcp_control.cli.checks import all_checks

    view = View.of(out, as_json, fields)
    found = [one._asdict() for one in all_checks(told, config)]
    failed = any(one["state"] == "fail" for one in found)
    if view.format == "table" and sys.stdout.isatty():
        found = [one | {"state": _MARKS[one["state"]]} for one in found]
    view.many(found, ("state", "check", "detail", "advice"), key="check", limit=0)
    if failed:
        raise typer.Exit(1)
