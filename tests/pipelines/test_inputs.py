"""Stages that wait for people and for signals, on the real store with the real task component."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from mcp_control.kernel.errors import (
    Forbidden,
    IdempotencyMismatch,
    Invalid,
    InvalidTransition,
    NotFound,
    Problem,
    VersionConflict,
)
from mcp_control.pipelines.builder import PipelineBuilder
from mcp_control.pipelines.definition_model import PipelineSpec
from mcp_control.pipelines.input_model import AnswerRequest, ApprovalState, ApprovalView, Param
from mcp_control.pipelines.model import Run, RunState
from mcp_control.security.model import Actor
from tests.pipelines.world import ANNA, World, world

BERT = Actor(id="user_bert", kind="user", display="Bert", roles=("administrator",))


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


def asking(
    assignees: tuple[str, ...] = (), timeout_seconds: float | None = None, default: str | None = None
) -> PipelineSpec:
    p = PipelineBuilder("asking", max_running=1)
    where = p.param("where", default="production")
    build = p.stage("build", "work")
    ask = p.approval(
        "ask",
        "Deploy to ${{ params.where }}?",
        message="It has ${{ stages.build.output.size }} parts.",
        needs=[build],
        options=["approve", "later", "reject"],
        assignees=assignees,
        fields={"ticket": Param(default="none"), "share": Param(type="integer", required=False)},
        timeout_seconds=timeout_seconds,
        default=default,
    )
    p.stage("beside", "work", needs=[build])
    p.stage("deploy", "work", needs=[ask], with_={"answer": ask.output, "where": where})
    return p.build()


async def question(here: World, run: Run) -> ApprovalView:
    (found,) = (await here.inputs.list(ANNA, run=run.id, state=ApprovalState.PENDING)).items
    return found


async def asked(here: World, spec: PipelineSpec) -> tuple[Run, ApprovalView]:
    run = await here.start(spec)
    await here.finish(await here.tasks(run), {"size": 3})
    return run, await question(here, run)


async def test_an_approval_waits_without_a_slot_and_its_answer_goes_on(here: World) -> None:
    """While people are asked other stages run though only one may; the answer and who gave it reach the next stage."""
    run, view = await asked(here, asking())
    assert (view.title, view.message, view.mine) == ("Deploy to production?", "It has 3 parts.", True)
    (beside,) = await here.tasks(run)
    assert beside.links.stage == "beside"
    assert (await here.run(run)).state is RunState.RUNNING
    await here.finish([beside])
    assert (await here.run(run)).state is RunState.INPUT_REQUIRED
    stage = (await here.engine.view(ANNA, await here.run(run))).stages[1]
    assert stage.waits_for is not None
    assert stage.waits_for.approval == view.id
    here.restart()
    raw = {"ticket": msgspec.Raw(b'"T-1"')}
    after = await here.inputs.answer(BERT, view.id, AnswerRequest(option="approve", fields=raw, comment="go"), 1)
    assert after.answer is not None
    assert (after.state, after.answer.by, after.answer.option) == (ApprovalState.ANSWERED, BERT.id, "approve")
    (deploy,) = await here.tasks(run)
    payload = await here.payload(deploy)
    assert isinstance(payload, dict)
    answer = payload["answer"]
    assert (answer["by"], answer["fields"], answer["comment"]) == (BERT.id, {"ticket": "T-1", "share": None}, "go")
    await here.finish([deploy])
    assert (await here.run(run)).state is RunState.COMPLETED
    told = [kind for kind in here.told(run) if kind.startswith("approval") or kind == "stage.waiting"]
    assert told == ["stage.waiting", "approval.requested", "approval.answered"]


async def test_a_rejection_ends_the_run_and_says_so(here: World) -> None:
    """`reject` fails the stage and the run; its output is kept, nothing after it starts."""
    run, view = await asked(here, asking())
    await here.finish(await here.tasks(run))
    await here.inputs.answer(ANNA, view.id, AnswerRequest(option="reject"), 1)
    ended = await here.run(run)
    assert (ended.state, ended.reason) == (RunState.FAILED, "rejected")
    assert [stage.state.value for stage in ended.stages] == ["completed", "failed", "completed", "skipped"]
    assert msgspec.json.decode(await here.engine.output(ANNA, run.id, "ask"))["option"] == "reject"
    again = await here.engine.retry(ANNA, run.id)
    assert again.state is RunState.INPUT_REQUIRED
    assert (await question(here, run)).id != view.id


async def test_of_many_answers_one_wins(here: World) -> None:
    """Answers given at the same moment: one is taken, the others are told that it is closed, and the run goes on once."""
    run, view = await asked(here, asking())
    await here.finish(await here.tasks(run))
    options = ["approve", "later", "reject"] * 3
    found = await asyncio.gather(
        *(here.inputs.answer(ANNA, view.id, AnswerRequest(option=option), 1) for option in options),
        return_exceptions=True,
    )
    assert sum(isinstance(one, ApprovalView) for one in found) == 1
    assert all(isinstance(one, ApprovalView | InvalidTransition | VersionConflict) for one in found)
    assert len(await here.tasks(run)) <= 1
    assert here.told(run).count("approval.answered") == 1


async def test_an_answer_nobody_may_give_or_take_is_refused(here: World) -> None:
    """Other accounts, other options, wrong fields, an old version, another tenant: each has its problem, and the question stays."""
    _, view = await asked(here, asking(assignees=("Bert",)))
    cases: list[tuple[Actor, AnswerRequest, int, type[Problem]]] = [
        (ANNA, AnswerRequest(option="approve"), 1, Forbidden),
        (BERT, AnswerRequest(option="perhaps"), 1, Invalid),
        (BERT, AnswerRequest(option="approve", fields={"share": msgspec.Raw(b'"x"')}), 1, Invalid),
        (BERT, AnswerRequest(option="approve", fields={"more": msgspec.Raw(b"1")}), 1, Invalid),
        (BERT, AnswerRequest(option="approve"), 2, VersionConflict),
        (msgspec.structs.replace(BERT, tenant="other"), AnswerRequest(option="approve"), 1, NotFound),
    ]
    for actor, request, version, problem in cases:
        with pytest.raises(problem) as refused:
            await here.inputs.answer(actor, view.id, request, version)
        assert all(error.pointer.startswith(("#/option", "#/fields")) for error in refused.value.errors)
    assert [one.id for one in (await here.inputs.list(BERT, mine=True)).items] == [view.id]
    assert (await here.inputs.list(ANNA, mine=True)).items == []
    assert (await here.inputs.answer(BERT, view.id, AnswerRequest(option="approve"), 1)).state.value == "answered"


@pytest.mark.parametrize(
    ("default", "state", "reason"), [("later", RunState.RUNNING, ""), (None, RunState.FAILED, "approval-expired")]
)
async def test_a_question_nobody_answers_takes_its_default_or_fails(
    here: World, default: str | None, state: RunState, reason: str
) -> None:
    """After the time-out the default is the answer, without one the stage fails; an answer that comes after is refused."""
    run, view = await asked(here, asking(timeout_seconds=60, default=default))
    await here.finish(await here.tasks(run))
    await here.healer.once(here.clock.now())
    assert (await here.run(run)).state is RunState.INPUT_REQUIRED
    here.clock.advance(60.0)
    with pytest.raises(InvalidTransition):
        await here.inputs.answer(ANNA, view.id, AnswerRequest(option="approve"), 1)
    await here.healer.once(here.clock.now())
    ended = await here.run(run)
    assert (ended.state, ended.reason) == (state, reason)
    after = await here.inputs.get(ANNA, view.id)
    assert after.state is ApprovalState.EXPIRED
    assert (after.answer is not None and after.answer.expired) == (default is not None)
    with pytest.raises(InvalidTransition):
        await here.inputs.answer(ANNA, view.id, AnswerRequest(option="approve"), 2)
    assert "approval.expired" in here.told(run)


async def test_a_cancelled_run_withdraws_its_question(here: World) -> None:
    """The inbox holds nothing of a run that has ended; a paused run may still be answered, and starts nothing."""
    run, view = await asked(here, asking())
    await here.finish(await here.tasks(run))
    await here.engine.cancel(ANNA, run.id)
    assert (await here.run(run)).state is RunState.CANCELLED
    assert (await here.inputs.get(ANNA, view.id)).state is ApprovalState.WITHDRAWN
    other, view = await asked(here, asking())
    await here.finish(await here.tasks(other))
    assert (await here.engine.pause(ANNA, other.id)).state is RunState.PAUSED
    await here.inputs.answer(ANNA, view.id, AnswerRequest(option="later"), 1)
    assert await here.tasks(other) == []
    await here.engine.resume(ANNA, other.id)
    assert len(await here.tasks(other)) == 1


def signalled(timeout_seconds: float | None = None, default: object = msgspec.UNSET) -> PipelineSpec:
    p = PipelineBuilder("signalled")
    order = p.param("order", "integer")
    first = p.stage("first", "work", with_={"order": order})
    paid = p.wait_for(
        "paid",
        "payment",
        match="output.body.order == params.order",
        needs=[first],
        timeout_seconds=timeout_seconds,
        default=default,
    )
    p.stage("ship", "work", needs=[paid], with_={"amount": paid.field("body", "amount"), "late": paid.field("body")})
    return p.build()


async def test_a_signal_counts_whether_it_comes_before_or_while_its_stage_waits(here: World) -> None:
    """One that is sent early is kept; of those that do not match none is taken, and a repeated one is one."""
    for early in (True, False):
        run = await here.start(signalled(), order=7)
        if not early:
            await here.finish(await here.tasks(run))
            assert (await here.run(run)).state is RunState.INPUT_REQUIRED
        for body in (b'{"order": 6, "amount": 1}', b'"odd"', b'{"order": 7, "amount": 20}'):
            sent, new = await here.inputs.signal(ANNA, run.id, "payment", body, f"key-{len(body)}")
            again, repeated = await here.inputs.signal(ANNA, run.id, "payment", body, f"key-{len(body)}")
            assert (new, repeated, again.id) == (True, False, sent.id)
        if early:
            here.restart()
            await here.finish(await here.tasks(run))
        (ship,) = await here.tasks(run)
        assert await here.payload(ship) == {"amount": 20, "late": {"order": 7, "amount": 20}}
        assert [one.stage for one in await here.inputs.signals(ANNA, run.id)] == [None, None, "paid"]
        await here.finish([ship])
        assert (await here.run(run)).state is RunState.COMPLETED
        assert here.told(run).count("run.signalled") == 3


async def test_a_signal_that_cannot_be_meant_is_refused(here: World) -> None:
    """Another name, another body under the same key, a large one, a run that has ended or belongs to others."""
    run = await here.start(signalled(), order=7)
    await here.inputs.signal(ANNA, run.id, "payment", b"1", "k")
    with pytest.raises(IdempotencyMismatch):
        await here.inputs.signal(ANNA, run.id, "payment", b"2", "k")
    for name, body, code in (
        ("payments", b"1", "unknown-reference"),
        ("a b", b"1", "invalid-character"),
        ("payment", b'"' + b"x" * 70_000 + b'"', "limit-exceeded"),
    ):
        with pytest.raises(Invalid) as refused:
            await here.inputs.signal(ANNA, run.id, name, body)
        assert [error.code for error in refused.value.errors] == [code]
    with pytest.raises(NotFound):
        await here.inputs.signal(msgspec.structs.replace(ANNA, tenant="other"), run.id, "payment", b"1")
    await here.engine.cancel(ANNA, run.id)
    await here.settled()
    with pytest.raises(InvalidTransition):
        await here.inputs.signal(ANNA, run.id, "payment", b"1")


@pytest.mark.parametrize(("default", "state"), [({"amount": 0}, RunState.RUNNING), (msgspec.UNSET, RunState.FAILED)])
async def test_a_signal_that_does_not_come_is_replaced_or_fails_the_stage(
    here: World, default: object, state: RunState
) -> None:
    """After the time-out the default is the body; without one the stage fails."""
    run = await here.start(signalled(timeout_seconds=5, default=default), order=7)
    await here.finish(await here.tasks(run))
    here.clock.advance(5.0)
    await here.healer.once(here.clock.now())
    ended = await here.run(run)
    assert ended.state is state
    if state is RunState.RUNNING:
        (ship,) = await here.tasks(run)
        assert await here.payload(ship) == {"amount": 0, "late": {"amount": 0}}
    else:
        assert ended.reason == "signal-expired"
