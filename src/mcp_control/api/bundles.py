"""Routes of bundles: a finished run as a file, and back."""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import msgspec

from mcp_control.api.call import Call, Reply, reply
from mcp_control.api.query import Query
from mcp_control.api.routing import Endpoint
from mcp_control.archive.bundle import Bundles
from mcp_control.pipelines.view_model import RunView

_CHUNK: Final = 1 << 20


class ImportQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`replay` starts a new run of the same pipeline with the same parameters and inputs beside the one that was taken in."""

    replay: bool = False


class Imported(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The run that was taken in, and the one that was started where that was asked for."""

    run: RunView
    replay: RunView | None = None


_IMPORT: Final = Query(ImportQuery)


def _bundles(call: Call) -> Bundles:
    services = call.services
    return Bundles(
        services.store, services.artifacts, services.pipelines, services.clock, services.ids, services.version
    )


def _scratch(call: Call) -> "tempfile.TemporaryDirectory[str]":
    """Return a folder for one bundle; in the data folder, which has space for artifacts, readable by its owner alone."""
    folder = call.services.settings.data
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix="bundle-", dir=folder)


async def export_run(call: Call) -> Reply:
    """Return a run that has ended as a bundle: with its pipeline, tasks, logs, events and artifacts."""
    run_id = call.params["run_id"]
    scratch = _scratch(call)
    try:
        path = Path(scratch.name) / "bundle"
        await _bundles(call).export(call.actor, run_id, path)
        headers = [
            (b"content-type", b"application/octet-stream"),
            (b"content-disposition", b'attachment; filename="%s.mcprun"' % run_id.encode()),
            (b"content-length", b"%d" % path.stat().st_size),
        ]
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    finally:
        await asyncio.to_thread(scratch.cleanup)  # the open descriptor keeps the bytes
    return Reply(200, b"", headers, _content(descriptor))


async def _content(descriptor: int) -> AsyncIterator[bytes]:
    with os.fdopen(descriptor, "rb") as file:
        while chunk := await asyncio.to_thread(file.read, _CHUNK):
            yield chunk


async def import_run(call: Call) -> Reply:
    """Take in the run of a bundle, as it ended elsewhere; a bundle that is damaged or not ours changes nothing."""
    replay = call.query(_IMPORT).replay
    call.body_max = call.services.settings.limits.max_artifact_bytes
    bundles = _bundles(call)
    engine = call.services.pipelines
    scratch = _scratch(call)
    try:
        path = Path(scratch.name) / "bundle"
        await _spooled(call, path)
        run = await bundles.take_in(call.actor, path)
    finally:
        await asyncio.to_thread(scratch.cleanup)
    again = await bundles.replay(call.actor, run, call.origin) if replay else None
    view = await engine.view(call.actor, run)
    return reply(Imported(run=view, replay=None if again is None else await engine.view(call.actor, again)), 201)


async def _spooled(call: Call, path: Path) -> None:
    with path.open("wb") as file:
        async for chunk in call.stream():
            await asyncio.to_thread(file.write, chunk)


ENDPOINTS: Final = (
    Endpoint(
        method="GET", path="/runs/{run_id}/bundle", handler=export_run, summary="Export a run as a bundle", tag="runs",
        produces=("application/octet-stream",),
    ),
    Endpoint(
        method="POST", path="/runs/import", handler=import_run, summary="Import a run from a bundle", tag="runs", weight="submit",
        query=_IMPORT, returns=Imported, status=201, body_type="application/octet-stream",
    ),
)  # fmt: skip
