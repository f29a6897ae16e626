"""Tasks that take several slots on agents that small tasks keep busy: they get their turn, and nobody else pays more than that takes."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from mcp_control.agents.matching import Demand
from mcp_control.agents.model import Agent, AgentSpec, Capability, Instance, Resources
from mcp_control.agents.reserving import Load, fits, lacking, leaves
from mcp_control.agents.sessions import Frame, Session
from mcp_control.tasks.fairness import MEDIUM, Line, Share
from mcp_control.tasks.keeping_free import PATIENCE, Keeper, nearest
from mcp_control.tasks.lanes import Lane
from tests.tasks.world import world_at

TICK = 0.25
LOADS = st.builds(Load, st.integers(1, 8), st.integers(0, 4), st.integers(0, 4), st.integers(0, 2))


def nowhere(_frames: Sequence[Frame]) -> None:
    """Send nothing."""


def session_of(name: str, slots: int, gpu: int = 0) -> Session:
    spec = AgentSpec(name=name, capabilities=[Capability(name="t")], slots=slots, resources=Resources(gpu=gpu))
    agent = Agent(id=f"agent_{name}", version=1, spec=spec, created_at=0)
    instance = Instance(id=f"inst_{name}", version=1, agent_id=agent.id, started_at=0, lease_ms=1, lease_until=1)
    return Session(agent, instance, slots, nowhere, None)


def lane_of(name: str, rank: int, sessions: list[Session], slots: int = 1, gpu: int = 0) -> Lane:
    lane = Lane(
        name, Line(Share("default", "", None), MEDIUM), Demand(type="t", slots=slots, resources=Resources(gpu=gpu))
    )
    lane.rank, lane.waiting, lane.sessions = rank, 1, set(sessions)
    return lane


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.lists(st.integers(2, 5), min_size=1, max_size=3),
    st.lists(st.integers(1, 4), min_size=1, max_size=40),
)
def test_nobody_who_needs_several_slots_is_passed_over_for_ever(
    slots: list[int], wanted: list[int], lasting: list[int]
) -> None:
    """However many small tasks come and however long each of them takes: who came before them starts within a bound."""
    sessions = [session_of(f"s{n}", size) for n, size in enumerate(slots)]
    big = [lane_of(f"big{n}", n, sessions, min(size, max(slots))) for n, size in enumerate(wanted)]
    big = [lane for lane in big if lane.load is not None]  # where no agent has more than a slot, nobody needs more
    for lane in big:
        lane.sessions = {session for session in sessions if session.slots >= lane.demand.slots}
    small = lane_of("small", 1000, sessions)
    keeper, ends, number = Keeper(), dict[tuple[Session, str], int](), 0
    bound = (round(PATIENCE / TICK) + 2 * max(lasting) + 3) * (len(big) + 1)
    for tick in range(bound):
        for (session, task_id), end in [*ends.items()]:
            if end <= tick:
                session.let_go(task_id)
                del ends[session, task_id]
        for lane in [*big, small]:
            while lane is small or lane in big:
                found = [each for each in sessions if each in lane.sessions and lane.room(each) > 0]
                found = [each for each in found if keeper.open(lane, each)]
                if not found:
                    keeper.passed(lane, tick * TICK)
                    break
                number += 1
                found[0].hold(f"{number}", lane.load, "t")
                ends[found[0], f"{number}"] = tick + lasting[number % len(lasting)]
                if lane is not small:
                    keeper.served(lane)
                    lane.waiting = 0
                    big.remove(lane)
    assert not big
    assert not keeper, "nothing is kept for those who have it"


@settings(deadline=None)
@given(LOADS, LOADS, LOADS)
def test_what_is_kept_is_left(kept: Load, load: Load, left: Load) -> None:
    """A task that may go beside what is kept leaves what is kept of all it uses; one that takes nothing that is short may always."""
    after = Load(left.slots - load.slots, left.cpu - load.cpu, left.memory_mb - load.memory_mb, left.gpu - load.gpu)
    if leaves(kept, load, left):
        assert all(
            getattr(after, name) >= getattr(kept, name)
            for name in ("slots", "cpu", "memory_mb", "gpu")
            if getattr(load, name)
        )
    elif fits(load, left) and lacking(kept, left) == 0:
        assert lacking(kept, after) > 0
    assert (lacking(kept, left) == 0) == all(
        getattr(left, name) >= getattr(kept, name) for name in ("slots", "cpu", "memory_mb", "gpu")
    )


def test_only_one_session_keeps_free_and_only_what_is_short() -> None:
    """The nearest session keeps what the task takes; what comes before goes there, too, and who uses nothing of it is not held up."""
    near, far = session_of("near", 8, gpu=1), session_of("far", 8, gpu=1)
    near.hold("a", Load(2, gpu=1), "t")
    far.hold("b", Load(3, gpu=1), "t")
    big = lane_of("big", 10, [near, far], slots=3, gpu=1)
    assert big.load is not None
    assert nearest(big.load, [far, near]) is far  # both lack the GPU, and nothing else
    keeper = Keeper()
    keeper.passed(big, 5.0)
    assert not keeper
    keeper.passed(big, 5.0 + PATIENCE)
    kept, other = (near, far) if not keeper.open(lane_of("probe", 20, [], gpu=1), near) else (far, near)
    later, earlier = lane_of("later", 20, [], gpu=1), lane_of("earlier", 5, [], gpu=1)
    plain = lane_of("plain", 20, [])
    assert not keeper.open(later, kept)
    assert keeper.open(later, other)
    assert keeper.open(earlier, kept)
    assert keeper.open(plain, kept), "slots are not short"
    for number in range(kept.slots - kept.taken - 3):
        kept.hold(f"c{number}", None, "t")
    assert not keeper.open(plain, kept), "three are left, and kept"
    big.waiting = 0
    assert keeper.open(later, kept), "it was withdrawn"
    keeper.tidy([later])
    assert not keeper


async def test_a_task_of_several_slots_starts_on_an_agent_that_is_never_idle(tmp_path: Path) -> None:
    """Small tasks come without end and one ends after the other; the task that takes all slots starts nevertheless, and then they go on."""
    async with world_at(tmp_path) as world:
        peer = await world.agent(slots=2)
        for _ in range(3):
            await world.submit()
        working = await peer.until_given(2)
        whole = await world.submit(needs={"slots": 2})

        async def idle() -> bool:
            return world.dispatcher.idle

        async with asyncio.timeout(30):
            while whole.id not in peer.given:
                await world.submit()
                seen = len(peer.given)
                await peer.done(working.pop(0))
                await world.until(idle)
                working += [*peer.given.values()][seen:]
        assert peer.live.taken == 2
        before = len(peer.given)
        await peer.done(peer.given[whole.id])
        await peer.until_given(before + 2)
