"""Children: what agents submit for the tasks they hold."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_control.kernel.errors import BudgetExhausted, Forbidden, Invalid, LeaseSuperseded, NotFound
from mcp_control.tasks.children import child_of
from mcp_control.tasks.limit_model import Debounce, Unique
from mcp_control.tasks.model import Lease, Origin, Task, TaskSpec, TaskState
from tests.tasks.world import ADMIN, Peer, World, world_at

TRUST = ("trusted", "external", "tainted")


async def _child(world: World, peer: Peer, parent: Task, **fields: object) -> Task:
    token = peer.given[parent.id].lease_token
    spec = msgspec.convert({"type": "inner", **fields}, TaskSpec)
    return (await world.tasks.submit_child(peer.actor, parent.id, token, spec, Origin(principal=peer.actor.id))).task


async def test_an_agent_submits_children_of_what_it_holds_and_nothing_else(tmp_path: Path) -> None:
    """A child names its parent and draws from its budget; without the live lease there is none, and no task of another kind."""
    async with world_at(tmp_path) as world:
        peer = await world.agent()
        parent = await world.submit(budget={"tokens": 100, "depth": 1})
        await peer.until_given()
        child = await _child(world, peer, parent, idempotency_key="a")
        assert (child.links.parent_id, child.links.root_id, child.links.depth) == (parent.id, parent.id, 1)
        assert child.draws == [parent.id]
        assert (child.origin.principal, child.origin.on_behalf_of) == (parent.id, ADMIN.id)
        assert (await _child(world, peer, parent, idempotency_key="a")).id == child.id
        with pytest.raises(Forbidden):
            await world.tasks.submit(peer.actor, [TaskSpec(type="inner")], Origin())
        inner = await world.agent("inner", "inner")
        await inner.until_given()
        with pytest.raises(BudgetExhausted):
            await _child(world, inner, child)
        token = peer.given[parent.id].lease_token
        spec, origin = TaskSpec(type="inner"), Origin()
        for actor, parent_id, lease in (
            (peer.actor, parent.id, "another"),
            (inner.actor, parent.id, token),
            (peer.actor, child.id, token),
            (ADMIN, parent.id, token),
        ):
            with pytest.raises(LeaseSuperseded):
                await world.tasks.submit_child(actor, parent_id, lease, spec, origin)
        with pytest.raises(NotFound):
            await world.tasks.submit_child(peer.actor, "task_none", token, spec, origin)
        await peer.done(peer.given[parent.id])
        with pytest.raises(LeaseSuperseded):
            await _child(world, peer, parent, idempotency_key="b")


async def test_a_repeated_attempt_finds_the_children_of_the_one_before_it(tmp_path: Path) -> None:
    """A key counts for the parent: the agent that has its next attempt gets the same child, not a second one."""
    async with world_at(tmp_path) as world:
        first = await world.agent()
        parent = await world.submit()
        await first.until_given()
        child = await _child(world, first, parent, idempotency_key="a")
        await world.agents.leave(first.live)
        second = await world.agent("other")
        await second.until_given()
        assert (await _child(world, second, parent, idempotency_key="a")).id == child.id


@given(above=st.sampled_from(TRUST), given_=st.sampled_from(TRUST))
def test_a_child_is_trusted_no_more_than_its_parent(above: str, given_: str) -> None:
    """What comes from outside stays so, whatever the agent says of it."""
    parent = _held(above)
    spec = msgspec.convert({"type": "t", "trust": given_}, TaskSpec)
    assert TRUST.index(child_of(parent, "agent_1", "secret", spec).trust) == max(map(TRUST.index, (above, given_)))


@pytest.mark.parametrize(
    "wrong",
    [
        TaskSpec(type="t", parent_id="task_2"),
        TaskSpec(type="t", unique=Unique(key="k")),
        TaskSpec(type="t", debounce=Debounce(key="k", seconds=1)),
    ],
)
def test_a_child_has_no_other_parent_and_no_key_of_others(wrong: TaskSpec) -> None:
    """A key that others use could replace or show what is theirs."""
    with pytest.raises(Invalid):
        child_of(_held("trusted"), "agent_1", "secret", wrong)


def _held(trust: str) -> Task:
    lease = Lease(agent_id="agent_1", instance_id="inst_1", token="secret", since=0)
    fields = {"id": "task_1", "version": 1, "type": "t", "state": TaskState.RUNNING, "state_at": 0, "created_at": 0}
    task = msgspec.convert({**fields, "lane": "l", "order": 0, "trust": trust}, Task)
    return msgspec.structs.replace(task, lease=lease)
