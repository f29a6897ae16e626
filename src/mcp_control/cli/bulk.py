"""`mcpctl tasks cancel|pause|resume|retry|reprioritize|reassign`, one task or all that fulfil conditions, and `mcpctl operations`."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from mcp_control.cli.conditions import Where, conditions_from
from mcp_control.cli.connection import agent_name, connect, run_id, task_id
from mcp_control.cli.errors import USAGE, CliError
from mcp_control.cli.options import Fields, Json, Limit, Out, Reason, confirm
from mcp_control.cli.output import View
from mcp_control.cli.tasks import SHOWN
from mcp_control.cli.tasks import app as tasks_app

if TYPE_CHECKING:
    from mcp_control.sdk.client import Client
    from mcp_control.tasks.operation_model import Verb

app = typer.Typer(
    name="operations", help="What is done with many tasks at once: how far it is, stop it.", no_args_is_help=True
)
OPERATION: Final = ("id", "verb", "state", "matched", "changed", "refused", "created_at", "finished_at")
_FULL: Final = (*OPERATION, "where", "first", "problems", "reason")
Id = Annotated[str, typer.Argument(metavar="[ID]", help="Id of the task, or its end.", show_default=False)]
OperationId = Annotated[str, typer.Argument(metavar="ID", help="Id of the operation.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say how many tasks there are, and the first of them.")]


def many(
    client: "Client", verb: "Verb", given: list[str] | None, view: View, *, dry_run: bool = False, **options: Any
) -> None:
    """Do it with all tasks that fulfil conditions: show how many there are, ask, and never act on more than was shown."""
    where = conditions_from(given, datetime.now(UTC))
    if not where:
        raise CliError("say which tasks", USAGE, "give an id, or --where (see --help)")
    if "agent" in where:
        where["agent"] = agent_name(client, where["agent"])
    if "run" in where:
        where["run"] = run_id(client, where["run"])
    found = client.operations.preview(verb, where, **options)
    if dry_run:
        view.one(found, ("matched", "more", "first"), key="matched")
        return
    more = "more than " if found.more else ""
    confirm(f"{verb} {more}{found.matched} tasks?")
    bound = {} if found.more else {"expected_at_most": found.matched}
    view.one(client.operations.run(verb, where, **bound, **options), _FULL)


def _one_or_many(verb: "Verb", id: str, where: list[str] | None, dry_run: bool, view: View, reason: str = "") -> None:
    if bool(id) == bool(where) or (id and dry_run):
        raise CliError("give either an id or --where; --dry-run goes with --where", USAGE)
    options = {"reason": reason} if reason else {}
    with connect() as client:
        if where:
            many(client, verb, where, view, dry_run=dry_run, **options)
            return
        handle = client.tasks.handle(task_id(client, id))
        view.one(getattr(handle, verb)(**options), SHOWN)


@tasks_app.command("cancel")
def cancel(
    id: Id = "",
    where: Where = None,
    dry_run: DryRun = False,
    reason: Reason = "",
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Cancel a task, or all that fulfil conditions: at once when it waits, by telling its agent when it runs."""
    _one_or_many("cancel", id, where, dry_run, View.of(out, as_json, fields), reason)


@tasks_app.command("pause")
def pause(
    id: Id = "",
    where: Where = None,
    dry_run: DryRun = False,
    reason: Reason = "",
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Hold a task back, or all that fulfil conditions: no agent gets it until it is resumed; a running attempt goes on."""
    _one_or_many("pause", id, where, dry_run, View.of(out, as_json, fields), reason)


@tasks_app.command("resume")
def resume(
    id: Id = "",
    where: Where = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Let a task go that was held back, or all that fulfil conditions; it waits at its old place."""
    _one_or_many("resume", id, where, dry_run, View.of(out, as_json, fields))


@tasks_app.command("reprioritize")
def reprioritize(
    priority: Annotated[str, typer.Argument(metavar="PRIORITY", help="0 to 100, or critical, high, medium, low.")],
    where: Where = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Give all tasks that fulfil conditions another priority; what waits moves to its new place."""
    number: int | str = int(priority) if priority.isdigit() else priority
    with connect() as client:
        many(client, "reprioritize", where, View.of(out, as_json, fields), dry_run=dry_run, priority=number)


@tasks_app.command("reassign")
def reassign(
    agent: Annotated[str, typer.Argument(help="Name or id of the agent.")],
    where: Where = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Give all waiting tasks that fulfil conditions to one agent."""
    with connect() as client:
        view = View.of(out, as_json, fields)
        many(client, "reassign", where, view, dry_run=dry_run, agent=agent_name(client, agent))


@app.command("ls")
def ls(limit: Limit = None, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """List operations, newest first."""
    with connect() as client:
        page = min(limit or 500, 500)
        View.of(out, as_json, fields).many(client.operations.iter(limit=page), OPERATION, limit=limit)


@app.command("get")
def get(id: OperationId, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Say how far an operation is, and with which tasks it could not be done."""
    with connect() as client:
        View.of(out, as_json, fields).one(client.operations.get(id), _FULL)


@app.command("cancel")
def cancel_operation(id: OperationId, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Do it with no more tasks; what was done stays done."""
    with connect() as client:
        View.of(out, as_json, fields).one(client.operations.cancel(id), _FULL)
