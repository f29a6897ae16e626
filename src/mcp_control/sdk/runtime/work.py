"""One attempt in hand, and what is told of it when it has ended.

Why an attempt is stopped decides what is told of it:

    cancel    the server asked: `cancelled`, or its result if that was nearer
    gone      it belongs to somebody else: nothing
    lease     the lease could not be renewed: handed back, should the server still count it as ours
    drain     the agent ends: handed back
    timeout   the attempt took too long: a temporary failure
    budget    nothing is left of its budget, and the server has ended it: nothing
"""

import asyncio
import threading
from typing import Any, Literal

import msgspec

from mcp_control.sdk.context import StopFlag
from mcp_control.sdk.handlers import Handler, capped
from mcp_control.sdk.runtime.processes import WorkerProcess
from mcp_control.tasks.ask_model import Ask
from mcp_control.tasks.model import Failure
from mcp_control.tasks.wire import Assignment, Done

StopReason = Literal["cancel", "gone", "lease", "drain", "timeout", "budget"]
Outcome = Literal["completed", "failed", "cancelled", "asked"]


class Work:
    """One attempt in hand."""

    __slots__ = ("_flag", "assignment", "handler", "stop", "task", "thread", "timer", "worker")

    def __init__(self, assignment: Assignment, handler: Handler[Any, Any]) -> None:
        self.assignment = assignment
        self.handler = handler
        self.stop: StopReason | Literal[""] = ""
        self.task: asyncio.Task[None] | None = None
        self.thread: threading.Thread | None = None
        self.worker: WorkerProcess | None = None
        self.timer: asyncio.TimerHandle | None = None
        self._flag: StopFlag | None = None

    @property
    def flag(self) -> StopFlag:
        """What tells the handler to stop; made when somebody looks at it."""
        if self._flag is None:
            self._flag = StopFlag()
            if self.stop:
                self._flag.set(self.stop)
        return self._flag

    def tell(self, reason: str) -> None:
        """Set the flag where the handler can see it."""
        if self._flag is not None:
            self._flag.set(reason)
        if self.worker is not None:
            self.worker.stop(reason)


def told(work: Work, outcome: Outcome, result: msgspec.Raw, failure: Failure | None, ask: Ask | None = None) -> Done:
    """Return what to tell of an attempt that has ended, in view of why it was stopped, if it was."""
    assignment = work.assignment
    if outcome == "completed":
        return Done(task_id=assignment.task_id, lease_token=assignment.lease_token, outcome="completed", result=result)
    if outcome == "asked":
        return Done(task_id=assignment.task_id, lease_token=assignment.lease_token, outcome="asked", ask=ask)
    if work.stop in ("lease", "drain"):
        return Done(task_id=assignment.task_id, lease_token=assignment.lease_token, outcome="released")
    if work.stop == "cancel":
        return Done(
            task_id=assignment.task_id, lease_token=assignment.lease_token, outcome="cancelled", failure=failure
        )
    if work.stop == "timeout":
        failure = Failure(cause="timeout", code="timeout", message="the attempt took longer than it may")
        outcome = "failed"
    if outcome == "failed" and failure is not None:
        # Each answer took an attempt that counts as none.
        failure = capped(failure, work.handler.retries, assignment.attempt - len(assignment.answers))
    return Done(task_id=assignment.task_id, lease_token=assignment.lease_token, outcome=outcome, failure=failure)
