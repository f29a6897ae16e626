"""The attempts in hand: started, watched, stopped. Their news go to the outbox."""

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, Protocol

import msgspec

from mcp_control.sdk.asking import question_in
from mcp_control.sdk.context import Context, Sink, SyncContext
from mcp_control.sdk.errors import Cancelled
from mcp_control.sdk.guards import Guards
from mcp_control.sdk.handlers import Handler, encode_result, failure_from, invalid_payload
from mcp_control.sdk.runtime.outbox import Outbox
from mcp_control.sdk.runtime.processes import ProcessPool
from mcp_control.sdk.runtime.work import Outcome, StopReason, Work, told
from mcp_control.tasks.ask_model import Ask
from mcp_control.tasks.budget_model import Spent
from mcp_control.tasks.model import Failure, LogLine
from mcp_control.tasks.wire import UNKNOWN_TYPE, Assignment, Done

_NULL: Final = msgspec.Raw(b"null")
_WEIGHT: Final = {"": 0, "timeout": 1, "cancel": 2, "drain": 3, "lease": 4, "budget": 5, "gone": 6}
_ABANDONED: Final = Failure(
    cause="infra", code="thread-abandoned", message="the thread did not stop in time and runs on, unheard"
)


class Clients(Protocol):
    """Makes the clients that contexts hand out."""

    def sync(self) -> Any:
        """Return the blocking client."""
        ...

    def asynchronous(self) -> Any:
        """Return the async client."""
        ...


class _LoopSink:
    """For handlers on the event loop."""

    __slots__ = ("_bench", "_work")

    def __init__(self, bench: "Workbench", work: Work) -> None:
        self._bench = bench
        self._work = work

    def progress(self, fraction: float, message: str) -> None:
        self._bench.moved(self._work, fraction, message)

    def log(self, line: LogLine) -> None:
        self._bench.said(self._work, line)

    def used(self, spent: Spent) -> None:
        self._bench.used(self._work, spent)


class _ThreadSink:
    """For handlers in threads: crosses to the loop, with at most one crossing for progress on its way."""

    __slots__ = ("_bench", "_call", "_latest", "_work")

    def __init__(self, bench: "Workbench", work: Work, call: Callable[..., None]) -> None:
        self._bench = bench
        self._work = work
        self._call = call
        self._latest: tuple[float, str] | None = None

    def progress(self, fraction: float, message: str) -> None:
        waiting = self._latest is not None
        self._latest = (fraction, message)
        if not waiting:
            self._call(self._deliver)

    def log(self, line: LogLine) -> None:
        self._call(self._bench.said, self._work, line)

    def used(self, spent: Spent) -> None:
        self._call(self._bench.used, self._work, spent)

    def _deliver(self) -> None:
        latest, self._latest = self._latest, None
        if latest is not None:
            self._bench.moved(self._work, *latest)


class Workbench:
    """All attempts of this process. Runs on the event loop; nothing here blocks.

    Attributes:
        works: attempts in hand by task id.
        tick: raised whenever something moves.
        abandoned: threads that were given up and still run; each keeps its slot.
        guards: the circuit breakers around what handlers call.
    """

    def __init__(
        self,
        handlers: Mapping[str, Handler[Any, Any]],
        outbox: Outbox,
        wake: Callable[[], None],
        clients: Clients,
        pool: Callable[[], ProcessPool],
        cancel_grace: float,
    ) -> None:
        self._handlers = handlers
        self._outbox = outbox
        self._wake = wake
        self._clients = clients
        self._pool = pool
        self._grace = cancel_grace
        self._loop = asyncio.get_running_loop()
        self._empty = asyncio.Event()
        self._empty.set()
        self.works: dict[str, Work] = {}
        self.tick = 0
        self.abandoned = 0
        self.guards = Guards()

    def accept(self, assignments: Sequence[Assignment]) -> None:
        """Start attempts. One that is in hand already, under the same lease, is not started twice."""
        create_task = self._loop.create_task
        started = self._outbox.started
        for assignment in assignments:
            held = self.works.get(assignment.task_id)
            if held is not None:
                if held.assignment.lease_token == assignment.lease_token:
                    continue
                self.stop([assignment.task_id], "gone", grace=0.0)
                self.works.pop(assignment.task_id, None)
            if self._outbox.holds(assignment.task_id, assignment.lease_token):
                continue  # done already; the server has not heard yet
            handler = self._handlers.get(assignment.type)
            if handler is None:
                # No failure of the task: another process of this agent may be newer, and have one.
                failure = Failure(
                    cause="infra",
                    code=UNKNOWN_TYPE,
                    message=f"this agent has no handler for {assignment.type}",
                    retry_after=0.0,
                )
                self._outbox.done(
                    Done(
                        task_id=assignment.task_id,
                        lease_token=assignment.lease_token,
                        outcome="failed",
                        failure=failure,
                    )
                )
                continue
            work = Work(assignment, handler)
            self.works[assignment.task_id] = work
            started(assignment.task_id, assignment.lease_token)
            if handler.executor == "async":
                work.task = create_task(self._run_async(work))
            elif handler.executor == "thread":
                self._run_thread(work)
            else:
                work.task = create_task(self._run_process(work))
            seconds = assignment.timeout_ms / 1000 if assignment.timeout_ms is not None else handler.timeout
            if seconds is not None:
                work.timer = self._loop.call_later(seconds, self.stop, [assignment.task_id], "timeout", 0.0)
        self.tick += 1
        if self.works:
            self._empty.clear()
        self._wake()

    def stop(self, task_ids: Sequence[str], reason: StopReason, grace: float | None = None) -> None:
        """Stop attempts: told at once, forced after `grace` seconds (by default ten). Unknown ids are fine."""
        for task_id in task_ids:
            work = self.works.get(task_id)
            if work is None:
                continue
            if _WEIGHT[reason] > _WEIGHT[work.stop]:
                work.stop = reason
            work.tell(reason)
            if work.timer is not None:
                work.timer.cancel()
            blind = work.handler.executor == "async" and not work.handler.wants_context
            seconds = 0.0 if blind else self._grace if grace is None else grace
            if seconds <= 0.0:
                self._force(work)
            else:
                work.timer = self._loop.call_later(seconds, self._force, work)

    @property
    def taken(self) -> int:
        """Slots that the attempts in hand take."""
        return sum(work.assignment.slots for work in self.works.values())

    async def emptied(self) -> None:
        """Wait until nothing is in hand."""
        await self._empty.wait()

    def close(self) -> None:
        """End what can be ended, without telling."""
        for work in list(self.works.values()):
            if work.timer is not None:
                work.timer.cancel()
            work.tell("drain")
            if work.task is not None:
                work.task.cancel()

    def moved(self, work: Work, fraction: float, message: str) -> None:
        """Take progress of an attempt that is still ours."""
        if self.works.get(work.assignment.task_id) is work:
            self.tick += 1
            self._outbox.progress(work.assignment.task_id, work.assignment.lease_token, fraction, message)
            self._wake()

    def said(self, work: Work, line: LogLine) -> None:
        """Take a log line of an attempt that is still ours."""
        if self.works.get(work.assignment.task_id) is work:
            self._outbox.log(work.assignment.task_id, work.assignment.lease_token, line)
            self._wake()

    def used(self, work: Work, spent: Spent) -> None:
        """Take what an attempt that is still ours has used."""
        if self.works.get(work.assignment.task_id) is work:
            self.tick += 1
            self._outbox.used(work.assignment.task_id, work.assignment.lease_token, spent)
            self._wake()

    # --- the three ways to run ---

    async def _run_async(self, work: Work) -> None:
        handler = work.handler
        try:
            try:
                payload = handler.decode(work.assignment.payload)
            except msgspec.MsgspecError as error:
                return self._end(work, "failed", failure=invalid_payload(error))
            if handler.wants_context:
                sink = _LoopSink(self, work)
                context = Context(work.assignment, sink, work.flag, self._clients.asynchronous, self.guards)
                result = await handler.function(payload, context)
            else:
                result = await handler.function(payload)
            return self._end(work, "completed", _NULL if result is None else msgspec.Raw(encode_result(result)))
        except (Cancelled, asyncio.CancelledError) as error:
            return self._end(work, "cancelled", failure=failure_from(error))
        except (Exception, SystemExit) as error:
            return self._end(work, "failed", failure=failure_from(error))
        except BaseException as error:
            ask = question_in(error)
            if ask is None:
                raise
            return self._end(work, "asked", ask=ask)

    def _run_thread(self, work: Work) -> None:
        sink = _ThreadSink(self, work, self._from_thread)
        context = SyncContext(work.assignment, sink, work.flag, self._clients.sync, self.guards)
        # A thread of its own, and a daemon: one that never ends must not keep others, or the exit, waiting.
        work.thread = threading.Thread(
            target=self._thread, args=(work, context), daemon=True, name=f"task-{work.assignment.task_id}"
        )
        work.thread.start()

    def _thread(self, work: Work, context: SyncContext) -> None:
        handler = work.handler
        outcome: Outcome = "completed"
        result, failure, ask = _NULL, None, None
        try:
            payload = handler.decode(work.assignment.payload)
        except msgspec.MsgspecError as error:
            outcome, failure = "failed", invalid_payload(error)
        else:
            try:
                value = handler.function(payload, context) if handler.wants_context else handler.function(payload)
                result = msgspec.Raw(encode_result(value))
            except Cancelled as error:
                outcome, failure = "cancelled", failure_from(error)
            except (Exception, SystemExit) as error:
                outcome, failure = "failed", failure_from(error)
            except BaseException as error:
                ask = question_in(error)
                if ask is None:
                    raise
                outcome = "asked"
        self._from_thread(self._thread_ended, work, outcome, result, failure, ask)

    def _from_thread(self, function: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(function, *arguments)

    def _thread_ended(
        self, work: Work, outcome: Outcome, result: msgspec.Raw, failure: Failure | None, ask: Ask | None
    ) -> None:
        if self.works.get(work.assignment.task_id) is not work:
            self.abandoned -= 1
        self._end(work, outcome, result, failure, ask)

    async def _run_process(self, work: Work) -> None:
        pool = self._pool()
        sink: Sink = _LoopSink(self, work)
        try:
            worker = await pool.acquire()
        except asyncio.CancelledError as error:
            return self._end(work, "cancelled", failure=failure_from(error))
        except OSError as error:
            return self._end(work, "failed", failure=failure_from(error))
        work.worker = worker
        try:
            ended = await worker.run(work.handler, work.assignment, sink)
        except asyncio.CancelledError as error:
            worker.kill()
            return self._end(work, "cancelled", failure=failure_from(error))
        finally:
            work.worker = None
            pool.release(worker)
        return self._end(work, ended.outcome, msgspec.Raw(ended.result), ended.failure, ended.ask)

    # --- ends ---

    def _force(self, work: Work) -> None:
        if self.works.get(work.assignment.task_id) is not work:
            return
        if work.worker is not None:
            work.worker.kill()
        elif work.thread is not None:
            self.abandoned += 1
            at, attempt = _wall_ms(), work.assignment.attempt
            self.said(work, LogLine(at=at, level="warning", message=_ABANDONED.message, attempt=attempt))
            self._end(work, "cancelled", failure=_ABANDONED)
        elif work.task is not None:
            # One that is cancelled before its first step runs nothing of itself, not even its end.
            work.task.add_done_callback(
                lambda _: self._end(work, "cancelled", failure=failure_from(asyncio.CancelledError()))
            )
            work.task.cancel()
            work.timer = self._loop.call_later(max(1.0, self._grace), self._force, work)  # it may swallow the first one

    def _end(
        self,
        work: Work,
        outcome: Outcome,
        result: msgspec.Raw = _NULL,
        failure: Failure | None = None,
        ask: Ask | None = None,
    ) -> None:
        assignment = work.assignment
        if self.works.get(assignment.task_id) is not work:
            return
        del self.works[assignment.task_id]
        self.tick += 1
        if work.timer is not None:
            work.timer.cancel()
        if not self.works:
            self._empty.set()
        if work.stop in ("gone", "budget"):
            self._outbox.forget(assignment.task_id)
        else:
            self._outbox.done(told(work, outcome, result, failure, ask))
        self._wake()


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000
