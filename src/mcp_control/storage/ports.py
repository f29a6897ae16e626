"""The ports: what the product needs of a store, a queue, a bus, a cache and a blob store. At most eight methods each.

Adapters never read a clock to decide anything: moments come in as arguments. One conformance suite per port in
`mcp_control.testing` states the obligations as tests.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final, Protocol

import msgspec

from mcp_control.kernel.changes import Change, Entity, Kind, Query, StoredFact, Where
from mcp_control.kernel.errors import Problem

RANK_MAX: Final = (1 << 52) - 1  # every rank is exact in a double, which is what Redis sorts by
LANE_END: Final = "\x1f"
Committed = Callable[[Sequence[StoredFact]], None]


class Store(Protocol):
    """The truth. A change that `commit` reported as done survives kill -9 and power loss (promise G1)."""

    async def open(self, kinds: Sequence[Kind], committed: Committed) -> None:
        """Open or create the store, migrate it, check it.

        Args:
            kinds: declarations of everything that will be kept.
            committed: called on the event loop with all facts, in the order of their `seq`, without gaps and each once. It must not raise
                or block. A store of one server calls it before the `commit` calls that caused the facts return; a store that several
                servers share calls it on each of them soon after, for the facts of all.

        Raises:
            StoreUnavailable: it cannot be opened, is locked by another server, or is damaged; the message says what to do.
        """
        ...

    async def close(self) -> None:
        """Finish the commits under way and release everything. Calling it twice is a no-op."""
        ...

    async def commit(self, changes: Sequence[Change]) -> list[Problem | None]:
        """Apply each change atomically and durably; one outcome per change, in order; None is success.

        A change ends in `Conflict` when an entity is not at the version given (or is there although 0 was given), in `Duplicate` when
        a unique index is already taken; the other changes of the call are not affected. Changes see the effect of those before them.

        Raises:
            StorageFull, StoreUnavailable, Overloaded: nothing of this call was applied.
            OutcomeUnknown: it may or may not have been applied.
        """
        ...

    async def get(self, kind: str, ids: Sequence[str], cold: Sequence[str] = ()) -> list[Entity | None]:
        """Return the entities in the order of the ids, None where there is none, with the named cold parts.

        Never shows a state that later rolls back; shows every change committed before the call.
        """
        ...

    async def find(self, kind: str, query: Query) -> list[Entity]:
        """Return the entities that match, in the query's order, at most `query.limit`."""
        ...

    async def count(self, kind: str, where: Sequence[Where], limit: int) -> int:
        """Return how many match, counting no further than `limit`."""
        ...

    async def facts(self, after: int, limit: int) -> list[StoredFact]:
        """Return the facts with `seq > after` in order, at most `limit`. The oldest kept may be later than `after + 1`."""
        ...

    async def trim_facts(self, before_at: int, keep: int, limit: int) -> tuple[int, int]:
        """Delete facts older than `before_at` and all but the newest `keep`, about `limit` at most in this call.

        Returns the oldest `seq` still kept and the newest `seq` ever given (both 0 when there was never one).
        """
        ...


class Queued(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A queued task as an index entry: its lane, its id, and what orders it (lower `rank` first, then the id); 0 to `RANK_MAX`."""

    lane: str
    id: str
    rank: int


class Depth(msgspec.Struct, frozen=True, gc=False):
    """A lane that is not empty.

    Attributes:
        waiting: how many wait in it.
        rank: of its first entry.
        first: the id of its first entry.
    """

    lane: str
    waiting: int
    rank: int
    first: str


def waiting_value(lane: str, rank: int) -> str:
    """Return the value of the index field of a task that waits: its lane, then its rank.

    With the id behind it, it sorts what waits as a `Queue` does; see `claims.StoreQueue`.
    """
    return f"{lane}{LANE_END}{rank:016d}"


class Queue(Protocol):
    """Which tasks wait, lane by lane. An index that can be rebuilt from the store; losing it loses nothing."""

    async def push(self, entries: Sequence[Queued]) -> None:
        """Add entries; one that is already there (same lane and id) is replaced."""
        ...

    async def take(self, lane: str, limit: int, ceiling: int = RANK_MAX) -> list[Queued]:
        """Remove and return the first entries of a lane whose rank is at most `ceiling`; no other `take` sees them.

        Cost does not depend on the lane's length.
        """
        ...

    async def remove(self, lane: str, ids: Sequence[str]) -> None:
        """Remove entries; those that are not there are ignored."""
        ...

    async def ahead(self, lane: str, id: str) -> int | None:
        """Return how many entries come before this one, None when it is not there. For people, so it may cost a scan."""
        ...

    async def before(self, lane: str, rank: int) -> int:
        """Return how many entries of a lane have a lower rank. For people, so it may cost a scan and end at 1000."""
        ...

    async def depths(self) -> list[Depth]:
        """Return the lanes that are not empty."""
        ...

    async def clear(self) -> None:
        """Forget everything, to be rebuilt."""
        ...


class Bus(Protocol):
    """Tells the other servers that something happened. Best effort: the store's facts are the truth."""

    async def publish(self, topic: str, message: bytes) -> None:
        """Send a message to all subscribers of the topic, this server's own included."""
        ...

    def subscribe(self, topic: str) -> AsyncIterator[bytes]:
        """Return the messages of a topic from now on. A subscriber too slow for its bounded backlog loses the oldest."""
        ...

    async def close(self) -> None:
        """End all subscriptions."""
        ...


class Cache(Protocol):
    """Bytes that may be forgotten at any time."""

    async def get(self, key: str) -> bytes | None:
        """Return the value, None when it is absent or expired."""
        ...

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """Keep a value for at most `ttl` seconds."""
        ...

    async def delete(self, key: str) -> None:
        """Forget a value; absent ones are ignored."""
        ...

    async def add(self, key: str, amount: int, ttl: float) -> int:
        """Add to a counter that lives `ttl` seconds from its first addition, and return its value."""
        ...


class BlobInfo(msgspec.Struct, frozen=True, gc=False):
    """A stored blob: lower-case hexadecimal SHA-256 of its bytes, which is its name, and its size."""

    sha256: str
    size: int


class StoredBlob(msgspec.Struct, frozen=True, gc=False):
    """A blob as it lies in the store: its name, its size, and when it was last put (wall time of the storage, milliseconds)."""

    sha256: str
    size: int
    stored_at: int


class Blobs(Protocol):
    """Large immutable bytes, named by their SHA-256."""

    async def put(self, chunks: AsyncIterator[bytes], limit: int) -> BlobInfo:
        """Store a stream durably; equal content is stored once, and counts as stored anew. A stream that breaks off leaves nothing.

        Raises:
            PayloadTooLarge: more than `limit` bytes came.
            StorageFull: there is no space.
        """
        ...

    def read(self, sha256: str, start: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
        """Return the bytes from `start`, in chunks.

        Raises:
            NotFound: there is no such blob.
        """
        ...

    async def stat(self, sha256: str) -> BlobInfo | None:
        """Return its size, None when it is absent."""
        ...

    async def delete(self, sha256: str, before: int | None = None) -> bool:
        """Remove a blob; absent ones are ignored.

        With `before` one that was put at or after that moment stays, atomically: whoever put it may be about to name it. Returns whether
        it is gone.
        """
        ...

    async def names(self, after: str, limit: int) -> list[StoredBlob]:
        """Return the blobs whose name comes after `after`, in the order of their names, at most `limit`."""
        ...

    async def sweep(self, before: int) -> None:
        """Remove what uploads left that broke off, with their server, before that moment."""
        ...

    def local_path(self, sha256: str) -> Path | None:
        """Return the file that holds the blob, for programs on the same machine; None where there is no such file."""
        ...


class Snapshot(Protocol):
    """A store as it was at one moment, whatever is written to it meanwhile.

    Attributes:
        kinds: what is kept in it, as the store was last told.
        newest_seq: the newest `seq` given until then, 0 when there was none.
    """

    @property
    def kinds(self) -> Sequence[Kind]:
        """See above."""
        ...

    @property
    def newest_seq(self) -> int:
        """See above."""
        ...

    def entities(self, kind: str) -> AsyncIterator[Sequence[Entity]]:
        """Return all entities of a kind in the order of their ids (as bytes), in pages of a few MiB, with every cold part and piece."""
        ...

    def facts(self, after: int = 0) -> AsyncIterator[Sequence[StoredFact]]:
        """Return the facts with `seq > after` in order, in pages."""
        ...


class Loading(Protocol):
    """A store that is being filled from elsewhere. It takes the place of the old one with `finish`, and not before."""

    async def put(self, kind: str, entities: Sequence[Entity]) -> None:
        """Write entities exactly as they are: `version` is the version they have then. Those that are there are replaced whole."""
        ...

    async def drop(self, kind: str, ids: Sequence[str]) -> None:
        """Remove entities; absent ones are ignored."""
        ...

    async def append(self, facts: Sequence[StoredFact]) -> None:
        """Write facts with the places they have; each call goes on where the one before ended."""
        ...

    def loaded(self) -> AbstractAsyncContextManager[Snapshot]:
        """Read what was written so far; what is written meanwhile may or may not be seen."""
        ...

    async def finish(self, newest_seq: int) -> None:
        """Make it the store, durably; the next fact gets `newest_seq + 1`."""
        ...


class Archive(Protocol):
    """A store as a whole, apart from any server: for backups, restores and moves. Not for the event loop of a server."""

    def snapshot(self) -> AbstractAsyncContextManager[Snapshot]:
        """Open the store for reading, also while servers use it.

        Raises:
            StoreUnavailable: there is no store, or it cannot be read.
        """
        ...

    def loading(self, kinds: Sequence[Kind], *, replace: bool) -> AbstractAsyncContextManager[Loading]:
        """Begin to fill the store; leaving without `finish` leaves the old one, or one that no server opens.

        Args:
            kinds: declarations of everything that will be written.
            replace: whether a store that is not empty may be replaced.

        Raises:
            StoreUnavailable: a server uses the store, or it is not empty and `replace` is false.
        """
        ...

    def resting(self) -> AbstractAsyncContextManager[None]:
        """Make sure that no server uses the store.

        Raises:
            StoreUnavailable: one does.
        """
        ...
