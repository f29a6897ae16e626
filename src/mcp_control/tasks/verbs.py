"""What people and time may ask of a task, as decisions on the task as it is: pure functions that return `Decide` callables."""

from collections.abc import Callable, Mapping

from msgspec.structs import replace

from mcp_control.agents.matching import misfit
from mcp_control.agents.model import Agent
from mcp_control.kernel.errors import AlreadyTerminal, InvalidTransition, Unroutable, VersionConflict
from mcp_control.tasks.ask_model import Answered
from mcp_control.tasks.asking import answered
from mcp_control.tasks.budgets import CODE
from mcp_control.tasks.due import on_time
from mcp_control.tasks.exhaustion import exhausted_facts
from mcp_control.tasks.lanes import demand_of, lane_of
from mcp_control.tasks.ledger import Decide, Move
from mcp_control.tasks.model import HELD_STATES, Request, Task, TaskState
from mcp_control.tasks.records import CANCEL_GRACE_MS, task_fact
from mcp_control.tasks.transitions import allowed_verbs, lose, release, request_cancel


def cancelling(actor: str, reason: str, now: int) -> Decide:
    """Cancel a task; one that is already being cancelled stays as it is, a final one cannot be cancelled."""

    def decide(task: Task) -> Move | None:
        if task.final:
            raise InvalidTransition(f"the task is already {task.state.value}", state=task.state.value, allowed=[])
        after = request_cancel(task, Request(at=now, by=actor, reason=reason))
        if after is task:
            return None
        kind = "task.cancelled" if after.final else "task.cancel_requested"
        return Move(after, [task_fact(kind, after, actor, now)])

    return decide


def losing(instance_id: str, now: int) -> Decide:
    """Take a task back from an instance whose lease is over, if that instance still holds it."""

    def decide(task: Task) -> Move | None:
        if task.lease is None or task.lease.instance_id != instance_id:
            return None
        after = lose(task, now)
        kind = "task.lost" if not after.final else f"task.{after.state.value}"
        return Move(after, [task_fact(kind, after, "system", now, agent_id=task.lease.agent_id)])

    return decide


def releasing(instance_id: str, now: int) -> Decide:
    """Take back a task that an instance hands over, if it still holds it."""

    def decide(task: Task) -> Move | None:
        if task.lease is None or task.lease.instance_id != instance_id:
            return None
        after = release(task, now)
        kind = "task.released" if not after.final else "task.cancelled"
        return Move(after, [task_fact(kind, after, "system", now, agent_id=task.lease.agent_id)])

    return decide


def timing(now: int, chance: float) -> Decide:
    """Take the step that time asks for."""

    def decide(task: Task) -> Move | None:
        after = on_time(task, now, chance, CANCEL_GRACE_MS)
        if after is None:
            return None
        if after.reason == CODE:
            return Move(after, exhausted_facts(task, after, "system", now))
        kind = "task.retrying" if after.state is TaskState.SCHEDULED else f"task.{after.state.value}"
        return Move(after, [task_fact(kind, after, "system", now)])

    return decide


def answering(key: str, given: Answered, now: int) -> Decide:
    """Let a task go on that waits for the answer to this question; the decision raises InvalidTransition where it does not."""

    def decide(task: Task) -> Move | None:
        after = answered(task, key, given, now)
        return Move(after, [task_fact(f"task.{after.state.value}", after, given.by, now)])

    return decide


def pausing(actor: str, reason: str, now: int) -> Decide:
    """Hold a task back: no agent gets it until it is let go, and it keeps its place. What runs goes on; held already, it stays so."""

    def decide(task: Task) -> Move | None:
        if task.final:
            raise InvalidTransition(f"the task is already {task.state.value}", state=task.state.value, allowed=[])
        if task.hold is not None:
            return None
        after = replace(task, hold=Request(at=now, by=actor, reason=reason))
        return Move(after, [task_fact("task.paused", after, actor, now)])

    return decide


def resuming(actor: str, now: int) -> Decide:
    """Let a task go that was held back; one that was not stays as it is."""

    def decide(task: Task) -> Move | None:
        if task.final:
            raise InvalidTransition(f"the task is already {task.state.value}", state=task.state.value, allowed=[])
        if task.hold is None:
            return None
        after = replace(task, hold=None)
        return Move(after, [task_fact("task.resumed", after, actor, now)])

    return decide


def editing(
    actor: str,
    version: int | None,
    priority: int | None,
    labels: Mapping[str, str] | None,
    now: int,
    rank: Callable[[Task], int],
) -> Decide:
    """Change priority or labels of a task that is not final. `version` None takes whatever version is there.

    Args:
        rank: of a task with its new priority.
    """

    def decide(task: Task) -> Move | None:
        if version is not None and task.version != version:
            raise VersionConflict("the task was changed meanwhile; read it again", current=str(task.version))
        if task.final:
            raise InvalidTransition(f"the task is already {task.state.value}", state=task.state.value, allowed=[])
        after = task
        if priority is not None:
            after = replace(after, priority=priority)
            after = replace(after, rank=rank(after), lane=lane_of(after))
        if labels is not None:
            after = replace(after, labels=dict(labels))
        return None if after == task else Move(after, [task_fact("task.updated", after, actor, now)])

    return decide


def reassigning(actor: str, agent: Agent, now: int) -> Decide:
    """Assign a waiting task to one agent by hand: it joins the lane that only this agent serves.

    The decision raises Unroutable where the agent cannot do it.
    """

    def decide(task: Task) -> Move | None:
        if task.final:
            raise AlreadyTerminal(f"the task is already {task.state.value}", state=task.state.value)
        if task.state in HELD_STATES:
            raise InvalidTransition(
                "an agent is working on it", state=task.state.value, allowed=allowed_verbs(task.state)
            )
        reason = misfit(agent.id, agent.spec, replace(demand_of(task), agent=agent.id))
        if reason is not None:
            raise Unroutable(f"agent {agent.spec.name} cannot take it: it {reason}")
        after = replace(task, needs=replace(task.needs, agent=agent.id))
        after = replace(after, lane=lane_of(after))
        return Move(after, [task_fact("task.updated", after, actor, now, assigned_to=agent.id)])

    return decide
