"""`mcpctl artifacts`: files that tasks read and write."""

from pathlib import Path
from typing import Annotated

import typer

from mcp_control.cli.connection import artifact_id, connect, run_id
from mcp_control.cli.options import Fields, Json, Limit, Out
from mcp_control.cli.output import View
from mcp_control.cli.report import download as fetch

app = typer.Typer(name="artifacts", help="Files that tasks read and write.", no_args_is_help=True)
COLUMNS = ("id", "name", "role", "size", "rows", "sha256", "created_at")
WIDE = ("media_type", "run_id", "stage", "task_id")
Id = Annotated[str, typer.Argument(metavar="ID", help="Id of an artifact, or the end of one.")]


@app.command("ls")
def ls(
    run: Annotated[str, typer.Option("--run", help="Only artifacts of this run.", show_default=False)] = "",
    name: Annotated[str, typer.Option("--name", help="Only artifacts of this name.", show_default=False)] = "",
    role: Annotated[
        str, typer.Option("--role", help="input, intermediate, output or report.", show_default=False)
    ] = "",
    limit: Limit = None,
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """List artifacts."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        wanted = {"run": run_id(client, run) if run else None, "name": name or None, "role": role or None}
        view.many(client.artifacts.iter(**wanted), COLUMNS, WIDE, limit=limit)


@app.command("get")
def get(id: Id, as_json: Json = False, out: Out = None, fields: Fields = "") -> None:
    """Show what is known of an artifact."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.one(client.artifacts.get(artifact_id(client, id)))


@app.command("upload")
def upload(
    file: Annotated[Path, typer.Argument(help="The file.", exists=True, dir_okay=False)],
    name: Annotated[str, typer.Option("--name", help="Default: the file's.", show_default=False)] = "",
    media_type: Annotated[str, typer.Option("--media-type", help="What it is.")] = "application/octet-stream",
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Store a file."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        view.one(client.artifacts.upload(file, name or None, media_type=media_type, role="input"))


@app.command("download")
def download(
    id: Id,
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="The folder to write it into, under its name.")
    ] = Path(),
    as_json: Json = False,
    out: Out = None,
    fields: Fields = "",
) -> None:
    """Write an artifact's bytes to a file, digest checked."""
    view = View.of(out, as_json, fields)
    with connect() as client:
        found = client.artifacts.get(artifact_id(client, id))
        path = fetch(client, [found], output)[found.id]
        view.one(
            {"id": found.id, "name": found.name, "path": str(path), "sha256": found.sha256, "size": found.size},
            key="path",
        )
