"""`mcpctl events`: what happens, as it happens."""

import sys
from itertools import islice
from typing import Annotated

import typer

from mcp_control.cli.connection import connect
from mcp_control.cli.options import Json
from mcp_control.cli.output import cell, plain, write_json

app = typer.Typer(name="events", help="What happens, as it happens.", no_args_is_help=True)


@app.command("tail")
def tail(
    type: Annotated[
        list[str] | None,
        typer.Option("--type", help="Only this type, task.* for all of a noun; repeatable.", show_default=False),
    ] = None,
    subject: Annotated[str, typer.Option("--subject", help="Only events about this id.", show_default=False)] = "",
    run: Annotated[str, typer.Option("--run", help="Only events of this run.", show_default=False)] = "",
    after: Annotated[
        str,
        typer.Option(
            "--after",
            metavar="EVT",
            help="From after this event on; evt_0 is the oldest kept. Default: from now on.",
            show_default=False,
        ),
    ] = "",
    count: Annotated[
        int | None, typer.Option("--count", "-n", min=1, help="End after so many.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Print events until Ctrl-C; with --json one object per line."""
    with connect() as client:
        events = client.events(type or (), subject=subject or None, run=run or None, after=after or None)
        try:
            for event in islice(events, count):
                found = plain(event)
                if as_json:
                    write_json(found)
                else:
                    line = (found["id"], found["time"], found["type"], found["subject"], cell(found["data"]))
                    sys.stdout.write("\t".join(line) + "\n")
                    sys.stdout.flush()
        except KeyboardInterrupt:
            return
