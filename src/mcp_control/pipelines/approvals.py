"""Questions to people: who may answer, which answers there are, and what becomes of a question. Pure."""

from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.events.log import fact
from mcp_control.kernel.changes import Entity, Fact, IndexValue
from mcp_control.kernel.clock import to_datetime
from mcp_control.kernel.errors import FieldError, Forbidden, Invalid, InvalidTransition
from mcp_control.kernel.ids import derived_id
from mcp_control.kernel.text import text_errors
from mcp_control.pipelines.expressions import Raw
from mcp_control.pipelines.input_model import (
    ANSWER_BYTES_MAX,
    APPROVAL_KIND,
    Answer,
    AnswerRequest,
    Approval,
    ApprovalState,
    ApprovalView,
    Given,
    Question,
)
from mcp_control.pipelines.model import Run, StageRun, StageState
from mcp_control.pipelines.params import resolve
from mcp_control.pipelines.plan import Plan
from mcp_control.pipelines.transitions import APPROVAL_TRANSITIONS
from mcp_control.security.model import Actor

_TITLE_MAX: Final = 500
_MESSAGE_MAX: Final = 4000
_COMMENT_MAX: Final = 2000
_SEPARATOR: Final = "\x1f"
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Question).decode
_read_answer: Final = msgspec.json.Decoder(Answer).decode


class _Text(msgspec.Struct):
    title: object = ""
    message: object = ""


def approval_id(run_id: str, stage: str, round: int) -> str:
    """Return the id of the question that a stage asks in a round."""
    return derived_id("approval", run_id, stage, "approval", round)


def asked(run: Run, stage: StageRun, asks: Approval, text: Raw, now: int) -> Question:
    """Return the question of a stage that has begun to wait; `text` is its title and message with values filled in, as JSON."""
    shown = msgspec.json.decode(text, type=_Text)
    return Question(
        id=approval_id(run.id, stage.id, stage.round),
        version=0,
        tenant=run.tenant,
        run_id=run.id,
        pipeline=run.pipeline,
        stage=stage.id,
        round=stage.round,
        asks=asks,
        title=_shown(shown.title, _TITLE_MAX),
        message=_shown(shown.message, _MESSAGE_MAX),
        asked_at=now,
        due_at=stage.deadline_at,
    )


def _shown(value: object, length: int) -> str:
    return (value if isinstance(value, str) else msgspec.json.encode(value).decode())[:length]


def closed(question: Question, stage: StageRun, output: Raw | None) -> Question:
    """Return a question whose stage waits no more; `output` is what that put out, None where nobody answered."""
    if output is not None:
        after = _after(question, "expire" if _read_answer(output).expired else "answer")
        return replace(after, output=bytes(output))
    return _after(question, "expire" if stage.reason == "approval-expired" else "withdraw")


def _after(question: Question, verb: str) -> Question:
    (state,) = APPROVAL_TRANSITIONS[verb][question.state]
    return replace(question, state=state)


def may_answer(question: Question, actor: Actor) -> bool:
    """Say whether this account is one of those that are asked."""
    asks = question.asks
    if not asks.assignees and not asks.roles:
        return True
    return actor.id in asks.assignees or actor.display in asks.assignees or not set(actor.roles).isdisjoint(asks.roles)


def given(question: Question, actor: Actor, request: AnswerRequest, now: int) -> Given:
    """Return an answer as its stage gets it.

    Raises:
        Forbidden: somebody else is asked.
        InvalidTransition: it is closed.
        Invalid: no such option, or the fields; everything that is wrong.
    """
    if not may_answer(question, actor):
        raise Forbidden("this question is for others to answer")
    if question.state is not ApprovalState.PENDING:
        raise closed_already(question)
    found: list[FieldError] = list(text_errors("#/comment", request.comment.replace("\n", " "), _COMMENT_MAX))
    if request.option not in question.asks.options:
        detail = f"must be one of {', '.join(question.asks.options)}"
        found.append(FieldError(pointer="#/option", code="out-of-range", detail=detail))
    fields: dict[str, bytes] = {}
    try:
        fields = resolve(question.asks.fields, request.fields)
    except Invalid as problem:
        found += [replace(error, pointer=error.pointer.replace("#/params", "#/fields", 1)) for error in problem.errors]
    answer = Answer(
        option=request.option,
        fields={name: msgspec.Raw(text) for name, text in fields.items()},
        comment=request.comment,
        by=actor.id,
        at=to_datetime(now),
    )
    output = msgspec.json.encode(answer)
    if len(output) > ANSWER_BYTES_MAX:
        detail = f"an answer has at most {ANSWER_BYTES_MAX >> 10} KiB"
        found.append(FieldError(pointer="#", code="limit-exceeded", detail=detail))
    if found:
        raise Invalid(found[0].detail, errors=found[:50])
    return Given(output, request.option)


def answered(plan: Plan, run: Run, question: Question, answer: Given, now: int) -> Run:
    """Return a run whose waiting stage got an answer. Raises InvalidTransition when it waits no more."""
    place = plan.place_of.get(question.stage)
    stage = None if place is None else run.stages[place]
    if place is None or stage is None or stage.round != question.round or stage.state is not StageState.INPUT_REQUIRED:
        raise closed_already(question)
    if stage.deadline_at is not None and stage.deadline_at <= now:
        raise InvalidTransition("the time to answer is over", state=ApprovalState.EXPIRED.value, allowed=[])
    stages = list(run.stages)
    stages[place] = replace(stage, given=answer)
    return replace(run, stages=stages)


def closed_already(question: Question) -> InvalidTransition:
    """Return the problem of one who answers too late."""
    state = question.state
    how = "closed meanwhile" if state is ApprovalState.PENDING else state.value
    return InvalidTransition(f"this question is {how}", state=state.value, allowed=[])


# --- stored and shown ---------------------------------------------------------------------------------------------


def scoped(tenant: str, state: ApprovalState) -> str:
    """Return the index value of a state within a tenant."""
    return f"{tenant}{_SEPARATOR}{state.value}"


def write_question(question: Question) -> Entity:
    """Return the entity that writes a question over the version it was read at."""
    index: dict[str, IndexValue] = {
        "tenant": question.tenant,
        "state": scoped(question.tenant, question.state),
        "asked": question.asked_at,
        "run": question.run_id or None,
    }
    after = replace(question, version=question.version + 1)
    return Entity(APPROVAL_KIND.name, question.id, question.version, index, _encode(after))


def read_question(entity: Entity) -> Question:
    """Return the question in a stored entity."""
    return _decode(entity.hot)


def question_fact(question: Question, actor: str, now: int) -> Fact:
    """Return the fact that a question was asked or closed."""
    verb = "requested" if question.state is ApprovalState.PENDING else question.state.value
    data: dict[str, object] = {"stage": question.stage, "title": question.title, "state": question.state.value}
    if question.task_id:
        data["task_id"] = question.task_id
    if question.output:
        answer = _read_answer(question.output)
        data.update(option=answer.option, by=answer.by)
    return fact(f"approval.{verb}", question.id, actor, now, data, tenant=question.tenant, run=question.run_id)


def question_view(question: Question, actor: Actor) -> ApprovalView:
    """Return a question as this caller sees it."""
    asks = question.asks
    return ApprovalView(
        id=question.id,
        state=question.state,
        title=question.title,
        message=question.message,
        options=asks.options,
        fields=asks.fields,
        assignees=asks.assignees,
        roles=asks.roles,
        default=asks.default,
        task_id=question.task_id,
        run_id=question.run_id,
        pipeline=question.pipeline,
        stage=question.stage,
        asked_at=to_datetime(question.asked_at),
        due_at=None if question.due_at is None else to_datetime(question.due_at),
        answer=_read_answer(question.output) if question.output else None,
        mine=question.state is ApprovalState.PENDING and may_answer(question, actor),
        etag=str(question.version),
    )
