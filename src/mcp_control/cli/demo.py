"""`mcpctl demo`: server, agents and the pipeline `techdeck` over a data set, start to end, and everything stopped again."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from mcp_control.cli.errors import FAILED, INTERRUPTED, CliError
from mcp_control.cli.options import Json
from mcp_control.cli.output import View, busy, say
from mcp_control.cli.tether import Tether

if TYPE_CHECKING:
    from mcp_control.sdk.client import Client
    from mcp_control.techdeck.synthetic import Truth

SEED: Final = 20_240
_STOP_SECONDS: Final = 30.0


def demo(
    input: Annotated[
        Path | None,
        typer.Option(
            "--input",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Your data: CSV, JSON, JSON lines or Parquet. Default: generated.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", file_okay=False, help="Where the results go.")
    ] = Path("demo-output"),
    rows: Annotated[int, typer.Option("--rows", min=60, help="Rows to generate.")] = 5000,
    agents: Annotated[int, typer.Option("--agents", min=1, max=16, help="Agent processes.")] = 3,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="A.B=VALUE",
            help="Of the pipeline, e.g. quality.gate=warn; repeatable.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the whole thing: start a server and agents, run `techdeck` over a data set, print what came of it, stop.

    Without --input over generated conversations with planted faults. Exit code 8 when the run failed, e.g. at its quality gate.
    """
    view = View.of(None, as_json, "")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="mcp-control-demo-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            source, truth = (input, None) if input is not None else _generated(folder / "conversations.jsonl", rows)
            with _server(folder, agents) as client:
                code = _run(client, source, truth, output, settings or [], view)
    except KeyboardInterrupt:
        raise CliError("interrupted; everything was stopped", INTERRUPTED) from None
    say("Server and agents are stopped.")
    raise typer.Exit(code)


def _generated(path: Path, rows: int) -> "tuple[Path, Truth]":
    try:
        from mcp_control.techdeck.synthetic import generate
    except ImportError as error:
        raise CliError(
            f"techdeck is not installed: {error}", hint="pip install 'mcp-control-panel[server,techdeck]'"
        ) from None
    with busy(f"Generating {rows:,} conversations with planted faults"):
        return path, generate(path, seed=SEED, n=rows)


@contextmanager
def _server(folder: Path, agents: int) -> "Iterator[Client]":
    """A server with agents as a process of its own; stopped in good order at the end, and should we die."""
    from mcp_control.sdk.client import Client
    from mcp_control.sdk.profiles import FOLDER_VARIABLE, Profiles

    tether = Tether()
    config = folder / "config"
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "mcp_control.cli.main", "up", "--json", "--data", str(folder / "data"), "--port", "0",
                "--host", "127.0.0.1", "--agents", str(agents), "--log-level", "warning", "--config", os.devnull,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=tether.environ(**{FOLDER_VARIABLE: str(config)}),
            pass_fds=(tether.fd,),
            start_new_session=True,
        )  # fmt: skip
    assert process.stdout is not None
    try:
        with busy(f"Starting the server and {agents} agents"):
            line = process.stdout.readline()
        if not line:
            process.wait()
            written = (folder / "server.log").read_text(errors="replace").strip()[-2000:]
            raise CliError(f"the server did not start:\n{written}", FAILED, "`mcpctl doctor` looks for the cause")
        told: dict[str, Any] = json.loads(line)
        token = next(one.token for one in Profiles(config, environ={}).all() if one.url == told["url"])
        say(f"Server: {told['url']}\ndocs: {told['url']}/docs\nagents: {', '.join(told['agents'])}")
        with Client(told["url"], token=token) as client:
            yield client
    finally:
        process.terminate()
        try:
            with busy("Stopping the server and the agents"):
                process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        tether.cut()


def _run(client: "Client", source: Path, truth: "Truth | None", output: Path, settings: list[str], view: View) -> int:
    from mcp_control.cli.pipelines import declared, parameters
    from mcp_control.cli.report import ended, follow

    pipeline = client.pipelines.get("techdeck")
    values = parameters(pipeline.name, declared(pipeline), {}, settings)
    size = os.path.getsize(source)
    say(f"Input: {source if truth is None else 'generated'}, {size / 1e6:,.1f} MB")
    values["input"] = client.artifacts.upload(source, role="input").id
    began = time.monotonic()
    run = follow(client, client.pipelines.run("techdeck", values).id, None)
    took = time.monotonic() - began
    warned = " ".join(["mcpctl demo", *(["--input", str(source)] if truth is None else []), "--set quality.gate=warn"])
    after = f"read {output / 'report.html'}; `{warned}` exports in spite of the gate"
    code = ended(
        client, run, view, output, after if run.reason == "gate-failed" else "`mcpctl up` keeps a server to look closer"
    )
    read = run.stages[0].rows_in or 0
    say(f"\n{read:,} rows in {took:.1f} s ({read / max(took, 1e-9):,.0f} rows/s). Results: {output}")
    if truth is not None:
        found = sum(stage.rejected or 0 for stage in run.stages)
        say(
            f"Of {len(truth.rejects):,} planted bad rows {found:,} were set aside, with reason and line: quarantine.jsonl"
        )
    return code
