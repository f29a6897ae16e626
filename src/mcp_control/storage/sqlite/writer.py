"""Group commit: what arrives while one commit runs is the next one; there is no timer.

Statements run on the event-loop thread, in slices so that other work gets its turn. COMMIT and checkpoints, which wait for the disk,
run in a thread of their own; the loop waits for them for up to a millisecond, which a good disk never uses up, and then does other work.
The connection is used by one of the two threads at a time.

Why the loop waits at all: a thread that comes back from the disk needs the interpreter lock, and a loop that is always busy takes the
lock again faster than a waiting thread wakes up. Without giving way, a commit of 0.3 ms was seen to take 400. Measurements and the
alternatives: docs/decisions/0001-group-commit.md.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Final

import apsw
import structlog

from mcp_control.kernel.changes import Change, Fact, StoredFact
from mcp_control.kernel.errors import OutcomeUnknown, Overloaded, Problem, StorageFull, StoreUnavailable
from mcp_control.storage.ports import Committed
from mcp_control.storage.sqlite import factlog
from mcp_control.storage.sqlite.apply import Applier

_log = structlog.get_logger(__name__)
_BUSY_TRIES: Final = 250
_BUSY_PAUSE: Final = 0.02
_PATIENCE: Final = 0.001  # how long the loop stands still for a commit
_GIVE_WAY: Final = 0.0001  # how long it does so again, each time,
_GIVE_WAY_EVERY: Final = 0.001  # while the disk is not ready

Outcomes = list[Problem | None]
Job = Callable[[apsw.Connection, int], Any]  # something else than changes to do in a transaction; gets the newest seq


class _Call:
    """One waiting `commit` call, or a job."""

    __slots__ = ("changes", "future", "job", "outcomes", "result")

    def __init__(self, changes: Sequence[Change], future: "asyncio.Future[Any]", job: Job | None = None) -> None:
        self.changes = changes
        self.future = future
        self.job = job
        self.outcomes: Outcomes = []
        self.result: Any = None

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)

    def succeed(self) -> None:
        if not self.future.done():
            self.future.set_result(self.outcomes if self.job is None else self.result)


class GroupCommit:
    """Merges commit calls into physical transactions on one connection.

    Args:
        connection: the only writing connection; it belongs to this object from now on.
        applier: applies one change through that connection.
        committed: see `Store.open`.
        loop: the loop on which everything but COMMIT runs.
        newest_seq: the largest `seq` given so far.
        max_waiting: changes that may wait; more raise Overloaded.
        batch_writes: entity writes after which a transaction takes no further calls. A call is never split.
        slice_writes: entity writes after which the loop gets its turn.
        checkpoint_pages: pages of write-ahead log after which it is copied into the database.
        full: called on the loop when the disk turned out to be full.
        fatal: called on the loop when the state of the disk is unknown; the process should end.
    """

    def __init__(
        self,
        connection: apsw.Connection,
        applier: Applier,
        committed: Committed,
        loop: asyncio.AbstractEventLoop,
        *,
        newest_seq: int,
        max_waiting: int,
        batch_writes: int,
        slice_writes: int,
        checkpoint_pages: int,
        full: Callable[[], None],
        fatal: Callable[[Problem], None],
    ) -> None:
        self.newest_seq = newest_seq
        self.read_only = False
        self._connection = connection
        self._applier = applier
        self._committed = committed
        self._loop = loop
        self._max_waiting = max_waiting
        self._batch_writes = batch_writes
        self._slice_writes = slice_writes
        self._checkpoint_pages = checkpoint_pages
        self._full = full
        self._fatal = fatal
        self._waiting: deque[_Call] = deque()
        self._waiting_changes = 0
        self._busy = False  # a transaction is being built, committed or checkpointed
        self._refuse: str | None = None  # why nothing is accepted any more
        self._idle: list[asyncio.Future[None]] = []
        self._batch: list[_Call] = []
        self._facts: list[Fact] = []
        self._stored: list[StoredFact] = []
        self._pages_at_checkpoint = 0
        self._jobs: SimpleQueue[str | None] = SimpleQueue()
        self._done: SimpleQueue[apsw.Error | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="sqlite-commit", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Changes that are queued behind the one transaction under way."""
        return self._waiting_changes

    # --- what callers do ------------------------------------------------------------------------------------------

    def submit(self, changes: Sequence[Change]) -> "asyncio.Future[Outcomes]":
        """Queue changes; the future gets their outcomes when they are durable.

        Raises:
            Overloaded, StorageFull, StoreUnavailable: nothing was queued.
        """
        if self._refuse is not None:
            raise StoreUnavailable(self._refuse)
        if self.read_only and any(change.writes for change in changes):
            raise _storage_full()
        if self._waiting_changes and self._waiting_changes + len(changes) > self._max_waiting:
            raise Overloaded("too many changes wait for the disk", retry_after=1)
        return self._add(_Call(changes, self._loop.create_future()))

    def run(self, job: Job) -> "asyncio.Future[Any]":
        """Queue a job that runs in a transaction of its own batch; the future gets what it returned."""
        if self._refuse is not None:
            raise StoreUnavailable(self._refuse)
        return self._add(_Call((), self._loop.create_future(), job))

    async def close(self) -> None:
        """Finish what waits, accept nothing more, end the thread."""
        if self._refuse is None:
            self._refuse = "the store is closed"
        if self._busy or self._waiting:
            idle = self._loop.create_future()
            self._idle.append(idle)
            await idle
        if self._thread.is_alive():
            self._jobs.put(None)
            await self._loop.run_in_executor(None, self._thread.join)

    def _add(self, call: _Call) -> "asyncio.Future[Any]":
        self._waiting.append(call)
        self._waiting_changes += len(call.changes)
        if not self._busy:
            self._busy = True
            self._loop.call_soon(self._begin)  # not now: what else is ready in this turn of the loop joins
        return call.future

    # --- building a transaction, on the loop ----------------------------------------------------------------------

    def _begin(self, tries: int = _BUSY_TRIES) -> None:
        try:
            self._applier.begin()
        except apsw.BusyError:  # another program, such as a backup, writes
            if tries:
                self._loop.call_later(_BUSY_PAUSE, self._begin, tries - 1)
            else:
                self._fail(self._take_all(), StoreUnavailable("another program holds the database", retry_after=5))
                self._free()
            return
        except apsw.Error as error:
            self._statement_failed(error)
            return
        self._facts = []
        writes = 0
        while self._waiting and (writes < self._batch_writes):
            call = self._waiting.popleft()
            self._waiting_changes -= len(call.changes)
            self._batch.append(call)
            writes += _writes(call)
        self._slice(0, 0)

    def _slice(self, at: int, change_at: int) -> None:
        """Apply changes from the `change_at`th of the `at`th call on; come back later when the slice is used up."""
        left = self._slice_writes
        apply = self._applier.apply
        batch = self._batch
        call = batch[at] if at < len(batch) else None
        try:
            while at < len(batch):
                call = batch[at]
                if call.job is not None:
                    call.result = call.job(self._connection, self.newest_seq)
                for change in call.changes[change_at:] if change_at else call.changes:
                    if left <= 0:
                        self._loop.call_soon(self._slice, at, change_at)
                        return
                    outcome = apply(change)
                    if outcome is None and change.facts:
                        self._facts.extend(change.facts)
                    call.outcomes.append(outcome)
                    left -= len(change.writes) or 1
                    change_at += 1
                at += 1
                change_at = 0
            self._stored = factlog.append(self._connection, self.newest_seq, self._facts) if self._facts else []
        except apsw.Error as error:
            self._statement_failed(error)
        except Exception as error:  # a value that cannot be bound, an undeclared name: this call's fault alone
            assert call is not None
            self._drop(call, error)
        else:
            self._jobs.put("COMMIT")
            self._await_disk(self._finished, _PATIENCE)

    def _drop(self, call: _Call, error: Exception) -> None:
        """Take the transaction back and build it again without this call."""
        self._applier.rollback()
        call.fail(error)
        again = [other for other in self._batch if other is not call]
        self._batch = []
        for other in reversed(again):
            other.outcomes = []
            self._waiting.appendleft(other)
            self._waiting_changes += len(other.changes)
        if self._waiting:
            self._loop.call_soon(self._begin)
        else:
            self._free()

    def _statement_failed(self, error: apsw.Error) -> None:
        """Nothing of the batch was applied: the transaction is taken back."""
        self._applier.rollback()
        calls, self._batch = self._batch, []
        if _is_full(error):
            self._disk_full(calls)
        else:
            problem = StoreUnavailable(f"the database cannot be written: {error}")
            self._broken(calls, problem, problem)
        self._free()

    # --- the commit thread ----------------------------------------------------------------------------------------

    def _work(self) -> None:
        execute = self._connection.cursor().execute
        while (sql := self._jobs.get()) is not None:
            try:
                execute(sql).fetchall()
            except apsw.Error as error:
                self._done.put(error)
            else:
                self._done.put(None)

    def _await_disk(self, then: Callable[[apsw.Error | None], None], patience: float) -> None:
        """Call `then` with the outcome of the job under way: at once, or from the loop when it is there."""
        try:
            outcome = self._done.get(timeout=patience)
        except Empty:
            self._loop.call_later(_GIVE_WAY_EVERY, self._await_disk, then, _GIVE_WAY)
        else:
            then(outcome)

    # --- after the commit, on the loop ----------------------------------------------------------------------------

    def _finished(self, error: apsw.Error | None) -> None:
        calls, self._batch = self._batch, []
        if error is not None:
            self._commit_failed(calls, error)
            self._free()
            return
        if self._stored:
            stored, self._stored = self._stored, []
            self.newest_seq = stored[-1].seq
            self._committed(stored)
        for call in calls:
            call.succeed()
        written = self._connection.status(apsw.SQLITE_DBSTATUS_CACHE_WRITE)[0]
        if written - self._pages_at_checkpoint < self._checkpoint_pages:
            self._free()
        else:
            self._pages_at_checkpoint = written
            self._jobs.put("PRAGMA wal_checkpoint(PASSIVE)")
            self._await_disk(self._checkpointed, _GIVE_WAY)

    def _checkpointed(self, error: apsw.Error | None) -> None:
        if error is not None:  # the log keeps everything; the next commit tries again, and reports what does not pass
            _log.warning("checkpoint-failed", error=str(error))
        self._free()

    def _commit_failed(self, calls: list[_Call], error: apsw.Error) -> None:
        self._stored = []
        if _is_full(error):
            self._applier.rollback()
            self._disk_full(calls)
            return
        # What reached the disk is unknown, and the kernel may have dropped dirty pages: nothing written from here on could be
        # trusted, not even after a retry ("fsyncgate", https://lwn.net/Articles/752063/). The connection stays as it is.
        self._broken(
            calls,
            OutcomeUnknown("the disk did not confirm the commit; it may have happened"),
            StoreUnavailable(f"the disk failed: {error}"),
        )

    def _disk_full(self, calls: list[_Call]) -> None:
        self.read_only = True
        self._fail(calls, _storage_full())
        for call in self._take_all():
            if any(change.writes for change in call.changes):
                call.fail(_storage_full())
            else:
                self._waiting.append(call)
                self._waiting_changes += len(call.changes)
        self._full()

    def _broken(self, calls: list[_Call], outcome: Problem, reason: Problem) -> None:
        self._refuse = reason.detail
        self._fail(calls, outcome)
        self._fail(self._take_all(), reason)
        self._fatal(reason)

    def _fail(self, calls: list[_Call], error: Problem) -> None:
        for call in calls:
            call.fail(
                type(error)(error.detail, retry_after=error.retry_after)
            )  # each its own, since raising adds a traceback

    def _take_all(self) -> list[_Call]:
        calls = [*self._waiting]
        self._waiting.clear()
        self._waiting_changes = 0
        return calls

    def _free(self) -> None:
        if self._waiting:
            self._loop.call_soon(self._begin)  # callers that were just answered may have more for this transaction
            return
        self._busy = False
        idle, self._idle = self._idle, []
        for future in idle:
            future.set_result(None)


def _writes(call: _Call) -> int:
    return sum(len(change.writes) or 1 for change in call.changes) or 1


def _storage_full() -> StorageFull:
    return StorageFull("the disk is full; reads work, writes do not until there is space", retry_after=5)


def _is_full(error: apsw.Error) -> bool:
    # The shared-memory index of the log cannot grow on a full disk; SQLite reports that as an I/O error of its own.
    return isinstance(error, apsw.FullError) or getattr(error, "extendedresult", 0) == apsw.SQLITE_IOERR_SHMSIZE
