"""Facts to everybody who follows them: live from the store's commits, joined without gap or duplicate to what was missed.

The cost of a fact that nobody follows is one look into a dictionary. A subscriber holds at most `backlog` entries: progress and log
notices of one thing replace each other while they wait; what changes a state is never left out silently. When the backlog is full it
is emptied and the subscriber is told to read anew (`Batch.reread`).
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Final, Self

import msgspec

from mcp_control.events.filters import Filter, filter_of
from mcp_control.kernel.changes import StoredFact
from mcp_control.kernel.errors import CursorExpired, Overloaded
from mcp_control.storage.ports import Store

_PAGE: Final = 500
_KEEP_ALL: Final = 2**62
# Notices of which only the newest matters to somebody who is behind; the lines and figures themselves are read elsewhere.
_REPLACEABLE: Final = ("progressed", "logged")


class Batch(msgspec.Struct, frozen=True):
    """What a subscriber gets at once, in order.

    Attributes:
        facts: those that match; may be empty when `reread` is set.
        reread: facts before these were dropped because the subscriber was too slow: read the current state.
        after: the cursor that goes on after this batch, also past facts that did not match.
    """

    facts: list[StoredFact]
    reread: bool
    after: int


class _Route:
    """The subscribers of one fact type, by what narrows them most, so that a fact meets only those it may concern."""

    __slots__ = ("broad", "by_run", "by_subject", "size")

    def __init__(self) -> None:
        self.broad: dict[Subscription, None] = {}
        self.by_subject: dict[str, dict[Subscription, None]] = {}
        self.by_run: dict[str, dict[Subscription, None]] = {}
        self.size = 0

    def add(self, each: "Subscription") -> None:
        self.size += 1
        if each.filter.subject is not None:
            self.by_subject.setdefault(each.filter.subject, {})[each] = None
        elif each.filter.run is not None:
            self.by_run.setdefault(each.filter.run, {})[each] = None
        else:
            self.broad[each] = None

    def remove(self, each: "Subscription") -> None:
        self.size -= 1
        if each.filter.subject is not None:
            _take_out(self.by_subject, each.filter.subject, each)
        elif each.filter.run is not None:
            _take_out(self.by_run, each.filter.run, each)
        else:
            del self.broad[each]


def _take_out(table: dict[str, dict["Subscription", None]], key: str, each: "Subscription") -> None:
    row = table[key]
    del row[each]
    if not row:
        del table[key]


class Subscription:
    """One follower's stream of batches; iterate over it, and close it (or use it as a context manager).

    Attributes:
        filter: what it follows.
        after: the last fact it has passed on; a cursor to resume from.
    """

    def __init__(self, broadcaster: "Broadcaster", filter: Filter, after: int, backlog: int) -> None:
        self.filter = filter
        self.after = after
        self._broadcaster = broadcaster
        self._backlog = backlog
        self._waiting: dict[object, StoredFact] = {}
        self._seen = after
        self._reread = False
        self._wake: asyncio.Future[None] | None = None
        self._live = False
        self._closed = False

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
            batch = self._take() if self._live else await self._missed()
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
            self._waiting.clear()
            self._broadcaster.detach(self)
            self._ring()

    def offer(self, stored: StoredFact) -> None:
        """Take a live fact that matches. Called by the broadcaster; never blocks."""
        if stored.seq <= self._seen:
            return
        self._seen = stored.seq
        fact = stored.fact
        key: object = stored.seq
        if fact.type.endswith(_REPLACEABLE):
            key = (fact.type, fact.subject)
            self._waiting.pop(key, None)  # goes to the end, so that the order stays that of the facts
        elif len(self._waiting) >= self._backlog:
            self._waiting.clear()
            self._reread = True
        if len(self._waiting) < self._backlog:
            self._waiting[key] = stored
        self._ring()

    def join(self) -> None:
        """Be live from here on. Called at once by the broadcaster where nothing was missed."""
        self._live = True

    def _take(self) -> Batch | None:
        if not self._waiting and not self._reread:
            return None
        facts = list(self._waiting.values())
        rest = facts[_PAGE:]
        facts = facts[:_PAGE]
        if rest:
            self._waiting = dict(list(self._waiting.items())[_PAGE:])
        else:
            self._waiting = {}
        reread, self._reread = self._reread, False
        # Once all that waited is out, everything up to the newest fact was looked at.
        return Batch(facts, reread, facts[-1].seq if rest else max(self._seen, self._broadcaster.newest))

    async def _missed(self) -> Batch | None:
        """Read a page of the past; when it reaches the present, go live in the same step, so nothing falls between."""
        page = await self._broadcaster.read(self._seen, _PAGE)
        if page:
            self._seen = page[-1].seq
        if self._seen >= self._broadcaster.newest and not self._closed:
            self._broadcaster.attach(self)
            self._live = True
        wanted = [each for each in page if self.filter.wants_type(each.fact.type) and self.filter.wants(each.fact)]
        return Batch(wanted, False, self._seen) if wanted else None

    def _ring(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def _woken(self) -> None:
        if self._closed or self._waiting or self._reread:
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
        self._backlog = backlog
        self._limit = limit
        self._subscriptions: dict[Subscription, None] = {}
        self._following: dict[Subscription, None] = {}
        self._routes: dict[str, _Route] = {}
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
        if not self._subscriptions:
            return
        routes = self._routes
        for stored in facts:
            fact = stored.fact
            route = routes.get(fact.type)
            if route is None:
                route = self._route(fact.type)
            if not route.size:
                continue
            for each in route.broad:
                if each.filter.wants(fact):
                    each.offer(stored)
            if route.by_subject:
                for each in route.by_subject.get(fact.subject, ()):
                    if each.filter.wants(fact):
                        each.offer(stored)
            if route.by_run:
                for name in {fact.run, fact.subject}:
                    for each in route.by_run.get(name, ()):
                        if each.filter.wants(fact):
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
        subscription = Subscription(self, wanted, self.newest if after is None else after, self._backlog)
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

    # --- for subscriptions ----------------------------------------------------------------------------------------

    def attach(self, subscription: Subscription) -> None:
        """Begin to offer live facts."""
        self._subscriptions[subscription] = None
        for name, route in self._routes.items():
            if subscription.filter.wants_type(name):
                route.add(subscription)

    def detach(self, subscription: Subscription) -> None:
        """Stop offering."""
        self._following.pop(subscription, None)
        if subscription not in self._subscriptions:
            return
        del self._subscriptions[subscription]
        for name, route in self._routes.items():
            if subscription.filter.wants_type(name):
                route.remove(subscription)

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

    def _route(self, type: str) -> _Route:
        if len(self._routes) > 1000:
            self._routes = {}
        route = self._routes[type] = _Route()
        for each in self._subscriptions:
            if each.filter.wants_type(type):
                route.add(each)
        return route


def _expired() -> CursorExpired:
    return CursorExpired("the events after this cursor are no longer kept: read the current state and start anew")
