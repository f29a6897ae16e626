"""`mcpctl runs export` and `import`: a finished run as a file, to be kept, shown to others or run again elsewhere."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from mcp_control.cli.connection import connect, run_id
from mcp_control.cli.errors import USAGE, CliError
from mcp_control.cli.options import Fields, Json, Out
from mcp_control.cli.output import View

_CHUNK = 1 << 20
_SECONDS = 600.0


def export(
    id: Annotated[str, typer.Argument(metavar="ID", help="Id of a run that has ended, or the end of one.")],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Default: ID.mcprun here.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a run with its pipeline, tasks, logs, events and artifacts to a file; `mcpctl backup verify` checks one."""
    from mcp_control.sdk.transport import Call

    with connect() as client:
        found = run_id(client, id)
        path = (output or Path(f"{found}.mcprun")).absolute()
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        call = Call(path=f"/runs/{found}/bundle", headers=(("Accept-Encoding", "identity"),), timeout=_SECONDS)
        try:
            with client.transport.stream(call) as response, part.open("wb") as file:
                for chunk in response.iter_raw():
                    file.write(chunk)
            part.replace(path)
        except OSError as error:
            raise CliError(f"{path}: {error.strerror or error}", USAGE) from None
        finally:
            part.unlink(missing_ok=True)
    told = {"run": found, "file": str(path), "bytes": path.stat().st_size}
    View.of(None, as_json, "").one(told, tuple(told), key="file")


def take_in(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A bundle.")],
    replay: Annotated[
        bool,
        typer.Option("--replay", help="Start a new run of the same pipeline with the same parameters and inputs, too."),
    ] = False,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Add the run of a bundle to the server, as it ended where it ran. Ids that are taken there are replaced."""
    from mcp_control.sdk.transport import Call

    view = View.of(out, as_json, fields)
    call = Call(
        method="POST",
        path="/runs/import",
        params=(("replay", "true"),) if replay else (),
        headers=(("Content-Type", "application/octet-stream"),),
        timeout=_SECONDS,
    )
    try:
        with connect() as client, client.transport.stream(call, _chunks(file)) as response:
            body = response.read()
    except OSError as error:
        raise CliError(f"{file}: {error.strerror or error}", USAGE) from None
    imported = json.loads(body)
    if replay:
        view.one(imported, ("run.id", "run.state", "replay.id", "replay.state"), key="replay.id")
    else:
        view.one(imported["run"], ("id", "pipeline", "pipeline_version", "state", "created_at", "finished_at"))


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk
