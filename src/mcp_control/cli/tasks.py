"""`mcpctl tasks`: work, one piece at a time."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcp_control.cli.budgets import (
    Attempts,
    BudgetTexts,
    Calls,
    Depth,
    Money,
    OnExhausted,
    Tokens,
    WallSeconds,
    budget_from,
    edit_from,
    show_or_edit,
)
from mcp_control.cli.connection import agent_name, connect, task_id
from mcp_control.cli.errors import ENDED_BADLY, INTERRUPTED, OK, TIMED_OUT, CliError
from mcp_control.cli.options import (
    Fields,
    Json,
    Labels,
    Limit,
    Out,
    Timeout,
    Wait,
    json_bytes,
    needs_from,
    pairs,
    seconds,
)
from mcp_control.cli.output import View, cell, plain, safe, say, write_json

if TYPE_CHECKING:
    from mcp_control.sdk.tasks import TaskHandle
    from mcp_control.tasks.model import LogLine
from mcp_control.tasks.view_model import TaskView

app = typer.Typer(name="tasks", help="Work, one piece at a time: submit, watch, explain, cancel.", no_args_is_help=True)
COLUMNS = ("id", "type", "state", "priority", "progress", "attempt", "agent_id", "created_at", "message")
WIDE = ("run_id", "stage", "item", "group_id", "reason", "state_since", "labels", "progress_message")
SHOWN = (
    "id", "type", "state", "reason", "message", "progress", "progress_message", "attempt", "agent_id", "created_at", "started_at",
    "finished_at", "run_id", "stage", "result", "failure.code", "failure.message",
)  # fmt: skip
Id = Annotated[str, typer.Argument(metavar="ID", help="Id of a task, or the end of one.")]


@app.command("submit")
def submit(
    type: Annotated[str, typer.Argument(metavar="TYPE", help="The task type, a capability of some agent.")],
    payload: Annotated[
        str, typer.Option("--payload", "-p", metavar="JSON", help="JSON, @file, or - for standard input.")
    ] = "null",
    priority: Annotated[
        str, typer.Option("--priority", help="0 to 100, or critical, high, medium, low.", show_default=False)
    ] = "",
    key: Annotated[
        str, typer.Option("--key", help="Idempotency key: repeating it returns the first task.", show_default=False)
    ] = "",
    share: Annotated[
        str, typer.Option("--share", metavar="KEY", help="Whose share of the slots it takes.", show_default=False)
    ] = "",
    weight: Annotated[
        float, typer.Option("--weight", min=0.1, max=100, help="The part of its share in relation to others.")
    ] = 1.0,
    label: Labels = None,
    agent: Annotated[str, typer.Option("--agent", help="Only this agent may take it.", show_default=False)] = "",
    slots: Annotated[
        int, typer.Option("--slots", min=1, help="How many slots of its agent it takes.", show_default=False)
    ] = 1,
    resources: Annotated[
        list[str] | None,
        typer.Option(
            "--resource", metavar="NAME=N", help="cpu, memory_mb or gpu it takes; repeatable.", show_default=False
        ),
    ] = None,
    sticky: Annotated[
        str, typer.Option("--sticky", metavar="KEY", help="Where others with this key are done.", show_default=False)
    ] = "",
    hard: Annotated[bool, typer.Option("--hard", help="With --sticky: wait for that agent.")] = False,
    balancing: Annotated[
        str,
        typer.Option("--balancing", help="least_loaded, fastest or round_robin, for this task.", show_default=False),
    ] = "",
    delay: Annotated[
        str, typer.Option("--delay", metavar="TIME", help="Not before this time from now.", show_default=False)
    ] = "",
    deadline: Annotated[
        str,
        typer.Option("--deadline", metavar="TIME", help="Ends `expired` after this time from now.", show_default=False),
    ] = "",
    attempt_timeout: Annotated[
        str, typer.Option("--attempt-timeout", metavar="TIME", help="What one attempt may take.", show_default=False)
    ] = "",
    retries: Annotated[
        int | None, typer.Option("--retries", min=0, help="Attempts after the first one.", show_default=False)
    ] = None,
    budget: BudgetTexts = None,
    wait: Wait = False,
    timeout: Timeout = "",
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Submit a task. It is durable when this returns; with --wait, print it when it has ended."""
    import msgspec

    from mcp_control.tasks.model import Fairness

    view = View.of(out, as_json, fields)
    limit = seconds(timeout)
    options: dict[str, Any] = {
        "priority": int(priority) if priority.isdigit() else priority or None,
        "fairness": Fairness(key=share, weight=weight) if share or weight != 1.0 else None,
        "key": key or None,
        "labels": pairs(label) or None,
        "run_at": seconds(delay),
        "deadline": seconds(deadline),
        "timeout": seconds(attempt_timeout),
        "retries": retries,
        "budget": budget_from(budget),
    }
    body = msgspec.Raw(json_bytes(payload, "--payload"))
    if agent or slots > 1 or resources or sticky or balancing:
        options["needs"] = needs_from(agent, slots, pairs(resources), sticky, hard, balancing)
    with connect() as client:
        handle = client.tasks.submit(
            type, body, **{name: value for name, value in options.items() if value is not None}
        )
        if not wait:
            view.one(handle.get(), ("id", "type", "state"))
            return
        raise typer.Exit(ended(handle, limit, view))


@app.command("ls")
def ls(
    state: Annotated[
        str, typer.Option("--state", help="Only tasks in this state, e.g. failed.", show_default=False)
    ] = "",
    type: Annotated[str, typer.Option("--type", help="Only tasks of this type.", show_default=False)] = "",
    run: Annotated[str, typer.Option("--run", help="Only tasks of this run.", show_default=False)] = "",
    group: Annotated[str, typer.Option("--group", help="Only tasks of this group.", show_default=False)] = "",
    agent: Annotated[str, typer.Option("--agent", help="Only tasks of this agent.", show_default=False)] = "",
    label: Labels = None,
    order: Annotated[str, typer.Option("--order", help="desc: newest first; asc: oldest first.")] = "desc",
    limit: Limit = None,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """List tasks, newest first."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        wanted: dict[str, Any] = {
            "state": state or None,
            "type": type or None,
            "run": run or None,
            "group": group or None,
            "label": pairs(label) or None,
        }
        if agent:
            wanted["agent"] = agent_name(client, agent)
        page = min(limit or 500, 500)
        view.many(client.tasks.iter(limit=page, order=order, **wanted), COLUMNS, WIDE, limit=limit)


@app.command("get")
def get(id: Id, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Show a task with its payload, result and attempts."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.one(client.tasks.get(task_id(client, id)), SHOWN)


@app.command("watch")
def watch(id: Id, timeout: Timeout = "", as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Follow a task's progress and log lines, and print it when it has ended; exit code 8 when it failed."""
    view = View.of(out, as_json, fields)
    limit = seconds(timeout)
    with connect() as client:
        handle = client.tasks.handle(task_id(client, id))
        if limit is None:
            try:
                for update in handle.stream():
                    if update.line is not None:
                        say(_line(update.line))
                    else:
                        say(f"{update.state.value}  {update.progress:.0%}  {update.message}".rstrip())
            except KeyboardInterrupt:
                raise _left(handle.id) from None
        raise typer.Exit(ended(handle, limit, view))


@app.command("logs")
def logs(
    id: Id,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the task has ended.")] = False,
    as_json: Json = False,
) -> None:
    """Print a task's log lines."""
    with connect() as client:
        for line in client.tasks.handle(task_id(client, id)).logs(follow):
            if as_json:
                write_json(plain(line))
            else:
                sys.stdout.write(_line(line) + "\n")
                sys.stdout.flush()


@app.command("budget")
def budget(
    id: Id,
    wall_seconds: WallSeconds = "",
    attempts: Attempts = "",
    calls: Calls = "",
    tokens: Tokens = "",
    money: Money = "",
    depth: Depth = None,
    on_exhausted: OnExhausted = "",
    refuse: Annotated[
        bool, typer.Option("--refuse", help="Say no to a task that waits for its budget: it fails.")
    ] = False,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Show what a task may use and has used; with limits, set (N) or raise (+N) them, and what waits for them goes on."""
    from mcp_control.sdk import calls as requests

    view = View.of(out, as_json, fields)
    limits = {"wall_seconds": wall_seconds, "attempts": attempts, "calls": calls, "tokens": tokens, "money": money}
    edit = edit_from(limits, depth, on_exhausted)
    with connect() as client:
        found = task_id(client, id)
        if refuse:
            view.one(client.do(requests.refuse_budget(found)), SHOWN)
        else:
            show_or_edit(client, found, edit, view)


@app.command("assign")
def assign(
    id: Id,
    agent: Annotated[str, typer.Argument(help="Name or id of the agent.")],
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Give a waiting task to one agent."""
    from mcp_control.sdk import calls

    view = View.of(out, as_json, fields)
    with connect() as client:
        view.one(client.do(calls.task_verb(task_id(client, id), "assign", agent=agent_name(client, agent))), SHOWN)


@app.command("statistics")
def statistics(limit: Limit = None, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """List task types: how many attempts completed and failed, and seconds that half, 90 % and 99 % of them took at most."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        columns = ("type", "completed", "failed", "p50", "p90", "p99", "updated_at")
        view.many(client.tasks.statistics(), columns, key="type", limit=limit)


@app.command("explain")
def explain(id: Id, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Say why a task is not running, and what it waits for."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.one(client.tasks.explain(task_id(client, id)), key="task_id")


def ended(handle: "TaskHandle", timeout: float | None, view: View) -> int:
    """Wait, print the task, and return the exit code."""
    try:
        found = handle.wait(timeout)
    except KeyboardInterrupt:
        raise _left(handle.id) from None
    except TimeoutError:
        raise CliError(
            f"task {handle.id} has not ended after {timeout:g} s", TIMED_OUT, f"mcpctl tasks watch {handle.id}"
        ) from None
    view.one(found, SHOWN)
    return _verdict(found)


def _verdict(found: "TaskView") -> int:
    if found.state.value == "completed":
        return OK
    failure = (
        f": {found.failure.code}: {found.failure.message}"
        if found.failure
        else f": {found.reason} {found.message}".rstrip()
    )
    say(f"mcpctl: task {found.id} is {found.state.value}{failure}\n  next: mcpctl tasks logs {found.id}")
    return ENDED_BADLY


def _left(id: str) -> CliError:
    return CliError(
        f"the task goes on: {id}",
        INTERRUPTED,
        f"`mcpctl tasks watch {id}` follows it, `mcpctl tasks cancel {id}` ends it",
    )


def _line(line: "LogLine") -> str:
    from mcp_control.kernel.clock import to_datetime

    more = "".join(f" {name}={cell(value)}" for name, value in (line.fields or {}).items())
    return f"{to_datetime(line.at).isoformat(timespec='milliseconds')} {line.level:7} {safe(line.message)}{more}"
