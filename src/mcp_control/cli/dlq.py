"""`mcpctl dlq`: tasks that failed for good."""

from typing import Annotated, Any, Final

import typer

from mcp_control.cli.bulk import AtMost, DryRun, many, one_of
from mcp_control.cli.conditions import Where
from mcp_control.cli.connection import connect, run_id, task_id
from mcp_control.cli.errors import USAGE, CliError
from mcp_control.cli.options import Fields, Json, Labels, Limit, Out, Reason, json_argument, pairs
from mcp_control.cli.output import View, say
from mcp_control.cli.tasks import SHOWN

app = typer.Typer(
    name="dlq",
    help="Dead letters, tasks that failed for good: inspect, have them tried again, discard.",
    no_args_is_help=True,
)
COLUMNS: Final = ("id", "type", "reason", "failure.code", "failure.error_class", "attempt", "finished_at", "message")
WIDE: Final = ("run_id", "stage", "agent_id", "labels", "created_at")
_FULL: Final = (*SHOWN, "failure.error_class", "failure.traceback", "attempts", "needs", "labels", "payload")
Id = Annotated[str, typer.Argument(metavar="ID", help="Id of the task, or its end.")]
MaybeId = Annotated[str, typer.Argument(metavar="[ID]", help="Id of the task, or its end.", show_default=False)]


@app.command("ls")
def ls(
    type: Annotated[str, typer.Option("--type", help="Only tasks of this type.", show_default=False)] = "",
    run: Annotated[str, typer.Option("--run", help="Only tasks of this run.", show_default=False)] = "",
    code: Annotated[str, typer.Option("--code", help="Only with this code of failure.", show_default=False)] = "",
    error_class: Annotated[
        str, typer.Option("--class", help="Only temporary, permanent or critical errors.", show_default=False)
    ] = "",
    after: Annotated[str, typer.Option("--after", metavar="TIME", help="Failed after it.", show_default=False)] = "",
    before: Annotated[str, typer.Option("--before", metavar="TIME", help="Failed before it.", show_default=False)] = "",
    label: Labels = None,
    limit: Limit = None,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """List dead letters, newest first."""
    with connect() as client:
        wanted: dict[str, Any] = {
            "type": type or None,
            "run": run_id(client, run) if run else None,
            "code": code or None,
            "error_class": error_class or None,
            "ended_after": after or None,
            "ended_before": before or None,
            "label": pairs(label) or None,
        }
        found = client.dead_letters.iter(limit=min(limit or 500, 500), **wanted)
        View.of(out, as_json, fields).many(found, COLUMNS, WIDE, limit=limit)


@app.command("show")
def show(id: Id, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Show a dead letter with its attempts, errors and payload."""
    with connect() as client:
        View.of(out, as_json, fields).one(client.dead_letters.get(task_id(client, id)), _FULL)


@app.command("replay")
def replay(
    id: MaybeId = "",
    payload: Annotated[
        str, typer.Option("--payload", metavar="JSON", help="Another payload: JSON, @file, or -.", show_default=False)
    ] = "",
    needs: Annotated[
        str, typer.Option("--needs", metavar="JSON", help="Other needs: JSON, @file, or -.", show_default=False)
    ] = "",
    where: Where = None,
    dry_run: DryRun = False,
    at_most: AtMost = None,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Have a dead letter tried again as a new task, changed where asked for, or all that fulfil conditions as they are."""
    view = View.of(out, as_json, fields)
    one_of(id, where, dry_run)
    if where and (payload or needs):
        raise CliError("changes go with an id", USAGE)
    with connect() as client:
        if where:
            many(client, "replay", where, view, dry_run=dry_run, at_most=at_most)
            return
        edit: dict[str, Any] = {}
        if payload:
            edit["payload"] = json_argument(payload, "--payload")
        if needs:
            edit["needs"] = json_argument(needs, "--needs")
        view.one(client.dead_letters.replay(task_id(client, id), **edit), ("id", "type", "state", "retry_of"))


@app.command("discard")
def discard(
    id: MaybeId = "",
    where: Where = None,
    dry_run: DryRun = False,
    at_most: AtMost = None,
    reason: Reason = "",
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Take a task out of the set, or all that fulfil conditions; they stay among the finished tasks."""
    view = View.of(out, as_json, fields)
    one_of(id, where, dry_run)
    options = {"reason": reason} if reason else {}
    with connect() as client:
        if where:
            many(client, "discard", where, view, dry_run=dry_run, at_most=at_most, **options)
            return
        view.one(client.dead_letters.discard(task_id(client, id), reason), SHOWN)


@app.command("parked")
def parked(
    remove: Annotated[
        str, typer.Option("--remove", metavar="ID", help="Remove this one for good.", show_default=False)
    ] = "",
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """List stored tasks that cannot be decoded; they are out of everybody's way until somebody removes them."""
    with connect() as client:
        if remove:
            client.dead_letters.remove_parked(remove)
            say(f"removed {remove}")
            return
        View.of(out, as_json, fields).many(client.dead_letters.parked(), ("id", "type", "run_id", "bytes"))
