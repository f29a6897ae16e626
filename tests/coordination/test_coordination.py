"""Leadership, membership and time of servers that share a store."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mcp_control.coordination.clock import StoreClock
from mcp_control.coordination.leadership import Leadership
from mcp_control.coordination.model import KINDS, Node
from mcp_control.coordination.nodes import Nodes
from mcp_control.kernel.errors import Problem
from mcp_control.storage.sqlite.store import SqliteStore
from mcp_control.testing.clock import FakeClock


def _fatal(problem: Problem) -> None:
    raise problem


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    there = SqliteStore(tmp_path, fatal=_fatal)
    await there.open(KINDS, lambda facts: None)
    yield there
    await there.close()


async def test_one_leads_and_the_other_waits_for_the_end_of_the_term(store: SqliteStore) -> None:
    """The lease goes to who asks first, stays with who renews it, and goes over when it was not renewed."""
    clock = FakeClock()
    one, two = (Leadership(store, clock, name, 5.0) for name in ("one", "two"))
    assert await one.once()
    assert not await two.once()
    assert two.holder == "one"
    for _ in range(5):
        clock.advance(3)
        assert await one.once()
        assert not await two.once()
    clock.advance(4.5)
    assert not one.leading, "it stops before others may begin"
    assert not await two.once()
    clock.advance(0.6)
    assert await two.once()
    assert (two.term, two.taken) == (2, 1)
    assert not await one.once()


async def test_a_leader_that_stops_in_good_order_leaves_no_gap(store: SqliteStore) -> None:
    """Whoever asks next leads at once."""
    clock = FakeClock()
    one, two = (Leadership(store, clock, name, 5.0) for name in ("one", "two"))
    await one.once()
    await one.release()
    assert not one.leading
    assert await two.once()
    await one.release()
    assert two.leading


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.integers(0, 2), st.floats(0, 6)), min_size=1, max_size=40))
async def test_never_do_two_lead_at_once(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, float]]
) -> None:
    """Whatever the pace at which servers ask, at most one believes that it leads."""
    store = SqliteStore(tmp_path_factory.mktemp("store"), fatal=_fatal)
    await store.open(KINDS, lambda facts: None)
    clock = FakeClock()
    servers = [Leadership(store, clock, f"server-{number}", 5.0) for number in range(3)]
    for who, seconds in steps:
        clock.advance(seconds)
        await servers[who].once()
        assert sum(server.leading for server in servers) <= 1
    await store.close()


def _nodes(
    store: SqliteStore, clock: FakeClock, id: str, ended: list[bytes], name: str | None = None, port: int = 0
) -> Nodes:
    async def end(ids: Sequence[bytes]) -> None:
        ended.extend(ids)

    me = Node(id=f"node_{id}", name=name or id, port=port, started_at=clock.now(), until=0)
    return Nodes(store, clock, me, 5.0, lambda: [id.encode()], end)


async def test_servers_know_each_other_and_bury_the_dead(store: SqliteStore) -> None:
    """A server that is not heard of any more is left out of the list; the leader ends its database sessions once."""
    clock = FakeClock()
    ended: list[bytes] = []
    one, two = _nodes(store, clock, "one", ended), _nodes(store, clock, "two", ended)
    await one.once()
    await two.once()
    assert [node.name for node in await one.all()] == ["one", "two"]
    clock.advance(4)
    await one.once()
    clock.advance(2)
    assert [node.name for node in await one.all()] == ["one"]
    assert await one.bury() == 1
    assert ended == [b"two"]
    assert await one.bury() == 0
    await two.once()  # it was only slow: the first try learns that it was buried, the second brings it back
    await two.once()
    assert [node.name for node in await one.all()] == ["one", "two"]
    await two.leave()
    assert [node.name for node in await one.all()] == ["one"]


async def test_a_server_that_starts_again_ends_what_its_last_process_left_behind(store: SqliteStore) -> None:
    """Same name and port: the earlier one is gone, at once; others are left alone, and so are those that let the system choose a port."""
    clock = FakeClock()
    ended: list[bytes] = []
    places = [("one", 8640), ("one", 8641), ("two", 8640), ("one", 0)]
    before = [_nodes(store, clock, f"{name}{port}", ended, name, port) for name, port in places]
    for nodes in before:
        await nodes.once()
    assert await _nodes(store, clock, "new", ended, "one", 0).succeed() == []
    assert await _nodes(store, clock, "new", ended, "one", 8640).succeed() == ["node_one8640"]
    assert ended == [b"one8640"]
    assert len(await before[1].all()) == 3


async def test_the_dead_are_freed_before_any_is_removed(store: SqliteStore) -> None:
    """One of them may have died while it removed another, and hold that entry until its session is ended."""
    clock = FakeClock()
    ended: list[bytes] = []
    for name in ("one", "two"):
        await _nodes(store, clock, name, ended).once()
    clock.advance(6)
    seen: list[int] = []

    async def end(ids: Sequence[bytes]) -> None:
        seen.append(len(ids))

    me = Node(id="node_me", name="me", started_at=clock.now(), until=0)
    assert await Nodes(store, clock, me, 5.0, list, end).bury() == 2
    assert seen == [2]


async def test_a_server_knows_that_it_is_cut_off(store: SqliteStore) -> None:
    """After its entry's life without an answer of the store a server counts itself out."""
    clock = FakeClock()
    one = _nodes(store, clock, "one", [])
    await one.once()
    clock.advance(4.9)
    assert not one.cut_off
    clock.advance(0.2)
    assert one.cut_off
    await one.once()
    assert not one.cut_off


async def test_time_is_that_of_the_store() -> None:
    """Wall time is moved by the measured difference; durations are not."""
    system = FakeClock()
    ahead = 2500.0

    async def measure() -> float:
        return ahead

    clock = StoreClock(system, measure)
    assert clock.now() == system.now()
    await clock.once()
    assert clock.now() == system.now() + 2500
    assert clock.monotonic() == system.monotonic()
