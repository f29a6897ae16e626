"""Inputs: the verbs for what reaches a run from outside: the inbox of questions to people, and signals."""

import builtins
from hashlib import sha256
from typing import Final

from mcp_control.kernel.changes import Query, Where
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import FieldError, Invalid, NotFound, Problem, VersionConflict
from mcp_control.kernel.ids import IdSource
from mcp_control.kernel.paging import Page, decode_cursor, encode_cursor
from mcp_control.pipelines.approvals import (
    answered,
    closed_already,
    given,
    may_answer,
    question_view,
    read_question,
    scoped,
)
from mcp_control.pipelines.asks import answer_of
from mcp_control.pipelines.input_model import (
    APPROVAL_KIND,
    SIGNAL_BYTES_MAX,
    AnswerRequest,
    ApprovalState,
    ApprovalView,
    Question,
    Signal,
    SignalView,
)
from mcp_control.pipelines.service import PipelineEngine
from mcp_control.pipelines.signals import SIGNAL_NAME, received, repeated, signal_fact, signal_view
from mcp_control.security.model import Actor
from mcp_control.security.policy import allow
from mcp_control.storage.ports import Store
from mcp_control.tasks.ledger import Intent
from mcp_control.tasks.settling import Settler
from mcp_control.tasks.submission import check_key
from mcp_control.tasks.verbs import answering

_PAGES: Final = 20


class Inputs:
    """Lists and answers questions, and takes signals."""

    def __init__(self, store: Store, clock: Clock, ids: IdSource, engine: PipelineEngine, settler: Settler) -> None:
        self._store = store
        self._clock = clock
        self._ids = ids
        self._engine = engine
        self._settler = settler

    # --- the inbox ------------------------------------------------------------------------------------------------

    async def list(
        self,
        actor: Actor,
        *,
        state: ApprovalState | None = None,
        run: str | None = None,
        mine: bool = False,
        cursor: str | None = None,
        limit: int = 50,
    ) -> Page[ApprovalView]:
        """Return a page of questions, the newest first; `mine` are those that wait for this account."""
        allow(actor, "approvals.list")
        if mine:
            state = ApprovalState.PENDING
        if run is not None:
            where = Where("run", "eq", run)  # it has few questions; two conditions have no index
        elif state is not None:
            where = Where("state", "eq", scoped(actor.tenant, state))
        else:
            where = Where("tenant", "eq", actor.tenant)
        after = None if cursor is None else decode_cursor("approvals", cursor, 2)
        items: builtins.list[Question] = []
        for _ in range(_PAGES):
            query = Query(where=[where], order="asked", descending=True, after=after, limit=limit + 1)
            rows = await self._store.find(APPROVAL_KIND.name, query)
            for row in rows:
                question = read_question(row)
                if question.tenant != actor.tenant or (state is not None and question.state is not state):
                    continue
                if mine and not may_answer(question, actor):
                    continue
                if len(items) == limit:
                    last = items[-1]
                    return self._page(actor, items, encode_cursor("approvals", [last.asked_at, last.id]))
                items.append(question)
            if len(rows) <= limit:
                return self._page(actor, items, None)
            after = [rows[-1].index["asked"], rows[-1].id]
        return self._page(actor, items, encode_cursor("approvals", after or []))

    def _page(self, actor: Actor, items: builtins.list[Question], cursor: str | None) -> Page[ApprovalView]:
        return Page(items=[question_view(each, actor) for each in items], next_cursor=cursor)

    async def get(self, actor: Actor, approval_id: str) -> ApprovalView:
        """Return a question. Raises NotFound."""
        allow(actor, "approvals.get", approval_id)
        return question_view(await self._load(actor, approval_id), actor)

    async def answer(self, actor: Actor, approval_id: str, request: AnswerRequest, version: int) -> ApprovalView:
        """Answer a question; the run or task goes on in the same commit. Of several answers one wins.

        Raises:
            NotFound: no such question.
            Forbidden: somebody else is asked.
            InvalidTransition: it is closed.
            VersionConflict: `version` is not that of the question.
            Invalid: the option or the fields.
        """
        allow(actor, "approvals.answer", approval_id)
        question = await self._load(actor, approval_id)
        answer = given(question, actor, request, self._clock.now())
        if question.version != version:
            raise VersionConflict("If-Match does not name the current version")
        if question.task_id:
            now = self._clock.now()
            decide = answering(question.ask_key, answer_of(question, answer), now)
            (outcome,) = await self._settler.settle([Intent(question.task_id, decide)])
            if isinstance(outcome, Problem):
                raise outcome
        else:
            await self._engine.ask(
                actor,
                question.run_id,
                lambda plan, run, now: answered(plan, run, question, answer, now),
                "",
                action="approvals.answer",
            )
        after = await self._load(actor, approval_id)
        if after.output != answer.output:
            raise closed_already(after)
        return question_view(after, actor)

    async def _load(self, actor: Actor, approval_id: str) -> Question:
        entity = (await self._store.get(APPROVAL_KIND.name, [approval_id]))[0]
        question = None if entity is None else read_question(entity)
        if question is None or question.tenant != actor.tenant:
            raise NotFound("no such approval")
        return question

    # --- signals --------------------------------------------------------------------------------------------------

    async def signal(
        self, actor: Actor, run_id: str, name: str, body: bytes, key: str | None = None
    ) -> tuple[SignalView, bool]:
        """Send a signal to a run, durable on return, and say whether it is new; the body is checked JSON.

        Raises:
            NotFound: no such run.
            InvalidTransition: it has ended.
            Invalid: the name or the body; nothing of its pipeline waits for it; or too many.
            IdempotencyKeyInvalid, IdempotencyMismatch: the key, or another signal under the same key.
        """
        check_key(key)
        if not SIGNAL_NAME.fullmatch(name):
            detail = "a signal is named with letters, digits, `_`, `-` and `.`, first a letter; at most 64"
            raise Invalid(detail, errors=[FieldError(pointer="#/name", code="invalid-character", detail=detail)])
        if len(body) > SIGNAL_BYTES_MAX:
            detail = f"a signal has at most {SIGNAL_BYTES_MAX >> 10} KiB; pass data as artifacts"
            raise Invalid(detail, errors=[FieldError(pointer="#", code="limit-exceeded", detail=detail)])
        signal = Signal(
            id=self._ids.new("sig"),
            name=name,
            at=self._clock.now(),
            by=actor.id,
            key=key,
            digest="" if key is None else sha256(name.encode() + b"\x1f" + body).hexdigest(),
        )
        run = await self._engine.ask(
            actor,
            run_id,
            lambda plan, run, _now: received(plan, run, signal),
            lambda run: signal_fact(run, signal),
            action="runs.signal",
            signals={signal.id: body},
        )
        there = next((each for each in run.signals if each.id == signal.id), None) or repeated(run, signal)
        return signal_view(there or signal), there is None or there.id == signal.id

    async def signals(self, actor: Actor, run_id: str) -> builtins.list[SignalView]:
        """Return the signals a run got, the first one first. Raises NotFound."""
        return [signal_view(each) for each in (await self._engine.run(actor, run_id)).signals]
