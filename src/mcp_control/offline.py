"""Stores apart from a server: what backups, restores and moves open. The one place beside `app.py` that names storage adapters."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mcp_control.kernel.errors import StoreUnavailable
from mcp_control.storage.local.blobs import FolderBlobs
from mcp_control.storage.ports import Archive, Blobs
from mcp_control.storage.sqlite.archive import SqliteArchive

SQLITE: Final = "sqlite"
MONGODB: Final = "mongodb"


@dataclass(frozen=True)
class Place:
    """Where a store is.

    Attributes:
        kind: `sqlite` or `mongodb`.
        name: for people; without credentials.
        archive: the store.
        blobs: opens its blobs for reading, beside a server.
        own_blobs: opens its blobs for writing, while no server uses the store.
    """

    kind: str
    name: str
    archive: Archive
    blobs: Callable[[], Blobs]
    own_blobs: Callable[[], Blobs]


def in_folder(data: Path) -> Place:
    """Return the store in a data folder."""
    return Place(
        kind=SQLITE,
        name=f"{SQLITE}:{data}",
        archive=SqliteArchive(data),
        blobs=lambda: FolderBlobs(data, owner=False),
        own_blobs=lambda: FolderBlobs(data),
    )


def place(text: str) -> Place:
    """Return the store at `sqlite:FOLDER` or `mongodb://…`. Raises StoreUnavailable for anything else."""
    scheme, _, rest = text.partition(":")
    if scheme == SQLITE and rest:
        return in_folder(Path(rest).expanduser())
    raise StoreUnavailable(f"{scheme or text}: write sqlite:FOLDER or mongodb://…")
