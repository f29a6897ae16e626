"""Facts to everybody who follows them: live from the store's commits, joined without gap or duplicate to what was missed.

The cost of a fact that nobody follows is one look into a dictionary. A subscriber holds at most `backlog` entries (see `Backlog`).
When they are full they are dropped and the subscriber is told to read anew (`Batch.reread`).
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Final, Self

from mcp_control.events.backlog import Backlog, Batch
from mcp_control.events.filters import Filter, filter_of
from mcp_control.events.routes import Listener, Routes
from mcp_control.kernel.changes import StoredFact
from mcp_control.kernel.errors import CursorExpired, Overloaded
from mcp_control.storage.ports import Store

_PAGE: Final = 500
_KEEP_ALL: Final = 2**62


class Subscription:
    """One follower's stream of batches; iterate over it, and close it (or use it as a context manager).

    Attributes:
        filter: what it follows.
        after: the last fact it has passed on; a cursor to resume from. Stands still while it is handed over.
    """

    def __init__(self, broadcaster: "Broadcaster", filter: Filter, after: int, backlog: int) -> None:
        self.filter = filter
        self.after = after
        self._broadcaster = broadcaster
        self._backlog = Backlog(after, backlog)
        self._wake: asyncio.Future[None] | None = None
        self._live = False
        self._closed = False
        self._leave: Callable[[Subscription], None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> AsyncIterator[Batch]:
        return self

    async def __anext__(self) -> Batch:
        """Return the next batch. Raises CursorExpired when what comes next was removed in the meantime."""
        while not self._closed:
            batch = self._backlog.take(self._broadcaster.newest, _PAGE) if self._live else await self._missed()
            if batch is not None:
                self.after = batch.after
                return batch
            if self._live:
                await self._woken()
        raise StopAsyncIteration

    def close(self) -> None:
        """End the stream. Closing it twice is a no-op."""
        if not self._closed:
            self._closed = True
            self._backlog.clear()
            self._broadcaster.forget(self)
            if self._leave is None:
                self._broadcaster.detach(self)
            else:
                self._leave(self)
            self._ring()

    def offer(self, stored: StoredFact) -> None:
        """Take a live fact that matches. Called by the broadcaster; never blocks."""
        if self._backlog.offer(stored):
            self._ring()

    def hand_over(self, leave: Callable[["Subscription"], None]) -> bool:
        """Let somebody else take the facts from here on, unless it still has some to pass on; `leave` is called when it is closed."""
        if not self._live or self._closed or self._backlog or self._backlog.seen > self._broadcaster.newest:
            return False
        self._broadcaster.detach(self)
        self._leave = leave
        return True

    def take_back(self, *batches: Batch) -> None:
        """Take the facts itself again after `hand_over`, first of all these, which did not get through."""
        self._leave = None
        self._broadcaster.attach(self)
        for batch in batches:
            self._backlog.add(batch)
        self._ring()

    def join(self) -> None:
        """Be live from here on. Called at once by the broadcaster where nothing was missed."""
        self._live = True

    async def _missed(self) -> Batch | None:
        """Read a page of the past; when it reaches the present, go live in the same step, so nothing falls between."""
        backlog = self._backlog
        page = await self._broadcaster.read(backlog.seen, _PAGE)
        if page:
            backlog.seen = page[-1].seq
        if backlog.seen >= self._broadcaster.newest and not self._closed:
            self._broadcaster.attach(self)
            self._live = True
        wanted = [each for each in page if self.filter.wants_type(each.fact.type) and self.filter.wants(each.fact)]
        return Batch(wanted, False, backlog.seen) if wanted else None

    def _ring(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def _woken(self) -> None:
        if self._closed or self._backlog:
            return
        self._wake = asyncio.get_running_loop().create_future()
        try:
            await self._wake
        finally:
            self._wake = None


class Broadcaster:
    """Passes facts on to subscriptions. `committed` is the callback the store is opened with; then `start`.

    Args:
        store: where the past is read.
        backlog: entries that may wait for one subscriber.
        limit: subscriptions at once.
        broken: told `facts_out_of_order` when the store breaks its promise of one order without gaps.
    """

    def __init__(
        self,
        store: Store,
        *,
        backlog: int = 1000,
        limit: int = 10_000,
        broken: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._store = store
        self._broken = broken
        self._started = False
        self._told: int | None = None
        self.backlog = backlog
        self._limit = limit
        self._following: dict[Subscription, None] = {}
        self._routes = Routes()
        self.newest = 0

    @property
    def subscribers(self) -> int:
        """Open subscriptions."""
        return len(self._following)

    async def start(self) -> None:
        """Learn where the facts stand, so that an old cursor is told from one that is still to come."""
        _, newest = await self._store.trim_facts(0, _KEEP_ALL, 0)
        self.newest = max(self.newest, newest)
        self._started = True

    def committed(self, facts: Sequence[StoredFact]) -> None:
        """Pass on the facts of a commit. Called on the loop by the store, in order."""
        if not facts:
            return
        # What others recorded while this server opened is in the store before it is told here.
        expected = facts[0].seq <= self.newest + 1 if self._told is None else facts[0].seq == self._told + 1
        if self._started and not expected:
            self._broken("facts_out_of_order")
        self._told = facts[-1].seq
        self.newest = max(self.newest, self._told)
        if not self._routes.all:
            return
        for stored in facts:
            for each in self._routes.listeners(stored.fact):
                each.offer(stored)

    async def subscribe(
        self,
        types: Sequence[str] = (),
        subject: str | None = None,
        run: str | None = None,
        tenant: str | None = None,
        after: int | None = None,
    ) -> Subscription:
        """Begin to follow facts.

        Args:
            types: exact, `noun.*` or `*`; empty means all.
            subject: id of one thing.
            run: id of one run.
            tenant: whose facts.
            after: go on after this fact; None begins with the next one.

        Raises:
            CursorExpired: the facts after `after` are no longer kept, or it was never reached.
            Invalid: too many patterns, or one that is none.
            Overloaded: too many subscriptions.
        """
        wanted = filter_of(types, subject, run, tenant)
        if len(self._following) >= self._limit:
            raise Overloaded("too many subscriptions", retry_after=5)
        if after is not None:
            await self._check(after)
        subscription = Subscription(self, wanted, self.newest if after is None else after, self.backlog)
        self._following[subscription] = None
        if after is None or after >= self.newest:
            self.attach(subscription)
            subscription.join()
        return subscription

    async def page(
        self, wanted: Filter, after: int | None, limit: int, scan: int = 10_000
    ) -> tuple[list[StoredFact], int]:
        """Return facts that match, oldest first, and the cursor to go on from; reads at most `scan` facts for it.

        `after` None begins with the oldest that is kept. Raises CursorExpired as `subscribe` does.
        """
        if after is None:
            oldest, _ = await self._store.trim_facts(0, _KEEP_ALL, 0)
            after = max(oldest - 1, 0)
        else:
            await self._check(after)
        found: list[StoredFact] = []
        for _ in range(0, scan, _PAGE):
            facts = await self.read(after, _PAGE)
            for stored in facts:
                after = stored.seq
                if wanted.wants_type(stored.fact.type) and wanted.wants(stored.fact):
                    found.append(stored)
                    if len(found) >= limit:
                        return found, after
            if len(facts) < _PAGE:
                break
        return found, after

    def close(self) -> None:
        """End all subscriptions, as when the server stops."""
        for subscription in list(self._following):
            subscription.close()

    # --- for subscriptions and rounds -----------------------------------------------------------------------------

    def attach(self, each: Listener) -> None:
        """Begin to offer live facts to somebody who is not attached."""
        self._routes.add(each)

    def detach(self, each: Listener) -> None:
        """Stop offering; a no-op for somebody who is not attached."""
        if each in self._routes.all:
            self._routes.remove(each)

    def forget(self, subscription: Subscription) -> None:
        """Count a subscription that was closed no longer."""
        self._following.pop(subscription, None)

    async def read(self, after: int, limit: int) -> list[StoredFact]:
        """Return the facts after `after`. Raises CursorExpired when the next one is no longer kept."""
        facts = await self._store.facts(after, limit)
        if facts and facts[0].seq != after + 1:
            raise _expired()
        if not facts and after < self.newest:
            await self._check(after)
        return facts

    async def _check(self, after: int) -> None:
        oldest, newest = await self._store.trim_facts(0, _KEEP_ALL, 0)
        if after > newest or after + 1 < oldest:
            raise _expired()


def _expired() -> CursorExpired:
    return CursorExpired("the events after this cursor are no longer kept: read the current state and start anew")
