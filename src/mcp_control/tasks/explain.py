"""Why a task is not running: the first reason in the order the scheduler looks (requirement T7). Pure."""

from collections.abc import Sequence

import msgspec

from mcp_control.agents.balancing import home_of
from mcp_control.agents.matching import Demand, misfit
from mcp_control.agents.model import AgentSpec, AgentState
from mcp_control.agents.reserving import Load, amount, limits_of, load_of, short_of
from mcp_control.kernel.clock import to_datetime
from mcp_control.tasks.asking import awaited, question_id
from mcp_control.tasks.model import Task, TaskState
from mcp_control.tasks.view_model import Explanation


class Room(msgspec.Struct, frozen=True):
    """What an instance of an agent has left, the tasks that hold the rest, when the last of them began to, and their types and times."""

    left: Load
    holders: Sequence[str]
    since: int
    running: Sequence[tuple[str, int]] = ()

    def of_type(self, task_type: str) -> list[str]:
        """Return the tasks of a type that it holds."""
        return [holder for holder, (name, _) in zip(self.holders, self.running, strict=False) if name == task_type]


class Seen(msgspec.Struct, frozen=True):
    """What the scheduler sees of an agent, and of its instances where somebody asked."""

    id: str
    spec: AgentSpec
    state: AgentState
    free: int
    state_at: int
    rooms: Sequence[Room] = ()

    def full_of(self, task_type: str) -> bool:
        """Say whether each instance has as many tasks of a type as the agent takes at once."""
        limit = limits_of(self.spec).get(task_type)
        return (
            limit is not None and bool(self.rooms) and all(len(room.of_type(task_type)) >= limit for room in self.rooms)
        )


def explain(task: Task, demand: Demand, agents: Sequence[Seen], ahead: int | None, elsewhere: int = 0) -> Explanation:
    """Return the first reason why the task is not running, or what it is doing.

    Args:
        ahead: tasks before it in its lane.
        elsewhere: tasks of other lanes that have their turn before it with the same agents.
    """
    if task.final:
        return _because(
            task,
            "finished",
            f"the task is {task.state.value}" + (f": {task.message}" if task.message else ""),
            task.state_at,
        )
    if task.hold is not None and task.lease is None:
        message = f"{task.hold.by} holds it back" + (f": {task.hold.reason}" if task.hold.reason else "")
        return _because(task, "paused", message, task.hold.at, [task.hold.by])
    if task.state is TaskState.RUNNING:
        return _because(task, "running", "an agent is working on it", task.state_at, _holder(task))
    if task.state is TaskState.ASSIGNED:
        return _because(task, "assigned", "given to an agent that has not begun yet", task.state_at, _holder(task))
    if task.state is TaskState.SCHEDULED:
        code = "retry-backoff" if task.reason == "retrying" else "scheduled"
        found = _because(task, code, task.message or "its start time has not come", task.state_at)
        return (
            found
            if task.not_before is None
            else msgspec.structs.replace(found, expected_start=to_datetime(task.not_before))
        )
    if task.state is TaskState.BLOCKED:
        return _because(task, task.reason, task.message, task.state_at)
    if task.asked is not None and task.state is TaskState.INPUT_REQUIRED:
        ask = task.asked.ask
        people = awaited(ask)
        whom = ", ".join(people[:5]) + ("…" if len(people) > 5 else "") if people else "anybody who may answer"
        message = f"it asks {whom}: {ask.title} ({question_id(task.id, ask.key)})"
        return _because(task, "input-required", message, task.state_at, people[:10])
    if task.state is not TaskState.QUEUED:
        return _because(task, task.state.value.replace("_", "-"), task.message or "it waits", task.state_at)
    return _queued(task, demand, agents, ahead, elsewhere)


def _queued(task: Task, demand: Demand, agents: Sequence[Seen], ahead: int | None, elsewhere: int) -> Explanation:
    reasons = {agent.id: misfit(agent.id, agent.spec, demand) for agent in agents}
    fit = [agent for agent in agents if reasons[agent.id] is None]
    if not fit:
        shown = sorted({f"{agent.spec.name} {reasons[agent.id]}" for agent in agents})[:3]
        detail = f": {'; '.join(shown)}" if shown else "; none is registered"
        return _because(task, "no-capable-agent", f"no registered agent can take it{detail}", task.state_at, [], ahead)
    if demand.waits and demand.bucket is not None:
        home = home_of(demand.bucket, [agent.id for agent in fit])
        fit = [agent for agent in fit if agent.id == home]
        if fit[0].free <= 0 or fit[0].state is not AgentState.ONLINE:
            why = "is full" if fit[0].state in (AgentState.ONLINE, AgentState.BUSY) else f"is {fit[0].state.value}"
            message = f"its key belongs to agent {fit[0].spec.name}, which {why}"
            return _because(task, "sticky-agent", message, fit[0].state_at, [fit[0].id], ahead)
    there = [agent for agent in fit if agent.state in (AgentState.ONLINE, AgentState.BUSY)]
    if not there:
        states = sorted({agent.state.value for agent in fit})
        since = max(agent.state_at for agent in fit)
        message = f"the agents that can take it are {' or '.join(states)}"
        return _because(task, "agents-unavailable", message, since, [agent.id for agent in fit[:10]], ahead)
    if (found := _short(task, demand, there, ahead)) is not None:
        return found
    if not any(agent.free for agent in there):
        message = f"all {len(there)} agents that can take it are full"
        rooms = [room for agent in there for room in agent.rooms]
        holders = [holder for room in rooms for holder in room.holders] or [agent.id for agent in there]
        since = max([task.state_at, *(room.since for room in rooms)])
        return _because(task, "agents-full", message, since, holders[:10], ahead)
    if (found := _full_of_type(task, there, ahead)) is not None:
        return found
    if ahead or elsewhere:
        parts = [f"{ahead} tasks are before it in its lane"] if ahead else []
        if elsewhere:
            parts.append(f"{elsewhere} tasks of other lanes have their turn with its agents first")
        return _because(task, "waiting-turn", "; ".join(parts), task.state_at, [], ahead)
    return _because(task, "next", "it is next; an agent is about to get it", task.state_at, [], ahead)


def _short(task: Task, demand: Demand, agents: Sequence[Seen], ahead: int | None) -> Explanation | None:
    """Return which resource keeps a task out that takes more than a slot, where it fits nowhere now."""
    load = load_of(demand.slots, demand.resources)
    if load is None:
        return None
    told: list[str] = []
    holders: dict[str, None] = {}
    since = task.state_at
    for agent in agents:
        for room in agent.rooms:
            name = short_of(load, room.left)
            if name is None:
                return None
            told.append(f"{agent.spec.name} has {amount(name, room.left)} left, wanted {amount(name, load)}")
            holders.update(dict.fromkeys(room.holders))
            since = max(since, room.since)
    if not told:
        return None
    return _because(task, "resources-short", "; ".join(sorted(told)[:3]), since, list(holders)[:10], ahead)


def _full_of_type(task: Task, agents: Sequence[Seen], ahead: int | None) -> Explanation | None:
    """Return which agents have free slots, but as many tasks of its type as they take at once; None where one could take it."""
    full = [agent for agent in agents if agent.free]
    if not all(agent.full_of(task.type) for agent in full):
        return None
    told = sorted({f"{agent.spec.name} takes {limits_of(agent.spec)[task.type]} at once" for agent in full})[:3]
    rooms = [room for agent in full for room in agent.rooms]
    holders = [holder for room in rooms for holder in room.of_type(task.type)]
    since = max([task.state_at, *(began for room in rooms for name, began in room.running if name == task.type)])
    message = f"agents full for this type: {'; '.join(told)}"
    return _because(task, "agents-full-for-type", message, since, holders[:10], ahead)


def _holder(task: Task) -> list[str]:
    return [] if task.lease is None else [task.lease.agent_id, task.lease.instance_id]


def _because(
    task: Task, code: str, message: str, since: int, held_by: Sequence[str] = (), ahead: int | None = None
) -> Explanation:
    return Explanation(
        task_id=task.id,
        state=task.state,
        code=code,
        message=message,
        since=to_datetime(since),
        held_by=list(held_by),
        ahead=ahead,
    )
