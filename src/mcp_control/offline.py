"""Stores apart from a server: what backups, restores and moves open. Part of the composition root."""

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from mcp_control import __version__
from mcp_control.coordination.model import NODE_KIND, Node
from mcp_control.kernel.errors import StoreUnavailable
from mcp_control.kinds import KINDS
from mcp_control.storage.local.blobs import FolderBlobs
from mcp_control.storage.mongo.archive import MongoArchive, opened
from mcp_control.storage.mongo.blobs import GridFsBlobs
from mcp_control.storage.ports import Archive, Blobs
from mcp_control.storage.sqlite.archive import SqliteArchive

SQLITE: Final = "sqlite"
MONGODB: Final = "mongodb"
_ALIVE: Final = (NODE_KIND.name, "until")
_decode: Final = msgspec.msgpack.Decoder(Node).decode


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
        contract: returns the names of what this version declares no more, and drops it when called with True. None where the start of a
            server does it. Raises StoreUnavailable while a server of another version is there, or was the last to start.
    """

    kind: str
    name: str
    start: str
    archive: Archive
    blobs: Callable[[], AbstractAsyncContextManager[Blobs]]
    own_blobs: Callable[[], AbstractAsyncContextManager[Blobs]]
    contract: Callable[[bool], Coroutine[Any, Any, list[str]]] | None = None


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

    archive = MongoArchive(uri, alive=_ALIVE)

    async def contract(drop: bool) -> list[str]:
        nodes = [_decode(hot) for hot in await archive.alive()]
        if others := sorted(f"{node.name} ({node.software})" for node in nodes if node.software != __version__):
            raise StoreUnavailable(
                f"servers of other versions than this one ({__version__}) are there: {', '.join(others)}; replace them first"
            )
        return await archive.contract(KINDS, drop=drop)

    return Place(
        kind=MONGODB,
        name=_without_credentials(uri),
        start="MONGODB_URI=… mcpctl up",
        archive=archive,
        blobs=blobs,
        own_blobs=blobs,
        contract=contract,
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
