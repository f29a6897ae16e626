"""What a handler knows about its attempt and may do with it: log, report progress, notice that it must stop, move artifacts.

`Context` is for coroutines, `SyncContext` for threads and processes; they differ in whether artifacts and client are awaited.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Final, Generic, Literal, Protocol, TypeVar, Unpack

import msgspec

from mcp_control.sdk.asking import AskOptions, asked
from mcp_control.sdk.errors import Cancelled
from mcp_control.sdk.guards import AsyncGuarded, Counts, Guarded, Guards
from mcp_control.sdk.usage import Meter, Money, Reservation, counted
from mcp_control.tasks.ask_model import Answered
from mcp_control.tasks.budget_model import Spent
from mcp_control.tasks.model import LogLine
from mcp_control.tasks.wire import Assignment

if TYPE_CHECKING:
    from mcp_control.sdk.artifacts import AsyncTaskArtifacts, TaskArtifacts
    from mcp_control.sdk.client import AsyncClient, Client
    from mcp_control.sdk.submission import SubmitOptions
    from mcp_control.tasks.view_model import TaskView

T = TypeVar("T")
Level = Literal["debug", "info", "warning", "error"]
LINE_LIMIT: Final = 4000
PROGRESS_LIMIT: Final = 300
FIELDS_LIMIT: Final = 16 * 1024
TRACK_SECONDS: Final = 0.1

_encode = msgspec.json.Encoder(enc_hook=str).encode


class Sink(Protocol):
    """Where progress and log lines of an attempt go; callable from the thread the handler runs in."""

    def progress(self, fraction: float, message: str) -> None:
        """Take the newest progress; older progress not yet sent is dropped."""
        ...

    def log(self, line: LogLine) -> None:
        """Take a line."""
        ...

    def used(self, spent: Spent) -> None:
        """Take what the attempt has used in all; what was told before and not yet sent is dropped."""
        ...


class StopFlag:
    """Set when the attempt must stop. May be read and waited for from any thread; true in a condition once set."""

    __slots__ = ("_event", "reason")

    def __init__(self) -> None:
        self._event = threading.Event()
        self.reason = ""

    def set(self, reason: str) -> None:
        """Set the flag; the first reason stays."""
        if not self._event.is_set():
            self.reason = reason
            self._event.set()

    def is_set(self) -> bool:
        """Say whether the attempt must stop."""
        return self._event.is_set()

    def wait(self, seconds: float | None = None) -> bool:
        """Block until it is set or the seconds are over; say whether it is set. Not for coroutines: those get cancelled."""
        return self._event.wait(seconds)

    def __bool__(self) -> bool:
        return self._event.is_set()


class Log:
    """Structured lines for the people who follow the task: an event and key=value pairs, as with structlog."""

    __slots__ = ("_attempt", "_bound", "_sink")

    def __init__(self, sink: Sink, attempt: int, bound: dict[str, object] | None = None) -> None:
        self._sink = sink
        self._attempt = attempt
        self._bound = bound or {}

    def bind(self, **fields: object) -> "Log":
        """Return a log whose lines all carry these fields."""
        return Log(self._sink, self._attempt, {**self._bound, **fields})

    def debug(self, event: str, **fields: object) -> None:
        """Log what only a developer wants to know."""
        self._line("debug", event, fields)

    def info(self, event: str, **fields: object) -> None:
        """Log what happened."""
        self._line("info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Log what somebody should look at some time."""
        self._line("warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        """Log what went wrong."""
        self._line("error", event, fields)

    def _line(self, level: Level, event: str, fields: dict[str, object]) -> None:
        kept: dict[str, object] | None = None
        if fields or self._bound:
            encoded = _encode({**self._bound, **fields})
            kept = (
                msgspec.json.decode(encoded)
                if len(encoded) <= FIELDS_LIMIT
                else {"left_out": f"{len(encoded)} bytes of fields"}
            )
        self._sink.log(
            LogLine(
                at=time.time_ns() // 1_000_000,
                level=level,
                message=str(event)[:LINE_LIMIT],
                fields=kept,
                attempt=self._attempt,
            )
        )


class Tracked(Generic[T]):
    """An iteration that reports progress after every element and stops when the attempt must; plain or async, as its source is."""

    def __init__(
        self, owner: "BaseContext", source: Iterable[T] | AsyncIterable[T], total: int | None, message: str
    ) -> None:
        self._owner = owner
        self._source = source
        self._total = len(source) if total is None and isinstance(source, Sized) else total
        self._message = message
        self._done = 0
        self._reported_at = 0.0

    def __iter__(self) -> Iterator[T]:
        if not isinstance(self._source, Iterable):
            raise TypeError("an asynchronous source needs `async for`")
        for element in self._source:
            self._owner.check()
            yield element
            self._step()

    async def __aiter__(self) -> AsyncIterator[T]:
        if isinstance(self._source, AsyncIterable):
            async for element in self._source:
                self._owner.check()
                yield element
                self._step()
        else:
            for element in self:
                yield element

    def _step(self) -> None:
        self._done += 1
        now = time.monotonic()
        if self._total and (now - self._reported_at >= TRACK_SECONDS or self._done >= self._total):
            self._reported_at = now
            self._owner.progress(min(1.0, self._done / self._total), self._message or f"{self._done} of {self._total}")


class BaseContext:
    """The part of a context that is the same everywhere.

    Attributes:
        task_id: id of the task; the same over all attempts, so a good idempotency key for outside systems.
        attempt: number of this attempt, from 1.
        max_attempts: attempts the task may have.
        fence: `generation.epoch`; an outside system that refuses a smaller one is safe from a stale attempt.
        run_id, stage, item: the place in a pipeline run, None outside of one.
        labels: labels of the task.
        deadline_at: wall milliseconds when the task ends `expired`, None without a deadline.
        log: structured lines, shown live.
        cancelled: set when the attempt must stop; ten seconds later it is stopped.
    """

    def __init__(self, assignment: Assignment, sink: Sink, cancelled: StopFlag, guards: Guards | None = None) -> None:
        self.task_id = assignment.task_id
        self.type = assignment.type
        self.attempt = assignment.attempt
        self.max_attempts = assignment.max_attempts
        self.fence = assignment.fence
        self.run_id = assignment.run_id
        self.stage = assignment.stage
        self.item = assignment.item
        self.labels = assignment.labels
        self.deadline_at = assignment.deadline_at
        self.traceparent = assignment.traceparent
        self.cancelled = cancelled
        self.log = Log(sink, assignment.attempt)
        self._sink = sink
        self._assignment = assignment
        self._metered: Meter | None = None
        self._guards = guards or Guards()

    def progress(self, fraction: float, message: str = "") -> None:
        """Report how far the attempt is, 0 to 1, with a sentence. Cheap to call often: only the newest is sent."""
        self._sink.progress(min(1.0, max(0.0, float(fraction))), message[:PROGRESS_LIMIT])

    @property
    def _meter(self) -> Meter:
        if self._metered is None:
            self._metered = Meter(self._assignment, self._sink.used)
        return self._metered

    @property
    def budget(self) -> dict[str, float] | None:
        """What is left of what is limited, by `calls`, `tokens`, `money_micros`, `attempts`, `wall_seconds`; None without a budget."""
        return self._meter.left

    def use(self, *, calls: int = 0, tokens: int = 0, money: Money = 0) -> None:
        """Report what was used. Told with the next report to the server, which stops the attempt when a limit is passed.

        Args:
            calls: calls made, of whatever is counted.
            tokens: tokens used.
            money: an amount in the currency you count in, kept in millionths.

        Raises:
            Cancelled: the attempt must stop; what was used is counted all the same.
        """
        self._meter.use(counted(calls, tokens, money))
        self.check()

    def track(self, source: Iterable[T] | AsyncIterable[T], total: int | None = None, message: str = "") -> Tracked[T]:
        """Iterate (`for` or `async for`) with progress, and with a check before every element.

        Args:
            source: what to iterate over.
            total: number of elements, where `len(source)` does not tell it; without it no progress is reported.
            message: sentence of the progress; by default "n of total".
        """
        return Tracked(self, source, total, message)

    def _stopped_for(self) -> str:
        return self.cancelled.reason

    def check(self) -> None:
        """Raise `Cancelled` when the attempt must stop."""
        if self.cancelled.is_set():
            raise Cancelled(self.cancelled.reason or "cancelled")


class Context(BaseContext):
    """The context of a coroutine: `artifacts` and `client` are awaited."""

    def __init__(
        self,
        assignment: Assignment,
        sink: Sink,
        cancelled: StopFlag,
        client: "Callable[[], AsyncClient]",
        guards: Guards | None = None,
    ) -> None:
        super().__init__(assignment, sink, cancelled, guards)
        self._make = client
        self._lease_token = assignment.lease_token
        self._asking = asyncio.Lock()

    async def reserve(self, *, calls: int = 0, tokens: int = 0, money: Money = 0) -> Reservation:
        """Hold something of the budget before it is spent; the answer is false where so much is not left.

        Raises:
            Cancelled: a limit is passed already, or the attempt must stop.
        """
        self.check()
        amounts = counted(calls, tokens, money)
        async with self._asking:
            granted = await self._meter.reserve_async(self.client, amounts)
        return Reservation(self._meter, amounts, granted)

    async def submit(self, type: str, payload: object = None, **options: "Unpack[SubmitOptions]") -> "TaskView":
        """Submit a task for this one, with the agent's own credential: its parent is this task, whose budgets it draws from.

        Give it a `key` that the payload decides where the attempt may be repeated: the key counts for this task, whichever agent has it.

        Raises:
            Conflicting: this attempt is not the live one any more, or a budget is used up.
            InvalidRequest: something is wrong with it.
        """
        from mcp_control.sdk import children  # handlers that submit nothing need no client

        return await self.client.do(children.submit(self.task_id, self._lease_token, type, payload, options))

    async def ask(self, question: str, **options: Unpack[AskOptions]) -> Answered:
        """Ask people and return their answer. Until it is there the attempt ends here, and no slot is held.

        The handler then runs anew, and gets the answer at this same place: what it did before it asked, it does once more. An attempt
        that ends so counts as none.

        Raises:
            Permanent: the question, or a key that stood for another one; at most 20 in a task.
        """
        return asked(self._assignment.answers, question, options)

    def breaker(
        self, name: str, *, failures: int = 5, open_for: float = 30.0, counts: Counts | None = None
    ) -> AsyncGuarded:
        """Guard a call of yours: `async with ctx.breaker("mail"): ...`, or `await ctx.breaker("mail").call(...)`.

        One breaker for each name in the agent's process. While it is open its block is not entered: it raises Unavailable, and the task
        is tried again when the peer may be, which costs no attempt. After the pause one call goes through; it closes it, or the next
        pause is twice as long, up to five minutes.

        Args:
            name: of the peer, 1 to 64 characters; at most 20 in an agent.
            failures: failed calls in a row that open it.
            open_for: seconds until the first probe.
            counts: says which errors are failures of the peer. By default all but answers of 4xx (408, 425 and 429 are) and `Permanent`.
                A cancellation counts when the attempt took too long, else not.

        Raises:
            ValueError: too many names, or numbers that make no sense.
        """
        return AsyncGuarded(self._guards.get(name, failures, open_for), self._stopped_for, counts)

    @property
    def client(self) -> "AsyncClient":
        """A client with the agent's credential, shared by all its handlers."""
        return self._make()

    @property
    def artifacts(self) -> "AsyncTaskArtifacts":
        """Upload and download; uploads belong to this task, stage and run."""
        from mcp_control.sdk.artifacts import AsyncTaskArtifacts  # handlers without artifacts need no client

        return AsyncTaskArtifacts(self.client, self._owner())

    def _owner(self) -> dict[str, str | None]:
        return {"run_id": self.run_id, "stage": self.stage, "task_id": self.task_id, "lease_token": self._lease_token}


class SyncContext(BaseContext):
    """The context of a function in a thread or process: `artifacts` and `client` block."""

    def __init__(
        self,
        assignment: Assignment,
        sink: Sink,
        cancelled: StopFlag,
        client: "Callable[[], Client]",
        guards: Guards | None = None,
    ) -> None:
        super().__init__(assignment, sink, cancelled, guards)
        self._make = client
        self._lease_token = assignment.lease_token

    def reserve(self, *, calls: int = 0, tokens: int = 0, money: Money = 0) -> Reservation:
        """Hold something of the budget before it is spent; the answer is false where so much is not left.

        Raises:
            Cancelled: a limit is passed already, or the attempt must stop.
        """
        self.check()
        amounts = counted(calls, tokens, money)
        return Reservation(self._meter, amounts, self._meter.reserve(self.client, amounts))

    def submit(self, type: str, payload: object = None, **options: "Unpack[SubmitOptions]") -> "TaskView":
        """Submit a task for this one; see `Context.submit`."""
        from mcp_control.sdk import children  # handlers that submit nothing need no client

        return self.client.do(children.submit(self.task_id, self._lease_token, type, payload, options))

    def ask(self, question: str, **options: Unpack[AskOptions]) -> Answered:
        """Ask people and return their answer; see `Context.ask`."""
        return asked(self._assignment.answers, question, options)

    def breaker(self, name: str, *, failures: int = 5, open_for: float = 30.0, counts: Counts | None = None) -> Guarded:
        """Guard a call of yours: `with ctx.breaker("mail"): ...`, or `ctx.breaker("mail").call(...)`; see `Context.breaker`.

        In a worker process the breaker is that process's own.
        """
        return Guarded(self._guards.get(name, failures, open_for), self._stopped_for, counts)

    @property
    def client(self) -> "Client":
        """A client with the agent's credential, shared by all handlers of this process."""
        return self._make()

    @property
    def artifacts(self) -> "TaskArtifacts":
        """Upload and download; uploads belong to this task, stage and run."""
        from mcp_control.sdk.artifacts import TaskArtifacts  # handlers without artifacts need no client

        return TaskArtifacts(self.client, self._owner())

    def _owner(self) -> dict[str, str | None]:
        return {"run_id": self.run_id, "stage": self.stage, "task_id": self.task_id, "lease_token": self._lease_token}
