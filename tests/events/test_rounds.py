"""Rounds: a crowd served together, and nobody the worse for it."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from mcp_control.events.backlog import Batch
from mcp_control.events.broadcaster import Broadcaster, Subscription
from mcp_control.events.rounds import Rounds
from mcp_control.kernel.changes import StoredFact
from tests.events.world import World, happened, seqs


class Peer:
    """A follower with a way that can be blocked, as a socket is whose other end does not read."""

    def __init__(self, rounds: Rounds, subscription: Subscription) -> None:
        self.facts: list[StoredFact] = []
        self.batches: list[Batch] = []
        self.rereads = 0
        self.on_turn: Callable[[], None] = lambda: None
        self.fell_behind = 0
        self.subscription = subscription
        self._rounds = rounds
        self._free = asyncio.Event()
        self._free.set()
        self._task = asyncio.create_task(self._catch_up())

    def take(self, batch: Batch) -> bool:
        self.on_turn()
        if not self._free.is_set():
            return False
        self._got(batch)
        return True

    def behind(self) -> None:
        self.fell_behind += 1
        self._task = asyncio.create_task(self._catch_up())

    def block(self) -> None:
        self._free.clear()

    def unblock(self) -> None:
        self._free.set()

    def _got(self, batch: Batch) -> None:
        self.batches.append(batch)
        self.facts += batch.facts
        self.rereads += batch.reread

    async def _catch_up(self) -> None:
        while True:
            await self._free.wait()
            if self._rounds.join(self.subscription, self):
                return
            try:
                batch = await anext(self.subscription)
            except StopAsyncIteration:
                return
            await self._free.wait()
            self._got(batch)


class Place:
    """A world with rounds, on a clock that says how long they take."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.now = 0.0
        self.rounds = Rounds(world.events, lambda: self.now)

    async def peer(
        self, types: Sequence[str] = (), subject: str | None = None, run: str | None = None, after: int | None = None
    ) -> Peer:
        return Peer(self.rounds, await self.world.events.subscribe(types, subject, run, None, after))

    async def joined(self) -> None:
        """Let the peers join, as the tasks that are ready do."""
        await asyncio.sleep(0)


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds, at most 10 s."""
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.001)


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    world = World(tmp_path / "data", backlog=50)
    await world.open()
    yield Place(world)
    assert world.broken == []
    world.events.close()
    await world.store.close()


async def test_a_group_gets_one_batch(place: Place) -> None:
    """Who follows the same gets the same object, so that it is encoded once; other filters get only what they want."""
    peers = [await place.peer(["task.*"]) for _ in range(5)]
    other = await place.peer(["run.*"])
    await place.joined()
    await place.world.tell(happened("task.queued"), happened("run.started"), happened("task.assigned"))
    await until(lambda: bool(other.facts) and all(peer.facts for peer in peers))
    assert {id(peer.batches[0]) for peer in peers} == {id(peers[0].batches[0])}
    assert seqs(peers[0].facts) == [1, 3]
    assert seqs(other.facts) == [2]
    assert not any(peer.fell_behind for peer in peers)


@pytest.mark.parametrize("seed", range(5))
async def test_everybody_gets_what_it_follows_in_order_and_once(place: Place, seed: int) -> None:
    """Mixed filters, followers that come at any time from any cursor, that block and go on: no gap, no repetition, no step back."""
    dice = random.Random(seed)
    kinds, things, runs = ("task.queued", "task.completed", "run.started"), ("a", "b"), ("", "r")
    filters = [
        ((), None, None),
        (("task.*",), None, None),
        (("run.*", "task.queued"), None, None),
        ((), "a", None),
        ((), None, "r"),
    ]
    told: list[StoredFact] = []
    peers: list[tuple[int, Peer]] = []
    for _ in range(150):
        facts = [
            happened(dice.choice(kinds), dice.choice(things), dice.choice(runs)) for _ in range(dice.randint(1, 3))
        ]
        told += [StoredFact(len(told) + n, fact) for n, fact in enumerate(facts, 1)]
        await place.world.tell(*facts)
        place.now += dice.choice((0.0, 0.0, 0.004))
        if len(peers) < 40:
            newest = place.world.events.newest
            after = dice.choice((None, None, newest, dice.randint(max(0, newest - 30), newest)))
            types, subject, run = dice.choice(filters)
            peer = await place.peer(types, subject, run, after)
            peers.append((newest if after is None else after, peer))
        for _, peer in peers:
            if dice.random() < 0.2:
                (peer.unblock if dice.random() < 0.8 else peer.block)()
    for _, peer in peers:
        peer.unblock()
    for after, peer in peers:
        expected = [
            each.seq
            for each in told
            if each.seq > after
            and peer.subscription.filter.wants_type(each.fact.type)
            and peer.subscription.filter.wants(each.fact)
        ]
        await until(lambda peer=peer, expected=expected: len(peer.facts) >= len(expected) or peer.rereads > 0)
        got = seqs(peer.facts)
        if peer.rereads:  # it was blocked for longer than its backlog lasts
            assert got == sorted(set(got))
            assert set(got) <= set(expected)
        else:
            assert got == expected
    assert sum(peer.rereads == 0 for _, peer in peers) > 20
    assert any(peer.fell_behind for _, peer in peers)


async def test_a_slow_follower_holds_up_nobody(place: Place) -> None:
    """Others get everything while one is blocked; when its way is free, it gets what it missed, in order, and is in the rounds again."""
    slow, *others = [await place.peer() for _ in range(4)]
    await place.joined()
    slow.block()
    for n in range(20):
        await place.world.tell(happened("task.queued", f"task_{n}"))
    await until(lambda: all(len(peer.facts) == 20 for peer in others))
    assert slow.facts == []
    assert slow.fell_behind == 1
    slow.unblock()
    await until(lambda: len(slow.facts) == 20)
    await place.joined()
    await place.world.tell(happened("task.completed"))
    await until(lambda: all(len(peer.facts) == 21 for peer in (slow, *others)))
    assert seqs(slow.facts) == list(range(1, 22))
    assert slow.batches[-1] is others[0].batches[-1]


async def test_a_follower_that_stays_blocked_is_bounded_and_told(place: Place) -> None:
    """Behind the rounds the rules for those who are slow hold: what does not fit the backlog is left out, and it is told."""
    slow, other = await place.peer(), await place.peer()
    await place.joined()
    slow.block()
    for n in range(200):
        await place.world.tell(happened("task.queued", f"task_{n}"))
    await until(lambda: len(other.facts) == 200)
    slow.unblock()
    await until(lambda: bool(slow.facts) and slow.facts[-1].seq == 200)
    assert slow.rereads == 1
    assert other.rereads == 0


async def test_who_closes_during_a_round_gets_nothing_and_spoils_nothing(place: Place) -> None:
    """A follower may close itself or the next one in its turn; the rest is served, and no group is left behind."""

    def end() -> None:
        peers[2].subscription.close()
        peers[2].block()

    peers = [await place.peer() for _ in range(4)]
    await place.joined()
    peers[0].on_turn = peers[1].subscription.close
    peers[2].on_turn = end
    await place.world.tell(happened("task.queued"))
    await until(lambda: bool(peers[3].facts))
    assert peers[1].batches == peers[2].batches == []
    assert seqs(peers[0].facts) == [1]
    assert place.world.events.subscribers == 2
    for peer in peers:
        peer.subscription.close()
    await place.world.tell(happened("task.queued"))
    late = await place.peer(after=1)
    await until(lambda: seqs(late.facts) == [2])
    assert seqs(peers[3].facts) == [1]


async def test_what_happens_during_a_round_is_not_lost_to_who_leaves_it(place: Place) -> None:
    """A follower that falls behind in a round takes along what its group was told since the round began."""
    events = place.world.events
    quick, slow = await place.peer(), await place.peer()
    await place.joined()
    slow.block()

    def tell() -> None:
        quick.on_turn = lambda: None
        events.committed([StoredFact(2, happened("task.assigned"))])

    quick.on_turn = tell
    events.committed([StoredFact(1, happened("task.queued"))])
    await until(lambda: len(quick.facts) == 2)
    slow.unblock()
    events.committed([StoredFact(3, happened("task.completed"))])
    await until(lambda: len(slow.facts) >= 3)
    assert seqs(slow.facts) == seqs(quick.facts) == [1, 2, 3]


async def test_a_follower_that_fails_is_served_by_itself(place: Place) -> None:
    """What goes wrong for one in its turn is its own affair: it has not got the batch, and gets it another way."""

    def fail() -> None:
        peers[0].on_turn = lambda: None
        raise RuntimeError("broken")

    peers = [await place.peer() for _ in range(3)]
    await place.joined()
    peers[0].on_turn = fail
    await place.world.tell(happened("task.queued"))
    await until(lambda: all(seqs(peer.facts) == [1] for peer in peers))
    assert [peer.fell_behind for peer in peers] == [1, 0, 0]


async def test_a_round_lets_others_have_the_loop(place: Place) -> None:
    """However many follow, what else is ready has its turn after at most 64 of them."""
    served = longest = ticks = 0

    def count() -> None:
        nonlocal served
        served += 1

    def tick() -> None:
        nonlocal served, longest, ticks
        longest, served, ticks = max(longest, served), 0, ticks + 1
        asyncio.get_running_loop().call_soon(tick)

    peers = [await place.peer() for _ in range(500)]
    await place.joined()
    for peer in peers:
        peer.on_turn = count
    tick()
    place.world.events.committed([StoredFact(1, happened("task.queued"))])
    before = ticks
    async with asyncio.timeout(10):
        while not all(peer.facts for peer in peers):  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0)
    assert longest == 64
    assert ticks - before >= 500 // 64


async def test_after_a_long_round_what_happens_meanwhile_goes_out_together(place: Place) -> None:
    """The first fact goes at once; the server rests after a round, and two facts of that time are one batch."""
    events = place.world.events

    def long() -> None:
        place.now += 0.005

    peer = await place.peer()
    await place.joined()
    peer.on_turn = long
    for seq in (1, 2):
        events.committed([StoredFact(seq, happened("task.queued"))])
        await asyncio.sleep(0)
        if seq == 1:
            assert seqs(peer.facts) == [1]
            await asyncio.sleep(0)  # the round ends
    events.committed([StoredFact(3, happened("task.queued"))])
    await until(lambda: len(peer.facts) == 3)
    assert [seqs(batch.facts) for batch in peer.batches] == [[1], [2, 3]]


async def test_a_flood_ends_the_rest(place: Place) -> None:
    """More than half a backlog does not wait for the end of the rest, so that nobody who keeps up loses anything."""
    events = place.world.events

    def long() -> None:
        place.now += 0.005

    peer = await place.peer()
    await place.joined()
    peer.on_turn = long
    for at in range(1, 301, 3):  # far more than the backlog of 50 within one rest
        events.committed([StoredFact(at + n, happened("task.queued")) for n in range(3)])
        for _ in range(3):
            await asyncio.sleep(0)
    await until(lambda: len(peer.facts) == 300)
    assert peer.rereads == 0
    assert len(peer.batches) > 1


async def test_a_cursor_ahead_of_this_server_is_not_served_before_it(place: Place) -> None:
    """A follower may bring the cursor of a server that heard more: what it has seen there does not come again here."""
    await place.world.tell(*[happened("task.queued", f"task_{n}") for n in range(3)])
    here = Broadcaster(place.world.store)  # has not heard of them yet
    rounds = Rounds(here)
    ahead = Peer(rounds, await here.subscribe(after=2))
    beside = Peer(rounds, await here.subscribe())
    await place.joined()
    for seq in range(1, 5):
        here.committed([StoredFact(seq, happened("task.queued"))])
        await asyncio.sleep(0)
    await until(lambda: len(beside.facts) == 4 and len(ahead.facts) >= 2)
    assert seqs(ahead.facts) == [3, 4]
    here.close()
