"""Stores apart from a server: what backups, restores and moves open. Part of the composition root."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from mcp_control.coordination.model import NODE_KIND
from mcp_control.kernel.errors import StoreUnavailable
from mcp_control.storage.local.blobs import FolderBlobs
from mcp_control.storage.mongo.archive import MongoArchive, opened
from mcp_control.storage.mongo.blobs import GridFsBlobs
from mcp_control.storage.ports import Archive, Blobs
from mcp_control.storage.sqlite.archive import SqliteArchive

SQLITE: Final = "sqlite"
MONGODB: Final = "mongodb"
_ALIVE: Final = (NODE_KIND.name, "until")


@dataclass(frozen=True)
class Place:
    """Where a store is.

    Attributes:
        kind: `sqlite` or `mongodb`.
        name: for people; without credentials.
        start: how a server is started on it.
        archive: the store.
        blobs: opens its blobs for reading, beside a server.
        own_blobs: opens its blobs for writing, while no server uses the store.
    """

    kind: str
    name: str
    start: str
    archive: Archive
    blobs: Callable[[], AbstractAsyncContextManager[Blobs]]
    own_blobs: Callable[[], AbstractAsyncContextManager[Blobs]]


def in_folder(data: Path) -> Place:
    """Return the store in a data folder."""

    @asynccontextmanager
    async def blobs() -> AsyncIterator[Blobs]:
        yield FolderBlobs(data, owner=False)

    @asynccontextmanager
    async def own_blobs() -> AsyncIterator[Blobs]:
        yield FolderBlobs(data)

    return Place(
        kind=SQLITE,
        name=f"{SQLITE}:{data}",
        start=f"mcpctl up --data {data}",
        archive=SqliteArchive(data),
        blobs=blobs,
        own_blobs=own_blobs,
    )


def in_database(uri: str) -> Place:
    """Return the store in a database of a replica set."""

    @asynccontextmanager
    async def blobs() -> AsyncIterator[Blobs]:
        async with opened(uri) as (_, database):
            yield GridFsBlobs(database)

    return Place(
        kind=MONGODB,
        name=_without_credentials(uri),
        start="MONGODB_URI=… mcpctl up",
        archive=MongoArchive(uri, alive=_ALIVE),
        blobs=blobs,
        own_blobs=blobs,
    )


def place(text: str) -> Place:
    """Return the store at `sqlite:FOLDER` or `mongodb://…`. Raises StoreUnavailable for anything else."""
    scheme, _, rest = text.partition(":")
    if scheme == SQLITE and rest:
        return in_folder(Path(rest).expanduser())
    if scheme in (MONGODB, "mongodb+srv") and rest.startswith("//"):
        return in_database(text)
    raise StoreUnavailable("a store is named sqlite:FOLDER or mongodb://…")


def _without_credentials(uri: str) -> str:
    try:
        parts = urlsplit(uri)
    except ValueError:
        return f"{MONGODB}://…"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
