"""Group commit: calls that come while one transaction runs become the next (docs/decisions/0001-group-commit.md).

A transaction that is interrupted is repeated until the caller's time is up; one whose commit was sent is never repeated, only its commit
is, which MongoDB answers alike however often it is asked. What no answer could be had for is `OutcomeUnknown`. A call's time begins when
it is made: what it waits for others is part of it.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import pymongo
import structlog
from bson.errors import BSONError
from bson.objectid import ObjectId
from bson.timestamp import Timestamp
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import DocumentTooLarge, OperationFailure, PyMongoError
from pymongo.read_preferences import ReadPreference

from mcp_control.kernel.changes import Change, IndexValue
from mcp_control.kernel.errors import OutcomeUnknown, Overloaded, Problem, StoreUnavailable
from mcp_control.storage.mongo.batch import (
    Place,
    Plan,
    Prepared,
    Row,
    Shapes,
    Value,
    assume,
    decide,
    pack,
    prepare,
    questions,
)
from mcp_control.storage.mongo.client import (
    BUDGET,
    MAJORITY,
    SNAPSHOT,
    Client,
    Database,
    Document,
    Primary,
    unavailable,
)
from mcp_control.storage.mongo.commands import NOT_READ, many_updates, steps
from mcp_control.storage.mongo.queue import Call, CallQueue, Outcomes
from mcp_control.storage.mongo.schema import PENDING
from mcp_control.storage.mongo.sequencer import NotPlacedError, Placed, Sequencer

_log = structlog.get_logger(__name__)
_DUPLICATE_KEY: Final = 11000
_PAUSE: Final = 0.002  # before a transaction is repeated, doubled each time
_LONGEST_PAUSE: Final = 0.1
_LEAST: Final = 0.5  # seconds a transaction is given; who has less left hears for certain that nothing happened
_TRANSIENT: Final = "TransientTransactionError"


class _AssumptionFailedError(Exception):
    """An entity is not at the version that a plan took for granted, or a unique value is taken."""


class _InterruptedError(Exception):
    """The transaction was taken back and can be repeated; `problem` is what to say when there is no time for it."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


class GroupCommit:
    """Merges commit calls into transactions.

    Args:
        client: what the database was reached through.
        primary: of the replica set.
        database: where the collections are.
        shapes: the kinds that may be written.
        max_waiting: changes that may wait; more raise Overloaded.
        batch_writes: entity writes after which a transaction takes no further calls. A call is never split.
        sequencer: gives facts their places, in the same transaction where this server leads.
        wrote: called when facts were left pending.
    """

    def __init__(
        self,
        client: Client,
        primary: Primary,
        database: Database,
        shapes: Shapes,
        *,
        max_waiting: int,
        batch_writes: int,
        sequencer: Sequencer,
        wrote: Callable[[], None],
    ) -> None:
        self._primary = primary
        self._database = database
        self._shapes = shapes
        self._max_waiting = max_waiting
        self._sequencer = sequencer
        self._wrote = wrote
        self._loop = asyncio.get_running_loop()
        self._session: AsyncClientSession = client.start_session(causal_consistency=False)
        self._queue = CallQueue(batch_writes)
        self._running: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def waiting(self) -> int:
        """Changes that are queued behind the one transaction under way."""
        return self._queue.changes

    @property
    def session_id(self) -> bytes:
        """The id of the session in which all transactions run."""
        return bytes(self._session.session_id["id"])

    def submit(self, changes: Sequence[Change]) -> "asyncio.Future[Outcomes]":
        """Queue changes; the future gets their outcomes when they are durable.

        Raises:
            ValueError, OverflowError: a change could not be stored.
            Overloaded, StoreUnavailable: nothing was queued.
        """
        if self._closed:
            raise StoreUnavailable("the store is closed")
        if self._queue and self._queue.changes + len(changes) > self._max_waiting:
            raise Overloaded("too many changes wait for MongoDB", retry_after=1)
        deadline = self._loop.time() + BUDGET
        call = Call([prepare(self._shapes, change) for change in changes], self._loop.create_future(), deadline)
        self._queue.put(call)
        if self._running is None:
            self._running = asyncio.create_task(self._run(), name="mongo-commit")
        return call.future

    async def close(self) -> None:
        """Finish what waits, accept nothing more."""
        self._closed = True
        if self._running is not None:
            await asyncio.wait([self._running])
        await self._session.end_session()

    # --- batches --------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while self._queue:
                await asyncio.sleep(0)  # callers that were just answered may have more for this transaction
                calls = self._queue.take()
                try:
                    await self._one(calls)
                except Exception as error:
                    _log.error("commit-failed", error=str(error), exc_info=True)
                    self._fail(calls, OutcomeUnknown("the store failed; the change may have happened"))
                late = self._queue.take_due(self._loop.time() + _LEAST)
                self._fail(late, StoreUnavailable("MongoDB is too slow for what waits", retry_after=1))
        finally:
            self._running = None

    async def _one(self, calls: list[Call]) -> None:
        """Commit a batch, however many tries it takes, and answer its callers, all of them in the time of the one that came first."""
        items = [item for call in calls for item in call.items]
        deadline = max(calls[0].deadline, self._loop.time() + _LEAST)
        pause = _PAUSE
        exact, aside = False, False
        while True:
            try:
                outcomes = await self._try(items, exact, aside, deadline)
            except _AssumptionFailedError:
                exact = True
                continue
            except NotPlacedError:
                aside = True
                continue
            except _InterruptedError as interrupted:
                if self._loop.time() + pause < deadline:
                    await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311  spreads servers, protects nothing
                    pause = min(2 * pause, _LONGEST_PAUSE)
                    aside = True  # the head may be what was fought for
                    continue
                self._fail(calls, interrupted.problem)
                self._fail(self._queue.take_all(), interrupted.problem)  # it would be the same for them
                return
            except (OutcomeUnknown, StoreUnavailable) as problem:
                self._fail(calls, problem)
                if isinstance(problem, OutcomeUnknown):
                    self._fail(
                        self._queue.take_all(), StoreUnavailable("MongoDB does not confirm commits", retry_after=1)
                    )
                return
            except (OperationFailure, BSONError, DocumentTooLarge, OverflowError, ValueError) as error:
                await self._refused(calls, error)
                return
            at = 0
            for call in calls:
                if not call.future.done():
                    call.future.set_result(outcomes[at : at + len(call.items)])
                at += len(call.items)
            return

    async def _refused(self, calls: list[Call], error: Exception) -> None:
        """Something in the batch cannot be stored: find out which call it is."""
        if len(calls) > 1:
            for call in calls:
                await self._one([call])
        elif isinstance(error, PyMongoError) and not isinstance(error, (BSONError, DocumentTooLarge)):
            self._fail(calls, unavailable(error))
        else:
            calls[0].fail(ValueError(f"a change cannot be stored in MongoDB: {error}"))

    def _fail(self, calls: list[Call], error: Problem) -> None:
        for call in calls:  # each its own, since raising adds a traceback
            call.fail(type(error)(error.detail, retry_after=error.retry_after))

    # --- one transaction ------------------------------------------------------------------------------------------

    async def _try(self, items: list[Prepared], exact: bool, aside: bool, deadline: float) -> Outcomes:
        """Run the transaction; with the facts sequenced in it where this server may do so and `aside` does not say otherwise."""
        if aside or not self._sequencer.ready:
            plan, _ = await self._attempt(items, exact, deadline, sequence=False)
            if plan.facts:
                self._wrote()
            return plan.outcomes
        async with self._sequencer.turn_at_once():
            try:
                plan, placed = await self._attempt(items, exact, deadline, sequence=True)
            except _AssumptionFailedError:
                raise
            except BaseException:
                self._sequencer.failed()
                raise
            if placed is not None:
                self._sequencer.succeeded(placed)
        return plan.outcomes

    async def _attempt(
        self, items: list[Prepared], exact: bool, deadline: float, *, sequence: bool
    ) -> tuple[Plan, Placed | None]:
        plan = None if exact else assume(self._shapes, items)
        if plan is not None and not plan.operations and not plan.facts:
            raise _AssumptionFailedError  # all conflict with each other: look before saying so
        placed = None
        await self._session.start_transaction(SNAPSHOT, MAJORITY, ReadPreference.PRIMARY)
        try:
            async with self._asking(deadline):
                if plan is None:
                    plan = await self._decide(items)
                for step in steps(self._shapes, plan, await self._before(plan)):
                    await self._write(step.command, step.expected, plan.exact)
                if plan.facts and sequence:
                    placed = await self._sequencer.place(self._session, plan.facts, plan.count, plan.at)
                elif plan.facts:
                    await self._leave(plan)
        except BaseException as error:
            await self._abort(deadline)
            if isinstance(error, PyMongoError):
                raise self._translated(error, exact=plan is not None and plan.exact) from error
            raise
        await self._commit(deadline)
        return plan, placed

    @asynccontextmanager
    async def _asking(self, deadline: float) -> AsyncIterator[None]:
        with pymongo.timeout(max(deadline - self._loop.time(), 0.01)):
            async with self._primary.lasting():
                yield

    async def _before(self, plan: Plan) -> dict[Place, Document]:
        found: dict[Place, Document] = {}
        for kind, ids in many_updates(plan).items():
            cursor = self._database[kind].find(
                {"_id": {"$in": ids}}, NOT_READ, batch_size=len(ids) + 1, session=self._session
            )
            found.update(((kind, document["_id"]), document) for document in await cursor.to_list())
        return found

    async def _leave(self, plan: Plan) -> None:
        """Leave the facts for a sequencer. The server fills in the empty timestamp: its cluster time."""
        pending = {
            "_id": ObjectId(),
            "ts": Timestamp(0, 0),
            "n": plan.count,
            "at": plan.at,
            "d": pack(plan.facts, plan.count),
        }
        await self._write({"insert": PENDING, "documents": [pending]}, 1, plan.exact)

    async def _write(self, command: Document, expected: int | None, exact: bool) -> None:
        answer = await self._database.command(command, session=self._session)
        for error in answer.get("writeErrors", ()):
            raise OperationFailure(str(error.get("errmsg")), error.get("code"), error)
        if expected is not None and answer["n"] != expected:
            if exact:
                raise _InterruptedError(StoreUnavailable("an entity changed while it was being written", retry_after=1))
            raise _AssumptionFailedError

    def _translated(self, error: PyMongoError, *, exact: bool) -> Exception:
        if isinstance(error, OperationFailure) and error.code == _DUPLICATE_KEY:
            if not exact:
                return _AssumptionFailedError()
            return _InterruptedError(
                StoreUnavailable("a unique index that is not declared any more refuses a value; contract the store")
            )
        if (
            error.has_error_label(_TRANSIENT)
            or error.timeout
            or not isinstance(error, (OperationFailure, BSONError, DocumentTooLarge))
        ):
            return _InterruptedError(unavailable(error))
        return error

    async def _abort(self, deadline: float) -> None:
        if not self._session.in_transaction:
            return
        with pymongo.timeout(min(max(deadline - self._loop.time(), 0.1), 1.0)):
            try:
                await self._session.abort_transaction()
            except PyMongoError as error:  # the next transaction of this session ends it
                _log.info("abort-failed", error=type(error).__name__)

    async def _commit(self, deadline: float) -> None:
        while True:
            try:
                async with self._asking(deadline):
                    await self._session.commit_transaction()
            except PyMongoError as error:
                if error.has_error_label(_TRANSIENT):
                    raise _InterruptedError(unavailable(error)) from error
                if self._loop.time() + _PAUSE >= deadline:
                    raise OutcomeUnknown(
                        "MongoDB did not confirm the commit; it may have happened", retry_after=1
                    ) from error
                await asyncio.sleep(_PAUSE)
            else:
                return

    # --- what the exact way must know -----------------------------------------------------------------------------

    async def _decide(self, items: list[Prepared]) -> Plan:
        named, values = questions(self._shapes, items)
        rows: dict[Place, Row] = {}
        for kind, ids in named.items():
            async for found in self._find(kind, {"_id": {"$in": [*ids]}}):
                rows[kind, found["_id"]] = found["v"], found.get("i", {})
        return decide(self._shapes, items, rows, await self._holders(values))

    async def _holders(self, values: set[Value]) -> dict[Value, str]:
        holders: dict[Value, str] = {}
        by_index: dict[tuple[str, str], set[tuple[IndexValue, ...]]] = {}
        for kind, name, taken in values:
            by_index.setdefault((kind, name), set()).add(taken)
        for (kind, name), wanted in by_index.items():
            shape = self._shapes[kind]
            index = next(one for one in shape.uniques if one.name == name)
            paths = [shape.path(field) for field in index.fields]
            any_of = [{path: {"$eq": value} for path, value in zip(paths, one, strict=True)} for one in wanted]
            async for found in self._find(kind, {"$or": any_of}):
                held = shape.unique_values(index, found["_id"], found.get("i", {}))
                if held is not None:
                    holders[kind, name, held] = found["_id"]
        return holders

    def _find(self, kind: str, condition: Document) -> Any:
        return self._database[kind].find(condition, {"v": 1, "i": 1}, session=self._session)
