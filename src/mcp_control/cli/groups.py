"""`mcpctl groups`: tasks that belong together, and what is done when they have ended."""

from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from mcp_control.cli.connection import connect, task_id, whole_id
from mcp_control.cli.errors import ENDED_BADLY, TIMED_OUT, USAGE, CliError
from mcp_control.cli.options import Fields, Json, Limit, Out, Reason, Timeout, Wait, confirm, json_bytes, seconds
from mcp_control.cli.output import View, say

if TYPE_CHECKING:
    from mcp_control.sdk.client import Client
    from mcp_control.sdk.groups import GroupHandle
    from mcp_control.tasks.model import TaskSpec

app = typer.Typer(
    name="groups",
    help="Tasks that belong together: make, add to, seal, wait for, cancel, retry what failed.",
    no_args_is_help=True,
)
COLUMNS = ("id", "name", "state", "total", "counts", "created_at", "finished_at")
WIDE = ("round", "callbacks", "first_failure", "state_since", "created_by")
SHOWN = ("id", "name", "state", "progress", "total", "done", "counts", "callbacks", "first_failure", "round", "operation",
         "cancel_reason", "created_at", "finished_at", "warnings")  # fmt: skip
Id = Annotated[str, typer.Argument(metavar="ID", help="Id of a group, or the end of one.")]
Tasks = Annotated[
    str,
    typer.Argument(
        metavar="JSON", help='A list of tasks, e.g. \'[{"type": "echo"}]\'; @file, or - for standard input.'
    ),
]
Key = Annotated[str, typer.Option("--key", help="Idempotency key: repeating it changes nothing.", show_default=False)]


@app.command("create")
def create(
    tasks: Tasks = "[]",
    on: Annotated[
        list[str] | None,
        typer.Option(
            "--on",
            metavar="EVENT=TASK",
            help="A task type, or a task as JSON, for completed, first_failure or ended; repeatable.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[str, typer.Option("--name", help="A name for people.", show_default=False)] = "",
    open: Annotated[bool, typer.Option("--open", help="More tasks will be added; `groups seal` ends that.")] = False,
    key: Key = "",
    wait: Wait = False,
    timeout: Timeout = "",
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Make a group of tasks. It is durable when this returns; with --wait, print it when it has ended."""
    view = View.of(out, as_json, fields)
    limit = seconds(timeout)
    specs = _specs(tasks)
    events = dict(_event(text) for text in on or ())
    with connect() as client:
        handle = client.groups.create(specs, on=events, name=name, open=open, key=key or None)
        if wait:
            _ended(handle, limit, view)
        else:
            view.one(handle.get(), SHOWN)


@app.command("add")
def add(
    id: Id,
    tasks: Tasks,
    by: Annotated[
        str,
        typer.Option(
            "--by",
            metavar="TASK",
            help="A member that has not ended: a sealed group takes its tasks.",
            show_default=False,
        ),
    ] = "",
    key: Key = "",
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Add tasks to a group that is open."""
    view = View.of(out, as_json, fields)
    specs = _specs(tasks)
    with connect() as client:
        handle = client.groups.handle(_group_id(client, id))
        handle.add(specs, by=task_id(client, by) if by else None, key=key or None)
        view.one(handle.get(), SHOWN)


@app.command("ls")
def ls(
    state: Annotated[
        str, typer.Option("--state", help="Only groups in this state, e.g. open.", show_default=False)
    ] = "",
    name: Annotated[str, typer.Option("--name", help="Only groups of this name.", show_default=False)] = "",
    limit: Limit = None,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """List groups, newest first; their tasks: `mcpctl tasks ls --group ID`."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        page = min(limit or 500, 500)
        found = client.groups.iter(limit=page, state=state or None, name=name or None)
        view.many(found, COLUMNS, WIDE, limit=limit)


@app.command("get")
def get(id: Id, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Show a group with its tasks counted by state."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.one(client.groups.get(_group_id(client, id)), SHOWN)


@app.command("wait")
def wait_for(id: Id, timeout: Timeout = "", as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Wait for the end of a group and print it; exit code 8 when some of its tasks did not complete."""
    view = View.of(out, as_json, fields)
    limit = seconds(timeout)
    with connect() as client:
        _ended(client.groups.handle(_group_id(client, id)), limit, view)


@app.command("seal")
def seal(id: Id, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Say that no more tasks come: the group ends when all it has have ended."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.one(client.groups.handle(_group_id(client, id)).seal(), SHOWN)


@app.command("cancel")
def cancel(id: Id, reason: Reason = "", as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Cancel all tasks of a group; it ends after the last of them."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        handle = client.groups.handle(_group_id(client, id))
        confirm(f"Cancel the group {handle.id}?")
        view.one(handle.cancel(reason), SHOWN)


@app.command("retry")
def retry(id: Id, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Have the tasks of a group tried again that did not complete: new tasks take their places."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.one(client.groups.handle(_group_id(client, id)).retry(), SHOWN)


def _specs(text: str) -> "list[TaskSpec]":
    import msgspec

    from mcp_control.tasks.model import TaskSpec

    try:
        return msgspec.json.decode(json_bytes(text, "the list of tasks"), type=list[TaskSpec])
    except msgspec.ValidationError as error:
        raise CliError(f"that is no list of tasks: {error}", USAGE, 'write [{"type": "echo", "payload": 1}]') from None


def _event(text: str) -> tuple[Any, Any]:
    import msgspec

    from mcp_control.tasks.group_model import Event
    from mcp_control.tasks.model import TaskSpec

    event, sign, task = text.partition("=")
    known = get_args(Event)
    if not sign or not task or event not in known:
        raise CliError(f"{text!r} is no callback", USAGE, f"write EVENT=TYPE; events are {', '.join(known)}")
    if task[0] not in "{@":
        return event, task
    try:
        return event, msgspec.json.decode(json_bytes(task, "the task"), type=TaskSpec)
    except msgspec.ValidationError as error:
        raise CliError(f"that is no task: {error}", USAGE, 'write \'ended={"type": "report"}\'') from None


def _ended(handle: "GroupHandle", limit: float | None, view: View) -> None:
    from mcp_control.sdk.errors import WaitTimeout

    try:
        found = handle.wait(limit)
    except WaitTimeout:
        raise CliError(f"the group goes on: {handle.id}", TIMED_OUT, f"mcpctl groups wait {handle.id}") from None
    view.one(found, SHOWN)
    if found.state.value != "completed":
        say(
            f"mcpctl: group {found.id} is {found.state.value}\n  next: mcpctl tasks ls --group {found.id} --state failed"
        )
        raise typer.Exit(ENDED_BADLY)


def _group_id(client: "Client", given: str) -> str:
    return whole_id("group", given, (view.id for view in client.groups.iter(limit=500)))
