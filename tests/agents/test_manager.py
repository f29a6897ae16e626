"""Agents on a real store: names, pages, orders, edits, states, figures."""

from pathlib import Path

import msgspec
import pytest

from mcp_control.agents.model import AgentSpec, AgentState, Beat, Capability
from mcp_control.agents.service import AgentEdit, AgentFilter
from mcp_control.kernel.errors import AgentSuspended, Forbidden, InvalidTransition, NameTaken, NotFound, VersionConflict
from mcp_control.security.model import Actor
from mcp_control.tasks.model import Failure
from mcp_control.testing.clock import FakeClock
from tests.tasks.world import ADMIN, world_at

ENROLMENT = Actor(id="enrol_1", kind="token", roles=("enrolment",))


def agent_actor(agent_id: str) -> Actor:
    """Build the actor of an agent."""
    return Actor(id=agent_id, kind="agent", roles=("agent",))


async def test_a_name_is_resumed_only_by_who_may(tmp_path: Path) -> None:
    """An administrator and the agent itself resume a name; an enrolment and another agent do not, and nobody else registers."""
    async with world_at(tmp_path) as world:
        register = world.manager.register
        spec = AgentSpec(name="w")
        first = await register(ENROLMENT, spec)
        assert not first.resumed
        own = agent_actor(first.agent.id)
        for actor in (ADMIN, own):
            again = await register(actor, spec)
            assert (again.resumed, again.agent.id) == (True, first.agent.id)
        changed = await register(own, msgspec.structs.replace(spec, slots=3))
        assert (changed.agent.id, changed.agent.spec.slots) == (first.agent.id, 3)
        for actor in (ENROLMENT, agent_actor("agent_other")):
            with pytest.raises(NameTaken):
                await register(actor, spec)
        with pytest.raises(Forbidden):
            await register(Actor(id="user_x", kind="user"), AgentSpec(name="x"))


async def test_a_retired_name_is_free_and_its_credential_is_suspended(tmp_path: Path) -> None:
    """Retiring ends an identity for good: the name makes a new one, the old credential opens no session."""
    async with world_at(tmp_path) as world:
        peer = await world.agent("w")
        await world.manager.retire(ADMIN, peer.actor.id)
        assert (await world.manager.retire(ADMIN, peer.actor.id)).retired_at is not None
        with pytest.raises(InvalidTransition):
            await world.manager.drain(ADMIN, peer.actor.id)
        with pytest.raises(AgentSuspended):
            await peer.connect()
        fresh = await world.manager.register(ADMIN, AgentSpec(name="w"))
        assert (fresh.resumed, fresh.agent.id != peer.actor.id) == (False, True)
        assert (await world.manager.get(ADMIN, peer.actor.id)).state is AgentState.RETIRED
        with pytest.raises(NotFound):
            await world.manager.get(ADMIN, "nobody")


async def test_a_quarantined_agent_opens_no_session(tmp_path: Path) -> None:
    """A quarantined agent is told that it is suspended until it is resumed."""
    async with world_at(tmp_path) as world:
        peer = await world.agent()
        await world.agents.disconnected(peer.live)
        await world.manager.quarantine(ADMIN, peer.actor.id, "fails")
        with pytest.raises(AgentSuspended):
            await peer.connect()
        await world.manager.resume(ADMIN, peer.actor.id)
        await peer.connect()


async def test_filters_and_pages_show_every_agent_once(tmp_path: Path) -> None:
    """Walking the pages in any order shows each agent that matches exactly once."""
    async with world_at(tmp_path) as world:
        for n in range(23):
            spec = AgentSpec(
                name=f"w{n:02d}", capabilities=[Capability(name="even" if n % 2 == 0 else "odd")], labels={"n": str(n)}
            )
            await world.manager.register(ADMIN, spec)
        for sort in ("created", "name", "last_beat"):
            for wanted, count in ((AgentFilter(), 23), (AgentFilter(capability="even"), 12)):
                seen, cursor = [], None
                while True:
                    page = await world.manager.list(ADMIN, wanted, cursor=cursor, limit=5, sort=sort)
                    seen += [agent.name for agent in page.items]
                    if (cursor := page.next_cursor) is None:
                        break
                assert len(seen) == len(set(seen)) == count
                assert sort != "name" or seen == sorted(seen)
        for wanted, count in (
            (AgentFilter(labels={"n": "7"}), 1),
            (AgentFilter(state=AgentState.OFFLINE), 23),
            (AgentFilter(free=True), 0),
            (AgentFilter(kind="script"), 0),
        ):
            assert len((await world.manager.list(ADMIN, wanted)).items) == count


async def test_an_edit_needs_the_current_version(tmp_path: Path) -> None:
    """An edit based on an older version is refused and changes nothing."""
    async with world_at(tmp_path) as world:
        agent = (await world.manager.register(ADMIN, AgentSpec(name="w"))).agent
        edited = await world.manager.edit(ADMIN, agent.id, AgentEdit(description="x", slots=4), agent.version)
        assert (edited.spec.description, edited.spec.slots, edited.version) == ("x", 4, agent.version + 1)
        with pytest.raises(VersionConflict):
            await world.manager.edit(ADMIN, agent.id, AgentEdit(description="y"), agent.version)
        assert (await world.manager.get(ADMIN, agent.id)).spec.description == "x"


async def test_states_follow_what_instances_do(tmp_path: Path) -> None:
    """Online, busy, stalled while beats come without a tick, online again, draining, offline."""
    clock = FakeClock()
    async with world_at(tmp_path, clock) as world:
        peer = await world.agent()

        async def state() -> AgentState:
            return world.manager.view(await world.manager.get(ADMIN, peer.actor.id)).state

        assert await state() is AgentState.ONLINE
        task = await world.submit()
        assert await state() is AgentState.BUSY
        for _ in range(9):
            clock.advance(10)
            await world.agents.heartbeat(peer.live, Beat(tick=1, running=[task.id]))
        assert await state() is AgentState.STALLED
        await world.agents.heartbeat(peer.live, Beat(tick=2, running=[task.id]))
        assert await state() is AgentState.BUSY
        shown = world.manager.view(await world.manager.get(ADMIN, peer.actor.id))
        assert shown.last_beat_at is not None
        assert round(shown.last_beat_at.timestamp() * 1000) == clock.now()
        await world.manager.drain(ADMIN, peer.actor.id)
        assert await state() is AgentState.DRAINING
        await world.manager.resume(ADMIN, peer.actor.id)
        await world.agents.disconnected(peer.live)
        assert await state() is AgentState.OFFLINE


async def test_figures_count_what_an_agent_did(tmp_path: Path) -> None:
    """Completed, failed and lost attempts are counted and survive a restart once a heartbeat has written them."""
    async with world_at(tmp_path) as world:
        peer = await world.agent()
        await peer.done(peer.given[(await world.submit()).id])
        await peer.done(peer.given[(await world.submit()).id], "failed", failure=Failure(error_class="permanent"))
        await world.agents.heartbeat(peer.live, Beat(tick=1))
    async with world_at(tmp_path) as world:
        agent = await world.manager.get(ADMIN, peer.actor.id)
        assert (agent.completed, agent.failed, agent.lost) == (1, 1, 0)
