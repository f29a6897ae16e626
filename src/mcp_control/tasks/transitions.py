"""The one transition table of tasks, and the pure functions that move a task along it.

Every change of a task's state happens here. Each function takes the task as it is and returns it as it becomes; none touches `version`,
which belongs to the store. Time, tokens and chance are arguments. An illegal move raises `InvalidTransition` with the state it was in.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from msgspec.structs import replace

from mcp_control.kernel.errors import InvalidTransition
from mcp_control.tasks.limiting import wait_at_first
from mcp_control.tasks.model import FINAL_STATES, Attempt, Failure, Lease, Request, Task, TaskState
from mcp_control.tasks.retry import backoff_ms, later_ms, may_retry, postponed

S = TaskState
_HELD: Final = (S.ASSIGNED, S.RUNNING)
_WAITING: Final = (S.SCHEDULED, S.BLOCKED, S.QUEUED, S.INPUT_REQUIRED)
LOST_LIMIT: Final = 3
KEPT_ATTEMPTS: Final = 25
FIRST_ATTEMPTS: Final = 5
OLD_TRACEBACK_MAX: Final = 2000


def _rows(sources: tuple[TaskState, ...], *targets: TaskState) -> dict[TaskState, tuple[TaskState, ...]]:
    return dict.fromkeys(sources, targets)


TRANSITIONS: Final[Mapping[str, Mapping[TaskState, tuple[TaskState, ...]]]] = MappingProxyType(
    {
        "promote": _rows((S.SCHEDULED,), S.QUEUED, S.BLOCKED),
        "admit": _rows((S.BLOCKED,), S.QUEUED),
        "assign": _rows((S.QUEUED,), S.ASSIGNED),
        "start": _rows((S.ASSIGNED,), S.RUNNING),
        "complete": _rows(_HELD, S.COMPLETED),
        "fail": _rows(_HELD, S.SCHEDULED, S.FAILED, S.CANCELLED),
        "lose": _rows(_HELD, S.QUEUED, S.FAILED, S.CANCELLED),
        "release": _rows(_HELD, S.QUEUED, S.CANCELLED),
        "restore": _rows(_HELD, S.QUEUED, S.FAILED, S.CANCELLED),
        "exhaust": _rows((*_HELD, S.QUEUED), S.FAILED, S.INPUT_REQUIRED, S.CANCELLED)
        | _rows((S.INPUT_REQUIRED,), S.FAILED),
        "ask": _rows(_HELD, S.INPUT_REQUIRED, S.CANCELLED),
        "lapse": _rows((S.INPUT_REQUIRED,), S.FAILED),
        "answer": _rows((S.INPUT_REQUIRED,), S.QUEUED, S.BLOCKED),
        "cancel": _rows((*_WAITING, *_HELD), S.CANCELLED),
        "expire": _rows((*_WAITING, *_HELD), S.EXPIRED),
    }
)
"""verb -> state it starts from -> states it may end in. A task begins `queued`, `blocked`, `scheduled` or `rejected`."""


def allowed_verbs(state: TaskState) -> list[str]:
    """Return the verbs that lead on from a state, in alphabetical order; none from a final one."""
    return sorted(verb for verb, rows in TRANSITIONS.items() if state in rows)


def check(task: Task, verb: str) -> None:
    """Raise InvalidTransition where the table has no row for a verb in the task's state."""
    if task.state not in TRANSITIONS[verb]:
        told = f"a task that is {task.state.value} cannot {verb}"
        raise InvalidTransition(told, state=task.state.value, allowed=allowed_verbs(task.state))


def promote(task: Task, now: int) -> Task:
    """Queue a scheduled task whose time has come; one with limits is blocked until it has passed them."""
    check(task, "promote")
    due = replace(task, state=S.QUEUED, state_at=now, not_before=None, reason="", message="")
    return wait_at_first(due, now) if task.gates else due


def assign(task: Task, agent_id: str, instance_id: str, token: str, now: int) -> Task:
    """Give a queued task to an agent instance: a new attempt, a new fence, a new lease."""
    check(task, "assign")
    return replace(
        task,
        state=S.ASSIGNED,
        state_at=now,
        attempt=task.attempt + 1,
        epoch=task.epoch + 1,
        lease=Lease(agent_id=agent_id, instance_id=instance_id, token=token, since=now),
        started_at=None,
        progress=0.0,
        progress_message="",
        moved_at=None,
        reason="",
        message="",
    )


def start(task: Task, now: int) -> Task:
    """Record that the attempt has begun."""
    check(task, "start")
    return replace(task, state=S.RUNNING, state_at=now, started_at=now)


def progress(task: Task, fraction: float, message: str, now: int) -> Task:
    """Record how far the attempt is; an attempt that makes progress has begun. Not a change of state for a running task."""
    running = task if task.state is S.RUNNING else start(task, now)
    return replace(running, progress=min(1.0, max(0.0, fraction)), progress_message=message, moved_at=now)


def end_attempt(task: Task, outcome: str, now: int, failure: Failure | None = None) -> list[Attempt]:
    """Return the attempts of a task with the one under way ended."""
    lease = task.lease
    if lease is None:
        return task.attempts
    ended = Attempt(
        number=task.attempt,
        agent_id=lease.agent_id,
        instance_id=lease.instance_id,
        assigned_at=lease.since,
        started_at=task.started_at,
        ended_at=now,
        outcome=outcome,
        failure=failure,
    )
    return kept_attempts([*map(_shortened, task.attempts), ended])


def kept_attempts(attempts: list[Attempt]) -> list[Attempt]:
    """Return the first and the last attempts; the numbers of those left out are missing. The first often tells more than the later."""
    if len(attempts) <= KEPT_ATTEMPTS:
        return attempts
    return [*attempts[:FIRST_ATTEMPTS], *attempts[FIRST_ATTEMPTS - KEPT_ATTEMPTS :]]


def _shortened(attempt: Attempt) -> Attempt:
    """Return an attempt that is not the newest with the end of its traceback only: a document must not grow with each failure."""
    failure = attempt.failure
    if failure is None or len(failure.traceback) <= OLD_TRACEBACK_MAX:
        return attempt
    return replace(attempt, failure=replace(failure, traceback=failure.traceback[-OLD_TRACEBACK_MAX:]))


def complete(task: Task, now: int, result_digest: str = "") -> Task:
    """Record the one final result of a task."""
    check(task, "complete")
    return replace(
        task,
        state=S.COMPLETED,
        state_at=now,
        finished_at=now,
        attempts=end_attempt(task, "completed", now),
        started_at=task.started_at or task.state_at,
        lease=None,
        last_lease=task.lease,
        lost=0,
        progress=1.0,
        failure=None,
        result_digest=result_digest,
    )


def fail(task: Task, failure: Failure, now: int, chance: float, outcome: str = "failed") -> Task:
    """End an attempt with an error: scheduled again after a backoff while the policy allows it, else failed for good.

    A failure that asks for patience (`retry_after`) is no failure of the task: it is not counted, and tried again at that time.
    A task that someone asked to cancel is not tried again: it ends cancelled where another attempt would have followed.

    Args:
        chance: random number in [0, 1) for the jitter.
        outcome: how the attempt is remembered: `failed` or `timeout`.
    """
    check(task, "fail")
    attempts = end_attempt(task, outcome, now, failure)
    later = postponed(task.retry, failure)
    failures = task.failures + (not later)
    again = later or may_retry(task.retry, failures, failure)
    if again and task.cancel is not None:
        return replace(
            task,
            state=S.CANCELLED,
            state_at=now,
            finished_at=now,
            attempts=attempts,
            failures=failures,
            failure=failure,
            lease=None,
            last_lease=task.lease,
            epoch=task.epoch + 1,
            lost=0,
            reason="cancelled",
            message=task.cancel.reason,
        )
    if again:
        wait = later_ms(failure, chance) if later else backoff_ms(task.retry, failures, chance)
        return replace(
            task,
            state=S.SCHEDULED,
            state_at=now,
            not_before=now + wait,
            attempts=attempts,
            failures=failures,
            failure=failure,
            lease=None,
            started_at=None,
            epoch=task.epoch + 1,
            lost=0,
            reason="retrying",
            message=f"attempt {task.attempt} failed: {failure.code}; next in {wait / 1000:.1f} s",
        )
    temporary = failure.error_class == "temporary"
    return replace(
        task,
        state=S.FAILED,
        state_at=now,
        finished_at=now,
        attempts=attempts,
        failures=failures,
        failure=failure,
        lease=None,
        last_lease=task.lease,
        lost=0,
        reason="attempts-exhausted" if temporary else f"{failure.error_class}-error",
        message=failure.message,
    )


def lose(task: Task, now: int) -> Task:
    """Take a task back from an instance whose lease has ended: queued again at its old place, or quarantined after three in a row.

    A task with `max_attempts` 1 is never given out a second time (promise G5: at most one start); it fails with the code `lost`.
    Raises `lost`, not the failures: the work may be fine, its worker was not. The fence moves at once, so the old holder is refused from
    now on, not only after the next assignment (reliability, rule R2).
    """
    check(task, "lose")
    attempts = end_attempt(task, "lost", now)
    lost = task.lost + 1
    held = replace(task, attempts=attempts, lost=lost, lease=None, started_at=None, epoch=task.epoch + 1, state_at=now)
    if task.cancel is not None:
        return replace(held, state=S.CANCELLED, finished_at=now, reason="cancelled", message=task.cancel.reason)
    if task.retry.max_attempts == 1:
        failure = Failure(cause="lost", code="lost", message="its agent went silent, and it may be started only once")
    elif lost >= LOST_LIMIT:
        failure = Failure(
            error_class="critical",
            cause="lost",
            code="quarantined",
            message=f"{lost} leases lost in a row; the task may kill its agents",
        )
    else:
        return replace(held, state=S.QUEUED, reason="lease-lost", message="its agent went silent; queued again")
    return replace(
        held,
        state=S.FAILED,
        finished_at=now,
        failure=failure,
        last_lease=task.lease,
        reason=failure.code,
        message=failure.message,
    )


def release(task: Task, now: int) -> Task:
    """Take back a task that its agent hands over unfinished (drain). Costs no attempt."""
    check(task, "release")
    held = replace(
        task,
        attempts=end_attempt(task, "released", now),
        lease=None,
        started_at=None,
        epoch=task.epoch + 1,
        state_at=now,
    )
    if task.cancel is not None:
        return replace(
            held,
            state=S.CANCELLED,
            finished_at=now,
            last_lease=task.lease,
            reason="cancelled",
            message=task.cancel.reason,
        )
    return replace(held, state=S.QUEUED, lost=0, reason="released", message="handed back by its agent; queued again")


def restore(task: Task, now: int) -> Task:
    """Take a task back because the store was restored from a backup: whoever held it then must not hold it now.

    Counts neither as a failure nor as a lost lease: the work and its agent may be fine. A task with `max_attempts` 1 fails with the code
    `lost`, as it may be started only once (promise G5).
    """
    check(task, "restore")
    held = replace(
        task,
        attempts=end_attempt(task, "restored", now),
        lease=None,
        started_at=None,
        epoch=task.epoch + 1,
        state_at=now,
    )
    if task.cancel is not None:
        return replace(
            held,
            state=S.CANCELLED,
            finished_at=now,
            last_lease=task.lease,
            reason="cancelled",
            message=task.cancel.reason,
        )
    if task.retry.max_attempts == 1:
        failure = Failure(
            cause="lost", code="lost", message="a backup was restored while it ran, and it may be started only once"
        )
        return replace(
            held,
            state=S.FAILED,
            finished_at=now,
            last_lease=task.lease,
            failure=failure,
            reason=failure.code,
            message=failure.message,
        )
    return replace(held, state=S.QUEUED, reason="restored", message="a backup was restored; queued again")


def exhaust(task: Task, failure: Failure, now: int, *, stop: bool) -> Task:
    """Keep a task from going on because a budget is used up: it fails for good, or waits until somebody raises the budget.

    Args:
        stop: end it; where it waits already, somebody has said no.
    """
    check(task, "exhaust")
    held = replace(
        task,
        state=S.INPUT_REQUIRED,
        state_at=now,
        attempts=end_attempt(task, "budget", now, failure),
        lease=None,
        last_lease=task.lease or task.last_lease,
        started_at=None,
        epoch=task.epoch + 1,
        lost=0,
        failure=failure,
        reason=failure.code,
        message=failure.message,
    )
    if task.cancel is not None and task.state is not S.INPUT_REQUIRED:
        return replace(
            held, state=S.CANCELLED, finished_at=now, failure=None, reason="cancelled", message=task.cancel.reason
        )
    return replace(held, state=S.FAILED, finished_at=now) if stop or task.state is S.INPUT_REQUIRED else held


def answer(task: Task, now: int) -> Task:
    """Queue a task again that waited for a person, at its old place."""
    check(task, "answer")
    back = replace(task, state=S.QUEUED, state_at=now, failure=None, reason="", message="")
    return wait_at_first(back, now) if task.gates else back


def raise_generation(task: Task, generation: int) -> Task:
    """Return a task that is not final with a fence beyond every one given before, in whatever history; not a change of state."""
    return task if task.state in FINAL_STATES else replace(task, generation=max(generation, task.generation))


def request_cancel(task: Task, request: Request) -> Task:
    """Cancel a waiting task; ask for it where an agent holds the task. A repeated request keeps the first."""
    if task.state in _HELD:
        return task if task.cancel is not None else replace(task, cancel=request)
    return cancel(replace(task, cancel=request), request.at)


def cancel(task: Task, now: int) -> Task:
    """End a task as cancelled: a waiting one at once, a held one when its agent says so or its time to do so is over."""
    check(task, "cancel")
    return replace(
        task,
        state=S.CANCELLED,
        state_at=now,
        finished_at=now,
        attempts=end_attempt(task, "cancelled", now),
        lease=None,
        last_lease=task.lease,
        epoch=task.epoch + 1,
        reason="cancelled",
        message=task.cancel.reason if task.cancel else "",
    )


def expire(task: Task, now: int) -> Task:
    """End a task whose deadline has passed; `reason` tells whether it ever started."""
    check(task, "expire")
    return replace(
        task,
        state=S.EXPIRED,
        state_at=now,
        finished_at=now,
        attempts=end_attempt(task, "expired", now),
        lease=None,
        last_lease=task.lease,
        epoch=task.epoch + 1,
        failure=Failure(error_class="permanent", cause="deadline", code="deadline", message="the deadline passed"),
        reason="deadline" if task.attempt else "deadline-never-started",
        message="the deadline passed",
    )
