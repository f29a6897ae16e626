"""How tasks with limits go on: the moves of the transition table that limits cause, pure."""

from collections.abc import Sequence

from msgspec.structs import replace

from mcp_control.tasks.limit_model import Gate, Hold
from mcp_control.tasks.limiting import wait_at_first, waiting_message
from mcp_control.tasks.model import Task, TaskState
from mcp_control.tasks.transitions import check


def gated(task: Task, gates: list[Gate], now: int) -> Task:
    """Give a new task its limits: one that was to wait for an agent waits for them first."""
    after = replace(task, gates=gates)
    return wait_at_first(after, now) if task.state is TaskState.QUEUED else after


def wait_at(task: Task, name: str, gate: Gate, holds: Sequence[Hold]) -> Task:
    """Let a blocked task wait for another of its limits, with what it may keep meanwhile. Not a change of state."""
    check(task, "admit")
    reason, message = waiting_message(gate)
    return replace(
        task,
        waits_at=name,
        passed=task.passed + (name != task.waits_at),
        holds=[*task.holds, *holds],
        reason=reason,
        message=message,
    )


def admit(task: Task, holds: Sequence[Hold], now: int) -> Task:
    """Queue a task that has passed its limits."""
    check(task, "admit")
    return replace(
        task,
        state=TaskState.QUEUED,
        state_at=now,
        waits_at="",
        passed=0,
        holds=[*task.holds, *holds],
        reason="",
        message="",
    )


def postpone(task: Task, until: int, now: int) -> Task:
    """Let a task that waits for its time wait longer. Not a change of state."""
    check(task, "promote")
    return replace(task, not_before=until, state_at=now)
