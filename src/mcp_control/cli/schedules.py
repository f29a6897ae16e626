"""`mcpctl schedules`: work that begins by itself at planned moments."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from mcp_control.cli.connection import connect
from mcp_control.cli.errors import USAGE, CliError
from mcp_control.cli.options import Fields, Json, Labels, Limit, Out, Reason, confirm, json_argument, pairs, seconds
from mcp_control.cli.output import View, say

app = typer.Typer(
    name="schedules",
    help="Work that begins by itself: cron, intervals, single moments; pause, trigger, backfill.",
    no_args_is_help=True,
)
COLUMNS = ("name", "state", "when", "target", "next_at", "last_slot", "fired", "missed")
WIDE = ("id", "last_target", "queued", "reason", "created_at", "created_by")
SHOWN = (*COLUMNS, "last_target", "queued", "active", "backfill", "reason", "created_at", "created_by", "id")
FIRES = ("slot", "outcome", "source", "target", "at", "reason", "message")
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name or id of the schedule.")]


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name of its own.")],
    cron: Annotated[
        str, typer.Option("--cron", metavar="'M H D M W'", help="When, as five cron fields.", show_default=False)
    ] = "",
    every: Annotated[
        str, typer.Option("--every", metavar="TIME", help="When: at intervals (90s, 15m, 1h).", show_default=False)
    ] = "",
    at: Annotated[
        str, typer.Option("--at", metavar="MOMENT", help="When: once (2026-12-31T23:00:00Z).", show_default=False)
    ] = "",
    timezone: Annotated[str, typer.Option("--timezone", metavar="ZONE", help="Of the cron fields.")] = "UTC",
    pipeline: Annotated[str, typer.Option("--pipeline", help="What: a run of this pipeline.", show_default=False)] = "",
    params: Annotated[
        str,
        typer.Option("--params", metavar="JSON", help="Parameters of the run: JSON, @file, or -.", show_default=False),
    ] = "",
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="The run takes no results of earlier runs; those computed are kept anew.")
    ] = False,
    task: Annotated[str, typer.Option("--task", help="What: a task of this type.", show_default=False)] = "",
    payload: Annotated[
        str, typer.Option("--payload", metavar="JSON", help="Of the task: JSON, @file, or -.", show_default=False)
    ] = "",
    label: Labels = None,
    priority: Annotated[
        int | None, typer.Option("--priority", min=0, max=100, help="0 to 100.", show_default=False)
    ] = None,
    overlap: Annotated[
        str, typer.Option("--overlap", help="While earlier work goes on: skip, allow, queue-one, cancel-previous.")
    ] = "skip",
    catch_up: Annotated[
        str, typer.Option("--catch-up", help="Slots that passed while no server ran: none, last, all.")
    ] = "last",
    description: Annotated[str, typer.Option("--description", help="For people.", show_default=False)] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say when it would fire.")] = False,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Make a schedule that starts a pipeline or a task. One that is there already, just so, stays as it is."""
    view = View.of(out, as_json, fields)
    if bool(pipeline) == bool(task):
        raise CliError("say what to start: --pipeline or --task", USAGE)
    spec: dict[str, Any] = {
        "name": name,
        "cron": cron or None,
        "every": seconds(every),
        "at": at or None,
        "timezone": timezone,
        "overlap": overlap,
        "catch_up": catch_up,
        "description": description,
    }
    target: dict[str, Any] = {"labels": pairs(label)}
    if priority is not None:
        target["priority"] = priority
    if no_cache and not pipeline:
        raise CliError("--no-cache goes with --pipeline", USAGE)
    if pipeline:
        target |= {"no_cache": True} if no_cache else {}
        spec["run"] = {"pipeline": pipeline, "params": json_argument(params, "--params") if params else {}, **target}
    else:
        spec["task"] = {"type": task, "payload": json_argument(payload, "--payload") if payload else None, **target}
    with connect() as client:
        if dry_run:
            view.many(client.schedules.check(spec), ("slot", "local"), key="slot")
            return
        view.one(client.schedules.create(spec), SHOWN, key="name")


@app.command("apply")
def apply(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A spec in YAML or JSON; - for standard input.", allow_dash=True)
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say when it would fire.")] = False,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Make a schedule what a file says, whether it is there or not."""
    import yaml

    view = View.of(out, as_json, fields)
    try:
        spec = yaml.safe_load(sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"{file}: {getattr(error, 'strerror', None) or error}", USAGE) from None
    except yaml.YAMLError as error:
        raise CliError(f"not YAML: {error}", USAGE) from None
    if not isinstance(spec, dict):
        raise CliError("a schedule is a mapping with name, when (cron, every or at) and what (run or task)", USAGE)
    with connect() as client:
        if dry_run:
            view.many(client.schedules.check(spec), ("slot", "local"), key="slot")
            return
        view.one(client.schedules.apply(spec), SHOWN, key="name")


@app.command("ls")
def ls(limit: Limit = None, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """List schedules by name."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.many(client.schedules.iter(), COLUMNS, WIDE, key="name", limit=limit)


@app.command("get")
def get(name: Name, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Show a schedule; `-o yaml --fields spec` is what `apply` reads."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.one(client.schedules.get(name), SHOWN, key="name")


@app.command("next")
def next_fires(
    name: Name,
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=100, help="How many.")] = 5,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Show when a schedule fires next, in UTC and in its time zone."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.many(client.schedules.next(name, count), ("slot", "local"), key="slot", limit=0)


@app.command("fires")
def fires(name: Name, limit: Limit = None, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """List what became of a schedule's slots, newest first."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.many(client.schedules.fires(name), FIRES, ("id", "by"), limit=limit)


@app.command("pause")
def pause(name: Name, reason: Reason = "", as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Fire nothing until it is resumed; what runs goes on."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.one(client.schedules.pause(name, reason or None), COLUMNS, key="name")


@app.command("resume")
def resume(name: Name, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Fire again, from the next slot on."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.one(client.schedules.resume(name), COLUMNS, key="name")


@app.command("trigger")
def trigger(
    name: Name,
    key: Annotated[
        str, typer.Option("--key", help="Idempotency key: repeating it starts nothing again.", show_default=False)
    ] = "",
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Start a schedule's work now, beside its slots."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.one(client.schedules.trigger(name, key or None), FIRES, key="target")


@app.command("backfill")
def backfill(
    name: Name,
    since: Annotated[
        str,
        typer.Option("--from", metavar="MOMENT", help="The first slot may lie here (RFC 3339).", show_default=False),
    ] = "",
    to: Annotated[
        str,
        typer.Option("--to", metavar="MOMENT", help="The last slot may lie here. Default: now.", show_default=False),
    ] = "",
    width: Annotated[int, typer.Option("--width", min=1, max=50, help="How many may go on at once.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the slots.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the backfill that is under way.")] = False,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Fire the slots of the past that were not fired, oldest first."""
    view = View.of(out, as_json, fields)
    if stop:
        with connect() as client:
            view.one(client.schedules.stop_backfill(name), COLUMNS, key="name")
        return
    if not since:
        raise CliError("--from is missing", USAGE, "e.g. --from 2026-01-01T00:00:00Z --to 2026-02-01T00:00:00Z")
    first, last = _moment(since, "--from"), _moment(to, "--to") if to else datetime.now(UTC)
    with connect() as client:
        if dry_run:
            found = client.schedules.backfill(name, first, last, width=width, dry_run=True)
            view.many([{"slot": slot.isoformat()} for slot in found.slots or ()], ("slot",), key="slot")
            return
        found = client.schedules.backfill(name, first, last, width=width)
        say(f"{len(found.slots or ())} slots, {width} at once")
        view.one(client.schedules.get(name), SHOWN, key="name")


@app.command("rm")
def rm(name: Name) -> None:
    """Delete a schedule and its history; what it started goes on."""
    confirm(f"Delete the schedule {name}?")
    with connect() as client:
        client.schedules.delete(name)


def _moment(text: str, option: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise CliError(f"{option} {text}: not a moment", USAGE, "write 2026-01-31T02:30:00Z") from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
