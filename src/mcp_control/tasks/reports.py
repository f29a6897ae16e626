"""What agents report of their tasks, as decisions: pure functions over one task and everything one report says of it."""

from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.kernel.changes import Fact
from mcp_control.kernel.errors import AlreadyTerminal, LeaseSuperseded
from mcp_control.kernel.text import visible
from mcp_control.tasks.asking import ask, refusal
from mcp_control.tasks.ledger import Decide, Move
from mcp_control.tasks.model import Failure, LogLine, Task, TaskState
from mcp_control.tasks.records import task_fact
from mcp_control.tasks.transitions import cancel, complete, fail, progress, release, start
from mcp_control.tasks.wire import Done, Progress, Report

MESSAGE_MAX: Final = 4000
TRACEBACK_MAX: Final = 32_000
_encode: Final = msgspec.msgpack.Encoder().encode


class LogCap(msgspec.Struct, frozen=True):
    """How much is kept of what a task logs: lines, and bytes of their messages and fields. What comes after that is only counted."""

    lines: int = 100_000
    bytes: int = 64 << 20


_CAP: Final = LogCap()


class Told(msgspec.Struct, gc=False):
    """Everything one report says of one task. `moved`: whether the last decision on it moved the task."""

    lease_token: str
    started: bool = False
    progress: Progress | None = None
    lines: Sequence[LogLine] = ()
    done: Done | None = None
    moved: bool = False


def gather(report: Report) -> dict[tuple[str, str], Told]:
    """Return what a report says, by task and lease token."""
    found: dict[tuple[str, str], Told] = {}

    def told(task_id: str, token: str) -> Told:
        entry = found.get((task_id, token))
        if entry is None:
            entry = found[task_id, token] = Told(token)
        return entry

    for started in report.started:
        told(started.task_id, started.lease_token).started = True
    for moved in report.progress:
        told(moved.task_id, moved.lease_token).progress = moved
    for logged in report.logs:
        entry = told(logged.task_id, logged.lease_token)
        entry.lines = [*entry.lines, *logged.lines]
    for used in report.used:
        told(used.task_id, used.lease_token)
    for done in report.done:
        told(done.task_id, done.lease_token).done = done
    return found


def _repeated(task: Task, told: Told) -> None:
    """Accept a report that only repeats what is recorded; refuse anything else on a final task."""
    lease = task.last_lease
    if lease is None or not lease.opens(told.lease_token):
        raise LeaseSuperseded("the lease is not the live one")
    if told.done is not None and _digest(told.done) != task.result_digest:
        raise AlreadyTerminal(f"the task is already {task.state.value}", state=task.state.value)


def _digest(done: Done) -> str:
    """Return a short digest of what an attempt ended with, to tell a repeated report from a different one."""
    ended = memoryview(done.result) if done.failure is None else done.failure.code.encode()
    # The outcome reported need not be the state it led to: a release of a task that was to be cancelled cancels it.
    return blake2b(ended, digest_size=8, person=done.outcome.encode()).hexdigest()


def deciding(told: Told, actor: str, now: int, chance: Callable[[], float], cap: LogCap = _CAP) -> Decide:
    """Return the decision for what a report says of a task: started, progress, log lines and end, in this order, as one move.

    The decision raises LeaseSuperseded when the lease presented is not the live one, AlreadyTerminal when the task ended otherwise.
    """

    def decide(task: Task) -> Move | None:
        told.moved = False
        if task.final:
            _repeated(task, told)
            return None
        if task.lease is None or not task.lease.opens(told.lease_token):
            raise LeaseSuperseded("the lease is not the live one")
        facts: list[Fact] = []
        after = task
        done = told.done
        if done is None and told.started and after.state is TaskState.ASSIGNED:
            after = start(after, now)
            facts.append(task_fact("task.started", after, actor, now))
        if told.progress is not None:
            if after.state is TaskState.ASSIGNED:
                # Of what began and ended within one report it is only known when it was given out, as where it says no more than its end.
                after = start(after, now if done is None else after.state_at)
                facts.append(task_fact("task.started", after, actor, now))
            after = progress(after, told.progress.fraction, visible(told.progress.message)[:MESSAGE_MAX], now)
            facts.append(
                task_fact("task.progressed", after, actor, now, progress=after.progress, message=after.progress_message)
            )
        lines: list[LogLine] = []
        if told.lines:
            lines, size, dropped = _kept_lines(task, told.lines, cap)
            after = replace(after, moved_at=now, log_bytes=size, log_dropped=task.log_dropped + dropped)
        if lines:
            facts.append(task_fact("task.logged", after, actor, now, first=task.log_lines, lines=len(lines)))
        result: bytes | None = None
        if done is not None:
            after, kind, result = _end(after, done, now, chance)
            facts.append(task_fact(kind, after, actor, now, agent_id=task.lease.agent_id))
        if after is task and not lines:
            return None
        told.moved = True
        return Move(after, facts, result=result, lines=lines)

    return decide


def _end(task: Task, done: Done, now: int, chance: Callable[[], float]) -> tuple[Task, str, bytes | None]:
    if done.outcome == "completed":
        return complete(task, now, _digest(done)), "task.completed", bytes(done.result)
    after, kind = _uncompleted(task, done, now, chance)
    return replace(after, result_digest=_digest(done)) if after.final else after, kind, None


def _uncompleted(task: Task, done: Done, now: int, chance: Callable[[], float]) -> tuple[Task, str]:
    if done.outcome == "cancelled":
        return cancel(task, now), "task.cancelled"
    if done.outcome == "released":
        after = release(task, now)
        return after, "task.cancelled" if after.final else "task.released"
    failure = done.failure
    if done.outcome == "asked":
        failure = refusal(task, done.ask)
        if failure is None and done.ask is not None:
            after = ask(task, done.ask, now)
            return after, f"task.{after.state}"
    after = fail(task, _bounded(failure or Failure()), now, chance(), _attempt_outcome(failure))
    return after, f"task.{after.state}" if after.final else "task.retrying"


def _attempt_outcome(failure: Failure | None) -> str:
    return "timeout" if failure is not None and failure.cause == "timeout" else "failed"


def _bounded(failure: Failure) -> Failure:
    return replace(
        failure,
        code=visible(failure.code)[:64],
        message=visible(failure.message)[:MESSAGE_MAX],
        traceback=failure.traceback[-TRACEBACK_MAX:],
    )


def _kept_lines(task: Task, lines: Iterable[LogLine], cap: LogCap) -> tuple[list[LogLine], int, int]:
    """Return the lines that are kept, the bytes kept of the task in all, and how many lines were dropped.

    Where the cap is reached, the last line kept says so instead of what it was to say.
    """
    kept: list[LogLine] = []
    size, dropped = task.log_bytes, 0
    full = task.log_dropped > 0 or task.log_lines >= cap.lines
    for line in lines:
        if full:
            dropped += 1
            continue
        short = replace(line, attempt=task.attempt, message=line.message[:MESSAGE_MAX])
        grown = size + len(short.message.encode()) + (len(_encode(short.fields)) if short.fields else 0)
        count = task.log_lines + len(kept) + 1
        full = count >= cap.lines or grown > cap.bytes
        if full:
            dropped += 1
            short = replace(short, level="warning", message=f"log cut off after {count - 1} lines", fields=None)
        else:
            size = grown
        kept.append(short)
    return kept, size, dropped
