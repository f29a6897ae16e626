"""Gives pending facts their place in the one order.

A transaction leaves its facts in `store.pending`; whoever sequences reads what is there, in the order of the cluster time at which it was
written, and inserts one document for all of it, whose `_id` is the first place. That insert is what decides: a second sequencer meets the
same `_id`, or one of the pending ids in `src`, both unique, and reads the head again. Pending documents go afterwards; one that stays is
recognised by `src`.

Causal order: a transaction that builds on another began after that one's commit, so its pending document got a later cluster time. The
pending documents are read in one snapshot; a scan that moved on through time could find an effect and miss its cause.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from bson.objectid import ObjectId
from pymongo.errors import DuplicateKeyError, PyMongoError

from mcp_control.storage.mongo.background import Background
from mcp_control.storage.mongo.batch import body, pack, unpack
from mcp_control.storage.mongo.client import SNAPSHOT, Database, Document
from mcp_control.storage.mongo.facts import Tail, announcement, newest_seq
from mcp_control.storage.mongo.schema import FACTS, PENDING

_PENDING_READ: Final = 500
_BYTES: Final = 4 << 20
_REMEMBERED: Final = 20_000
_POLL_ALONE: Final = 0.05  # leading, when nobody tells of commits
_POLL_TOLD: Final = 0.25
_POLL_ASIDE: Final = 0.5  # not leading
_TOLD_SECONDS: Final = 2.0
_ABANDONED: Final = 1.0  # seconds after which pending facts are everybody's business
_PAUSE: Final = 0.005
_STALE: Final = 5.0  # seconds after which what was read may have been sequenced and trimmed by others

Announce = Callable[[str, bytes], None]


class Sequencer:
    """Sequences pending facts: at once while it leads, else only what nobody else does.

    Args:
        database: where the collections are.
        tail: gets what was sequenced at once.
        announce: tells the other servers.
        clock: monotonic seconds.
    """

    def __init__(
        self, database: Database, tail: Tail, announce: Announce, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._pending = database[PENDING]
        self._facts = database[FACTS]
        self._database = database
        self._tail = tail
        self._announce = announce
        self._clock = clock
        self._lead = False
        self._told_at = -_TOLD_SECONDS
        self._head: int | None = None  # as long as nobody else sequences
        self._placed: set[ObjectId] = set()
        self._placed_order: deque[ObjectId] = deque()
        self._oldest: tuple[ObjectId, float] | None = None  # the oldest pending document, and since when it was seen
        self._work = Background("mongo-sequencer", self._turn)

    @property
    def lead(self) -> bool:
        """Whether this server sequences at once."""
        return self._lead

    @lead.setter
    def lead(self, value: bool) -> None:
        if value != self._lead:
            self._lead = value
            self._head = None
            self._work.ask()

    def start(self) -> None:
        """Begin to look for pending facts."""
        self._work.start()

    async def stop(self) -> None:
        """Stop looking; what is under way finishes, or is found by others."""
        await self._work.stop()

    def wake(self, *, told: bool = False) -> None:
        """Look now; `told` by another server, which will do so again."""
        if told:
            self._told_at = self._clock()
        if self._lead:
            self._work.ask()

    async def _turn(self) -> float:
        try:
            while (self._lead or await self._abandoned()) and await self.once():
                pass
        except PyMongoError:
            self._head = None
            raise
        if not self._lead:
            return _POLL_ASIDE
        return _POLL_TOLD if self._clock() - self._told_at < _TOLD_SECONDS else _POLL_ALONE

    async def _abandoned(self) -> bool:
        """Whether the same pending document has been the oldest for a while: those who should sequence do not."""
        oldest = await self._pending.find_one({}, {"_id": 1}, sort=[("ts", 1)])
        now = self._clock()
        if oldest is None:
            self._oldest = None
            return False
        if self._oldest is None or self._oldest[0] != oldest["_id"]:
            self._oldest = oldest["_id"], now
        return now - self._oldest[1] >= _ABANDONED

    async def once(self) -> bool:
        """Sequence what is pending, up to a few megabytes; say whether there may be more."""
        began = self._clock()
        found = await self._read_pending()
        fresh = [document for document in found if document["_id"] not in self._placed]
        if fresh and self._head is None:
            self._head = await newest_seq(self._database)
            known = await self._known(fresh)
            fresh = [document for document in fresh if document["_id"] not in known]
        if fresh and self._head is not None:
            if self._clock() - began > _STALE:
                self._head = None
                return True
            await self._place(fresh)
        if found:
            await self._remove([document["_id"] for document in found if document["_id"] in self._placed])
        return bool(fresh)

    async def _read_pending(self) -> list[Document]:
        pending = self._pending.with_options(read_concern=SNAPSHOT)
        found: list[Document] = []
        size = 0
        async with pending.find({}, sort=[("ts", 1)], limit=_PENDING_READ) as documents:
            async for document in documents:
                size += len(document["d"])
                if found and size > _BYTES:
                    break
                found.append(document)
        return found

    async def _known(self, documents: list[Document]) -> set[ObjectId]:
        """Return which of these have their place already."""
        ids = {document["_id"] for document in documents}
        async for document in self._facts.find({"src": {"$in": [*ids]}}, {"src": 1}):
            self._remember(ids.intersection(document["src"]))
        return ids & self._placed

    async def _place(self, documents: list[Document]) -> None:
        assert self._head is not None
        first = self._head + 1
        count = sum(document["n"] for document in documents)
        packed = pack([body(document["d"]) for document in documents], count)
        ids = [document["_id"] for document in documents]
        row = {
            "_id": first,
            "last": first + count - 1,
            "at": max(document["at"] for document in documents),
            "d": packed,
            "src": ids,
        }
        head, self._head = self._head, None
        try:
            await self._facts.insert_one(row)
        except DuplicateKeyError:  # somebody else sequences, too
            await asyncio.sleep(_PAUSE)
            return
        self._head = head + count
        self._remember(ids)
        self._tail.deliver(first, unpack(packed))
        self._announce("facts", announcement(first, packed))

    async def _remove(self, ids: list[ObjectId]) -> None:
        """Remove pending documents that have their place; those that stay are met and removed again."""
        if ids:
            await self._pending.delete_many({"_id": {"$in": ids}})

    def _remember(self, ids: "list[ObjectId] | set[ObjectId]") -> None:
        for one in ids:
            if one not in self._placed:
                self._placed.add(one)
                self._placed_order.append(one)
        while len(self._placed_order) > _REMEMBERED:
            self._placed.discard(self._placed_order.popleft())
