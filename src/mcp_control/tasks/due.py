"""What time alone asks of a task: when its next step is due, and that step. Pure."""

from mcp_control.tasks.asking import timed_out
from mcp_control.tasks.budgets import out_of_time
from mcp_control.tasks.model import FINAL_STATES, Failure, Task, TaskState
from mcp_control.tasks.transitions import cancel, exhaust, expire, fail, promote


def due_at(task: Task, cancel_grace_ms: int) -> int | None:
    """Return when time alone asks for a step: promotion, attempt timeout, forced cancellation, the end of a budget's time
    or of that to answer, or deadline, whichever is first."""
    if task.state in FINAL_STATES:
        return None
    due = task.deadline_at
    if task.state is TaskState.SCHEDULED:
        due = _earlier(due, task.not_before)
    elif task.asked is not None and task.state is TaskState.INPUT_REQUIRED:
        due = _earlier(due, task.asked.due_at)
    lease = task.lease
    if lease is not None:
        if task.timeout_ms is not None:
            due = _earlier(due, lease.since + task.timeout_ms)
        if task.cancel is not None:
            due = _earlier(due, task.cancel.at + cancel_grace_ms)
        if task.ceiling is not None:
            due = _earlier(due, task.ceiling.at)
    return due


def _earlier(one: int | None, other: int | None) -> int | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)


def on_time(task: Task, now: int, chance: float, cancel_grace_ms: int) -> Task | None:
    """Take the step that time asks for; None when there is none yet. Ties are settled in the order deadline, cancellation, timeout,
    budget, promotion, answer."""
    if task.state in FINAL_STATES:
        return None
    if task.deadline_at is not None and task.deadline_at <= now:
        return expire(task, now)
    if task.lease is not None:
        if task.cancel is not None and task.cancel.at + cancel_grace_ms <= now:
            return cancel(task, now)
        if task.timeout_ms is not None and task.lease.since + task.timeout_ms <= now:
            failure = Failure(
                cause="timeout", code="timeout", message=f"the attempt took longer than {task.timeout_ms / 1000:g} s"
            )
            return fail(task, failure, now, chance, "timeout")
        if task.ceiling is not None and task.ceiling.at <= now:
            return exhaust(task, out_of_time(task.ceiling), now, stop=task.ceiling.on_exhausted == "stop")
    if task.state is TaskState.SCHEDULED and (task.not_before is None or task.not_before <= now):
        return promote(task, now)
    asked = task.asked
    if (
        asked is not None
        and task.state is TaskState.INPUT_REQUIRED
        and asked.due_at is not None
        and asked.due_at <= now
    ):
        return timed_out(task, asked, now)
    return None
