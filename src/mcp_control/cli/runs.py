"""`mcpctl runs`: executions of pipelines."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcp_control.cli.budgets import (
    Attempts,
    Calls,
    Depth,
    Money,
    OnExhausted,
    Tokens,
    WallSeconds,
    edit_from,
    show_or_edit,
)
from mcp_control.cli.connection import connect, run_id
from mcp_control.cli.errors import USAGE, CliError
from mcp_control.cli.options import Fields, Json, Limit, Out, Reason, ResultsTo, Timeout, Wait, json_argument, seconds
from mcp_control.cli.output import View, plain, write_json
from mcp_control.cli.report import download, ended, follow, report, results, show_report

if TYPE_CHECKING:
    from mcp_control.pipelines.view_model import RunView
    from mcp_control.sdk.client import Client

app = typer.Typer(
    name="runs", help="Executions of pipelines: watch, pause, cancel, retry, fetch results.", no_args_is_help=True
)
COLUMNS = ("id", "pipeline", "pipeline_version", "state", "progress", "created_at", "finished_at", "reason")
WIDE = ("message", "labels", "summary", "round")
TASKS = ("id", "type", "stage", "item", "state", "attempt", "progress", "agent_id", "message")
SIGNAL = ("id", "name", "at", "by", "stage")
FILES = ("id", "name", "role", "size", "rows", "sha256")
Id = Annotated[str, typer.Argument(metavar="ID", help="Id of a run, or the end of one.")]
Output = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="Download the results there.", show_default=False)
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Another value for a parameter; repeatable.", show_default=False),
]


@app.command("ls")
def ls(
    state: Annotated[str, typer.Option("--state", help="Only runs in this state.", show_default=False)] = "",
    pipeline: Annotated[str, typer.Option("--pipeline", help="Only runs of this pipeline.", show_default=False)] = "",
    limit: Limit = None,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """List runs, newest first."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.many(client.runs.iter(state=state or None, pipeline=pipeline or None), COLUMNS, WIDE, limit=limit)


@app.command("get")
def get(id: Id, output: Output = None, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Show a run as it stands: stages, rows, quality, files."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        run = client.runs.get(run_id(client, id))
        paths = download(client, results(client, run.id), output) if output is not None else None
        show_report(view, run, report(client, run, paths))


@app.command("watch")
def watch(
    id: Id, output: Output = None, timeout: Timeout = "", as_json: Json = False, out: Out = None, fields: Fields = ""
) -> None:
    """Follow a run to its end and print it; exit code 8 when it failed."""
    view = View.of(out, as_json, fields)
    limit = seconds(timeout)
    with connect() as client:
        found = run_id(client, id)
        raise typer.Exit(ended(client, follow(client, found, limit), view, output))


@app.command("tasks")
def tasks(id: Id, limit: Limit = None, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """List the tasks of a run."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.many(client.runs.handle(run_id(client, id)).tasks(), TASKS, ("reason", "created_at"), limit=limit)


@app.command("explain")
def explain(
    id: Id,
    stage: Annotated[str, typer.Option("--stage", metavar="NAME", help="Only this stage.", show_default=False)] = "",
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Say why a run is not further: the first reason, who holds it, since when; then the same for each stage that has not ended."""
    view = View.of(out, as_json, fields)
    shown = ("code", "message", "since", "expected_start", "held_by")
    with connect() as client:
        run = client.runs.handle(run_id(client, id))
        if stage:
            view.one(run.explain_stage(stage), ("stage", "state", *shown), key="stage")
        else:
            found = run.explain()
            view.one(found, ("run_id", "state", *shown), key="run_id")
            if found.stages and view.format in ("table", "wide"):
                view.many(found.stages, ("stage", "state", "code", "message", "expected_start"), ("since", "held_by"))


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
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Show what all tasks of a run may use and have used; with limits, set (N) or raise (+N) them."""
    view = View.of(out, as_json, fields)
    limits = {"wall_seconds": wall_seconds, "attempts": attempts, "calls": calls, "tokens": tokens, "money": money}
    edit = edit_from(limits, depth, on_exhausted)
    with connect() as client:
        show_or_edit(client, run_id(client, id), edit, view)


@app.command("artifacts")
def artifacts(
    id: Id,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="Download outputs and reports there.", show_default=False),
    ] = None,
    limit: Limit = None,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """List what a run stored; with --output, download its outputs and reports and list those."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        found = run_id(client, id)
        if output is None:
            view.many(
                client.runs.handle(found).artifacts(),
                FILES,
                ("stage", "task_id", "media_type", "created_at"),
                limit=limit,
            )
            return
        kept = results(client, found)
        paths = download(client, kept, output)
        lines = [{"name": one.name, "path": str(paths[one.id]), "sha256": one.sha256, "rows": one.rows} for one in kept]
        view.many(lines, ("name", "rows", "sha256", "path"), key="path", limit=limit)


@app.command("output")
def output(id: Id, stage: Annotated[str, typer.Argument(help="Name of the stage.")]) -> None:
    """Print the output of a stage as JSON."""
    with connect() as client:
        write_json(client.runs.handle(run_id(client, id)).output(stage))


@app.command("pause")
def pause(id: Id, reason: Reason = "", as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Start nothing further; what runs goes on."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.one(client.runs.handle(run_id(client, id)).pause(reason or None), COLUMNS)


@app.command("resume")
def resume(id: Id, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Go on after a pause."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.one(client.runs.handle(run_id(client, id)).resume(), COLUMNS)


@app.command("cancel")
def cancel(id: Id, reason: Reason = "", as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Cancel a run and its tasks."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.one(client.runs.handle(run_id(client, id)).cancel(reason or None), COLUMNS)


@app.command("signal")
def signal(
    id: Id,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the signal.")],
    body: Annotated[str, typer.Option("--body", metavar="JSON", help="JSON, @file, or -.", show_default=False)] = "",
    key: Annotated[
        str, typer.Option("--key", help="Idempotency key: the same one is the same signal.", show_default=False)
    ] = "",
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Send a run the signal that a stage waits for, now or later."""
    view = View.of(out, as_json, fields)
    given = json_argument(body, "--body") if body else None
    with connect() as client:
        view.one(client.runs.handle(run_id(client, id)).signal(name, given, key=key or None), SIGNAL)


@app.command("signals")
def signals(id: Id, limit: Limit = None, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """List the signals a run got, the first one first."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.many(client.runs.handle(run_id(client, id)).signals(), SIGNAL, limit=limit)


@app.command("retry")
def retry(
    id: Id,
    from_stage: Annotated[
        str,
        typer.Option(
            "--from", "--from-stage", help="Go back to this stage. Default: the failed ones.", show_default=False
        ),
    ] = "",
    settings: Changes = None,
    reason: Reason = "",
    wait: Wait = False,
    timeout: Timeout = "",
    output: ResultsTo = None,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Repeat a failed or cancelled run from where it failed, or from a stage, also with other parameters."""
    view = View.of(out, as_json, fields)
    limit = seconds(timeout)
    with connect() as client:
        found = run_id(client, id)
        changed = _changed(client, client.runs.get(found), settings) if settings else None
        view_of_run = client.runs.handle(found).retry(from_stage or None, params=changed, reason=reason or None)
        if not wait:
            view.one(view_of_run, COLUMNS)
            return
        raise typer.Exit(ended(client, follow(client, found, limit), view, output))


@app.command("rerun-rejected")
def rerun_rejected(
    id: Id,
    fixed: Annotated[
        Path | None,
        typer.Option(
            "--fixed", metavar="FILE", help="The corrected records. Default: as they were.", show_default=False
        ),
    ] = None,
    settings: Changes = None,
    wait: Wait = False,
    timeout: Timeout = "",
    output: ResultsTo = None,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Start a run over what another one set aside: the rejected records, or their corrected form."""
    view = View.of(out, as_json, fields)
    limit = seconds(timeout)
    if fixed is not None and not fixed.is_file():
        raise CliError(f"--fixed {fixed}: no such file", USAGE)
    with connect() as client:
        found = run_id(client, id)
        changed = _changed(client, client.runs.get(found), settings) if settings else None
        corrected = None if fixed is None else client.artifacts.upload(fixed, role="input").id
        handle = client.runs.handle(found).rerun_rejected(fixed=corrected, params=changed)
        if not wait:
            view.one(handle.get(), COLUMNS)
            return
        raise typer.Exit(ended(client, follow(client, handle.id, limit), view, output))


def _changed(client: "Client", run: "RunView", settings: list[str]) -> dict[str, Any]:
    """Return the parameters of a run that these settings change, with their new values."""
    from mcp_control.cli.pipelines import declared, parameters

    before = plain(run.params or {})
    pipeline = client.pipelines.get(run.pipeline, run.pipeline_version)
    after = parameters(run.pipeline, declared(pipeline), before, settings)
    return {name: value for name, value in after.items() if name not in before or before[name] != value}
