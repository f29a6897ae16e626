"""`mcpctl tasks cancel|pause|resume|retry|reprioritize|reassign`, one task or all that fulfil conditions, and `mcpctl operations`."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from mcp_control.cli.conditions import Where, conditions_from
from mcp_control.cli.connection import agent_name, connect, run_id, task_id
from mcp_control.cli.errors import USAGE, CliError
from mcp_control.cli.options import Fields, Json, Limit, Out, Reason, Timeout, Wait, confirm, seconds
from mcp_control.cli.output import View
from mcp_control.cli.tasks import SHOWN, ended
from mcp_control.cli.tasks import app as tasks_app

if TYPE_CHECKING:
    from mcp_control.sdk.client import Client
    from mcp_control.tasks.operation_model import Preview, Verb

app = typer.Typer(
    name="operations", help="What is done with many tasks at once: how far it is, stop it.", no_args_is_help=True
)
OPERATION: Final = ("id", "verb", "state", "matched", "changed", "refused", "created_at", "finished_at")
_FULL: Final = (*OPERATION, "where", "first", "problems", "reason")
Id = Annotated[str, typer.Argument(metavar="[ID]", help="Id of the task, or its end.", show_default=False)]
OperationId = Annotated[str, typer.Argument(metavar="ID", help="Id of the operation.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say how many tasks there are, and the first of them.")]


AtMost = Annotated[
    int | None,
    typer.Option(
        "--at-most", min=1, help="Do nothing where more tasks than this fulfil the conditions.", show_default=False
    ),
]


def many(
    client: "Client",
    verb: "Verb",
    given: list[str] | None,
    view: View,
    *,
    dry_run: bool = False,
    at_most: int | None = None,
    **options: Any,
) -> None:
    """Do it with all tasks that fulfil conditions: show how many there are, ask, and never act on more than was shown. Raises CliError."""
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
    most = bound_of(found, at_most)
    confirm(f"{verb} {'up to ' if found.more else ''}{most} tasks?")
    view.one(client.operations.run(verb, where, expected_at_most=most, **options), _FULL)


def bound_of(found: "Preview", at_most: int | None) -> int:
    """Return how many tasks may be acted on: as many as were counted, or as the person says. Raises CliError where neither bounds it."""
    if at_most is not None and found.matched > at_most:
        raise CliError(f"{'at least ' if found.more else ''}{found.matched} tasks match, more than {at_most}")
    if not found.more:
        return found.matched
    if at_most is None:
        hint = "narrow the conditions, or say how many it may be: --at-most N"
        raise CliError(f"more than {found.matched} tasks match, too many to be counted", USAGE, hint)
    return at_most


def one_of(id: str, where: list[str] | None, dry_run: bool) -> None:
    """Check that either an id or conditions are given. Raises CliError."""
    if bool(id) == bool(where) or (id and dry_run):
        raise CliError("give either an id or --where; --dry-run goes with --where", USAGE)


def _one_or_many(
    verb: "Verb",
    id: str,
    where: list[str] | None,
    dry_run: bool,
    at_most: int | None,
    view: View,
    reason: str = "",
) -> None:
    one_of(id, where, dry_run)
    options = {"reason": reason} if reason else {}
    with connect() as client:
        if where:
            many(client, verb, where, view, dry_run=dry_run, at_most=at_most, **options)
            return
        handle = client.tasks.handle(task_id(client, id))
        view.one(getattr(handle, verb)(**options), SHOWN)


@tasks_app.command("cancel")
def cancel(
    id: Id = "",
    where: Where = None,
    dry_run: DryRun = False,
    at_most: AtMost = None,
    reason: Reason = "",
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Cancel a task, or all that fulfil conditions: at once when it waits, by telling its agent when it runs."""
    _one_or_many("cancel", id, where, dry_run, at_most, View.of(out, as_json, fields), reason)


@tasks_app.command("pause")
def pause(
    id: Id = "",
    where: Where = None,
    dry_run: DryRun = False,
    at_most: AtMost = None,
    reason: Reason = "",
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Hold a task back, or all that fulfil conditions: no agent gets it until it is resumed; a running attempt goes on."""
    _one_or_many("pause", id, where, dry_run, at_most, View.of(out, as_json, fields), reason)


@tasks_app.command("resume")
def resume(
    id: Id = "",
    where: Where = None,
    dry_run: DryRun = False,
    at_most: AtMost = None,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Let a task go that was held back, or all that fulfil conditions; it waits at its old place."""
    _one_or_many("resume", id, where, dry_run, at_most, View.of(out, as_json, fields))


@tasks_app.command("retry")
def retry(
    id: Id = "",
    where: Where = None,
    dry_run: DryRun = False,
    at_most: AtMost = None,
    wait: Wait = False,
    timeout: Timeout = "",
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Submit a task that has ended once more, as a new one, or all that fulfil conditions."""
    view = View.of(out, as_json, fields)
    limit = seconds(timeout)
    one_of(id, where, dry_run)
    if where and wait:
        raise CliError("--wait goes with an id", USAGE, "mcpctl tasks ls shows the new tasks")
    with connect() as client:
        if where:
            many(client, "retry", where, view, dry_run=dry_run, at_most=at_most)
            return
        handle = client.tasks.handle(task_id(client, id)).retry()
        if not wait:
            view.one(handle.get(), SHOWN)
            return
        raise typer.Exit(ended(handle, limit, view))


@tasks_app.command("reprioritize")
def reprioritize(
    priority: Annotated[str, typer.Argument(metavar="PRIORITY", help="0 to 100, or critical, high, medium, low.")],
    where: Where = None,
    dry_run: DryRun = False,
    at_most: AtMost = None,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Give all tasks that fulfil conditions another priority; what waits moves to its new place."""
    number: int | str = int(priority) if priority.isdigit() else priority
    with connect() as client:
        many(
            client,
            "reprioritize",
            where,
            View.of(out, as_json, fields),
            dry_run=dry_run,
            at_most=at_most,
            priority=number,
        )


@tasks_app.command("reassign")
def reassign(
    agent: Annotated[str, typer.Argument(help="Name or id of the agent.")],
    where: Where = None,
    dry_run: DryRun = False,
    at_most: AtMost = None,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Give all waiting tasks that fulfil conditions to one agent."""
    with connect() as client:
        view = View.of(out, as_json, fields)
        many(client, "reassign", where, view, dry_run=dry_run, at_most=at_most, agent=agent_name(client, agent))


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
