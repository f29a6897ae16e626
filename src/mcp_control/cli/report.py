"""A run as the command line tells it: one object, its files, its progress while it goes on."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mcp_control.cli.errors import ENDED_BADLY, INTERRUPTED, OK, TIMED_OUT, CliError
from mcp_control.cli.output import View, cell, safe, say, tabbed, table, write_json

if TYPE_CHECKING:
    from mcp_control.artifacts.model import ArtifactView
    from mcp_control.pipelines.view_model import RunView, StageView
    from mcp_control.sdk.client import Client

_KEPT_ROLES: Final = ("output", "report")
_TERMINAL_POLL: Final = 0.25
_PIPED_POLL: Final = 1.0
_COUNTS: Final = ("rows_in", "rows_out", "rejected")
_PAGE: Final = "report.html"
_SHORT: Final = 12


def results(client: "Client", run_id: str) -> list["ArtifactView"]:
    """Return the files that a run made for people: of each name the newest, by name."""
    newest: dict[str, ArtifactView] = {}
    for role in _KEPT_ROLES:
        for view in client.artifacts.iter(run=run_id, role=role, limit=500):
            if view.name not in newest or newest[view.name].id < view.id:
                newest[view.name] = view
    return [newest[name] for name in sorted(newest)]


def report(client: "Client", view: "RunView", paths: dict[str, Path] | None = None) -> dict[str, Any]:
    """Return the one object that describes a run; `paths` are the local files of artifacts by id, None where there is none."""
    quality = view.summary.get("quality")
    known: dict[str, Any] = quality if isinstance(quality, dict) else {}
    return {
        "run_id": view.id,
        "state": view.state.value,
        "stages": [
            {
                "name": stage.name,
                "state": stage.state.value,
                "rows_in": stage.rows_in,
                "rows_out": stage.rows_out,
                "rejected": stage.rejected,
            }
            for stage in view.stages
        ],
        "quality": {"score": known.get("score"), "gate": known.get("gate")},
        "artifacts": [
            {
                "name": artifact.name,
                "path": str(paths[artifact.id]) if paths and artifact.id in paths else None,
                "sha256": artifact.sha256,
                "rows": artifact.rows,
            }
            for artifact in results(client, view.id)
        ],
    }


def download(client: "Client", artifacts: list["ArtifactView"], folder: Path) -> dict[str, Path]:
    """Write artifacts into a folder under their names, digests checked; returns the files by id. Raises CliError, DigestMismatch."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(f"{folder}: {error.strerror}") from None
    found: dict[str, Path] = {}
    for artifact in artifacts:
        target = (folder / file_name(artifact.name, artifact.id)).absolute()
        try:
            client.artifacts.download(artifact.id, target)
        except OSError as error:
            raise CliError(f"{target}: {error.strerror or error}") from None
        found[artifact.id] = target
    return found


def file_name(name: str, id: str) -> str:
    """Return a name for a file in a folder of ours, whatever the artifact is called. Pure."""
    last = name.replace("\\", "/").rpartition("/")[2].strip()
    return last if last not in ("", ".", "..") and "\0" not in last else id


def follow(client: "Client", run_id: str, timeout: float | None) -> "RunView":
    """Wait for the end of a run and show its progress on standard error. Raises CliError when interrupted or timed out."""
    from mcp_control.pipelines.model import RUN_FINAL
    from mcp_control.sdk import calls

    ends_at = None if timeout is None else time.monotonic() + timeout
    shown = _bars() if sys.stderr.isatty() else _lines()
    poll = _TERMINAL_POLL if sys.stderr.isatty() else _PIPED_POLL
    try:
        while True:
            left = poll if ends_at is None else max(0.0, min(poll, ends_at - time.monotonic()))
            view = client.do(calls.get_run(run_id, left))
            shown(view)
            if view.state in RUN_FINAL:
                return view
            if ends_at is not None and time.monotonic() >= ends_at:
                raise CliError(
                    f"run {run_id} has not ended after {timeout:g} s", TIMED_OUT, f"mcpctl runs watch {run_id}"
                )
    except KeyboardInterrupt:
        hint = f"`mcpctl runs watch {run_id}` follows it, `mcpctl runs cancel {run_id}` ends it"
        raise CliError(f"the run goes on: {run_id}", INTERRUPTED, hint) from None
    finally:
        shown(None)


Show = Callable[["RunView | None"], None]


def _lines() -> Show:
    """Plain progress: a line for each stage that starts or ends."""
    told: dict[str, str] = {}

    def show(view: "RunView | None") -> None:
        for stage in view.stages if view else ():
            state = stage.state.value
            if told.get(stage.name, "pending") not in (state, "ready"):
                say(" ".join(part for part in (stage.name, state, _rows(stage), stage.message) if part))
            told[stage.name] = state

    return show


def _rows(stage: "StageView") -> str:
    if stage.rows_in is None:
        return ""
    return f"{stage.rows_in:,} rows in, {stage.rows_out or 0:,} out, {stage.rejected or 0:,} rejected"


def _bars() -> Show:
    """Progress on a terminal: a bar for each stage with rows, rows per second and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    # 80 columns are enough; a wider terminal gets wider bars.
    bars = Progress(
        TextColumn("{task.fields[name]:<18}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[rows]:>13}"),
        TextColumn("{task.fields[rate]:>13}"),
        TextColumn("{task.fields[state]:>11}"),
        console=Console(stderr=True),
        expand=True,
    )
    places: dict[str, Any] = {}
    bars.start()

    def show(view: "RunView | None") -> None:
        if view is None:
            bars.stop()
            return
        for stage in view.stages:
            if stage.name not in places:
                places[stage.name] = bars.add_task("", total=1.0, name=stage.name, state="", rows="", rate="")
            rows = stage.rows_out if stage.rows_out is not None else stage.counts.get("rows_out")
            bars.update(
                places[stage.name],
                completed=stage.progress,
                state=_time_left(stage) or stage.state.value,
                rows="" if rows is None else f"{rows:,} rows",
                rate="" if not stage.rate else f"{stage.rate:,.0f} rows/s",
            )

    return show


def _time_left(stage: "StageView") -> str:
    if stage.eta is None or stage.finished_at is not None:
        return ""
    from datetime import UTC, datetime

    left = max(0, round((stage.eta - datetime.now(UTC)).total_seconds()))
    return f"{left // 60}:{left % 60:02d} left"


def show_report(view: View, run: "RunView", found: dict[str, Any]) -> None:
    """Print a run: the one object where a format was asked for, else its verdict, stages and files."""
    if view.format not in ("table", "wide") or view.fields:
        view.one(found, key="run_id")
        return
    on_terminal = sys.stdout.isatty()
    lines = _verdict(found["state"], found["quality"], on_terminal)
    if run.reason and found["state"] != "completed":
        lines.append(f"Reason: {run.reason}: {run.message}")
    lines += [f"Report: {_near(file['path'])}" for file in found["artifacts"] if file["name"] == _PAGE and file["path"]]
    lines.append(f"Run: {found['run_id']}")
    sys.stdout.write("".join(safe(line) + "\n" for line in lines) + "\n")
    stages = [
        [stage["name"], stage["state"], *(_number(stage[name], on_terminal) for name in _COUNTS)]
        for stage in found["stages"]
    ]
    head = ["STAGE", "STATE", "ROWS IN", "ROWS OUT", "REJECTED"]
    if on_terminal:
        table(head, stages, numbers=(2, 3, 4))
    else:
        tabbed(head, stages)
    if found["artifacts"]:
        sys.stdout.write("\n")
        _show_files(found["artifacts"], on_terminal)
    sys.stdout.flush()


def _verdict(state: str, quality: dict[str, Any], on_terminal: bool) -> list[str]:
    said = [state]
    if quality["gate"]:
        score, gate = quality["score"], quality["gate"]
        # Two places are for reading; where the gate was not passed they could hide by how little.
        places = 2 if on_terminal and gate == "passed" else 4
        said += ["score none" if score is None else f"score {score:.{places}f}", f"gate {gate}"]
    return ["  ".join(said)]


def _show_files(files: list[dict[str, Any]], on_terminal: bool) -> None:
    """A terminal gets the names in the folder and the beginning of the digests; programs get all of both."""
    if on_terminal:
        lines = [
            [safe(Path(file["path"] or file["name"]).name), _number(file["rows"], True), file["sha256"][:_SHORT]]
            for file in files
        ]
        table(["FILE", "ROWS", "SHA-256"], lines, numbers=(1,))
    else:
        whole = [[cell(file["name"]), cell(file["rows"]), file["sha256"], file["path"] or ""] for file in files]
        tabbed(["FILE", "ROWS", "SHA-256", "PATH"], whole)


def _number(value: int | None, on_terminal: bool) -> str:
    return "" if value is None else f"{value:,}" if on_terminal else str(value)


def _near(path: str) -> str:
    """Return a path as seen from here where it is below."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def ended(client: "Client", run: "RunView", view: View, folder: Path | None, after: str = "") -> int:
    """Print a run that has ended, its files downloaded first where a folder is given; returns the exit code.

    `after` is what to do next when it failed; by default what a server that goes on permits.
    """
    paths = download(client, results(client, run.id), folder) if folder is not None else None
    show_report(view, run, report(client, run, paths))
    if run.state.value == "completed":
        return OK
    say(f"mcpctl: run {run.id} is {run.state.value}: {run.reason}: {run.message}{_failed_stage(run)}")
    say(f"  next: {after or _advice(run)}")
    return ENDED_BADLY


def _failed_stage(run: "RunView") -> str:
    return "".join(
        f"\n  {stage.name}: {stage.reason}: {stage.message}" for stage in run.stages if stage.state.value == "failed"
    )


def _advice(run: "RunView") -> str:
    if run.reason == "gate-failed":
        return "read report.html; `--set quality.gate=warn` exports anyway and says so"
    return f"`mcpctl runs tasks {run.id} -o wide` shows what failed, `mcpctl runs retry {run.id}` repeats the failed stages"


def started(view: View, run_id: str) -> None:
    """Say which run was started, at once."""
    if view.format in ("table", "wide") and not view.fields:
        sys.stdout.write(run_id + "\n")
        say(f"`mcpctl runs watch {run_id}` follows it")
    elif view.format == "json":
        write_json({"run_id": run_id})
    else:
        view.one({"run_id": run_id}, key="run_id")
