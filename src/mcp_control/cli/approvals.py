"""`mcpctl approvals`: the inbox of questions to people."""

from typing import TYPE_CHECKING, Annotated

import typer

from mcp_control.cli.connection import connect, whole_id
from mcp_control.cli.errors import USAGE, CliError
from mcp_control.cli.options import Fields, Json, Limit, Out, loose
from mcp_control.cli.output import View

if TYPE_CHECKING:
    from mcp_control.sdk.client import Client

app = typer.Typer(
    name="approvals", help="Questions that runs and tasks ask people: list, show, answer.", no_args_is_help=True
)
COLUMNS = ("id", "state", "title", "options", "pipeline", "stage", "task_id", "asked_at", "due_at", "mine")
WIDE = ("run_id", "message", "default", "assignees", "roles")
SHOWN = ("id", "state", "title", "message", "options", "fields", "default", "assignees", "roles", "task_id", "run_id", "pipeline",
         "stage", "asked_at", "due_at", "answer", "mine")  # fmt: skip
Id = Annotated[str, typer.Argument(metavar="ID", help="Id of an approval, or the end of one.")]


@app.command("ls")
def ls(
    state: Annotated[
        str, typer.Option("--state", help="pending, answered, expired, withdrawn; `all` for every one.")
    ] = "pending",
    run: Annotated[str, typer.Option("--run", metavar="ID", help="Only those of this run.", show_default=False)] = "",
    mine: Annotated[bool, typer.Option("--mine", help="Only those that wait for me.")] = False,
    limit: Limit = None,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """List questions, newest first."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        found = client.approvals.iter(state=None if state == "all" else state, run=run or None, mine=mine or None)
        view.many(found, COLUMNS, WIDE, limit=limit)


@app.command("show")
def show(id: Id, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Show a question, and its answer where there is one."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.one(client.approvals.get(_approval_id(client, id)), SHOWN)


@app.command("answer")
def answer(
    id: Id,
    option: Annotated[str, typer.Argument(metavar="OPTION", help="One of the options, e.g. approve.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="A field of the form; repeatable.", show_default=False),
    ] = None,
    comment: Annotated[str, typer.Option("--comment", help="A word to those who look later.", show_default=False)] = "",
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Answer a question; its run or task goes on."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        asked = client.approvals.get(_approval_id(client, id))
        given = {}
        for text in settings or ():
            name, sign, value = text.partition("=")
            if not sign or name not in asked.fields:
                known = ", ".join(asked.fields) or "none"
                raise CliError(f"--set {text}: write FIELD=VALUE; the fields are {known}", USAGE)
            given[name] = value if asked.fields[name].type in ("string", "artifact") else loose(value)
        view.one(client.approvals.answer(asked.id, option, fields=given, comment=comment, etag=asked.etag), SHOWN)


def _approval_id(client: "Client", given: str) -> str:
    return whole_id("approval", given, (view.id for view in client.approvals.iter(limit=500)))
