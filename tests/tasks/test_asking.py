"""Questions of handlers to people: the task waits without a slot, and goes on with the answer."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from mcp_control.kernel.errors import Forbidden, Invalid, InvalidTransition
from mcp_control.kernel.ids import make_id
from mcp_control.pipelines.asks import settled
from mcp_control.pipelines.catalogue import Catalogue
from mcp_control.pipelines.input_model import AnswerRequest, ApprovalState, ApprovalView
from mcp_control.pipelines.inputs import Inputs
from mcp_control.pipelines.service import PipelineEngine
from mcp_control.security.model import Actor
from mcp_control.tasks import asking
from mcp_control.tasks.ask_model import QUESTIONS_MAX, Answered, Ask, ask_errors
from mcp_control.tasks.model import Origin, TaskState
from mcp_control.tasks.wire import Assignment
from tests.tasks.test_transitions import NOW, a_task, apply
from tests.tasks.world import ADMIN, Peer, World, world_at

S = TaskState
BEN = Actor(id="user_ben", kind="user", display="ben", roles=("operator",))
DELETE = Ask(key="delete", title="Delete 40 rows?", options=["yes", "no"], timeout_seconds=3600)


class Desk:
    """A world, an agent with one slot, and the inbox."""

    def __init__(self, world: World, peer: Peer) -> None:
        self.world = world
        self.peer = peer
        catalogue = Catalogue(world.store, world.clock, world.ids, lambda _tenant: {"echo"})
        engine = PipelineEngine(world.store, world.clock, world.ids, world.settler, catalogue)
        self.inputs = Inputs(world.store, world.clock, world.ids, engine, world.settler)

    async def given(self, count: int) -> Assignment:
        """Wait for the assignment with this attempt."""

        async def there() -> bool:
            return any(one.attempt == count for one in self.peer.given.values())

        await self.world.until(there)
        return next(one for one in self.peer.given.values() if one.attempt == count)

    async def asks(self, ask: Ask = DELETE, **fields: object) -> tuple[str, ApprovalView]:
        """Submit a task whose first attempt asks; return its id and the question in the inbox."""
        task = await self.world.submit(**fields)
        assert (await self.peer.done(await self.given(1), "asked", ask=ask)).refused == []
        (view,) = (await self.inputs.list(ADMIN, state=ApprovalState.PENDING)).items
        assert (view.task_id, view.title, view.options) == (task.id, ask.title, ask.options)
        return task.id, view

    async def answer(self, view: ApprovalView, option: str, actor: Actor = ADMIN, comment: str = "") -> ApprovalView:
        """Answer a question."""
        return await self.inputs.answer(actor, view.id, AnswerRequest(option=option, comment=comment), int(view.etag))


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    """A desk on an empty folder."""
    async with world_at(tmp_path) as world:
        yield Desk(world, await world.agent())


async def test_a_task_that_asks_holds_nothing_and_goes_on_with_the_answer(desk: Desk) -> None:
    """The slot is free for others meanwhile, no failure is counted, and the next attempt carries the answer, even where one is allowed."""
    task_id, view = await desk.asks(retry={"max_attempts": 1})
    waiting = await desk.world.task(task_id)
    assert (waiting.state, waiting.failures, waiting.lease, waiting.attempts[-1].outcome) == (
        S.INPUT_REQUIRED,
        0,
        None,
        "asked",
    )
    told = await desk.world.tasks.explain(ADMIN, task_id)
    assert (told.code, told.held_by) == ("input-required", [])
    assert view.id in told.message
    other = await desk.world.submit()
    await desk.peer.done(next(one for one in await desk.peer.until_given(2) if one.task_id == other.id))
    answered = await desk.answer(view, "yes", comment="looked at them")
    assert (answered.state, answered.mine) == (ApprovalState.ANSWERED, False)
    again = await desk.given(2)
    answer = again.answers["delete"]
    assert (again.task_id, answer.title, answer.option, answer.comment, answer.by) == (
        task_id,
        DELETE.title,
        "yes",
        "looked at them",
        ADMIN.id,
    )
    await desk.peer.done(again)
    ended = await desk.world.task(task_id)
    assert (ended.state, ended.failures, ended.asked) == (S.COMPLETED, 0, None)
    facts = [stored.fact for stored in desk.world.facts if stored.fact.type.startswith("approval.")]
    assert [(fact.type, fact.actor) for fact in facts] == [
        ("approval.requested", desk.peer.actor.id),
        ("approval.answered", ADMIN.id),
    ]


async def test_only_who_is_asked_answers_and_only_once(desk: Desk) -> None:
    """Others are forbidden, an option that was not offered is invalid, the second answer is refused."""
    ask = Ask(key="k", title="Go on?", options=["yes", "no"], assignees=["anna"], roles=["administrator"])
    task_id, view = await desk.asks(ask)
    assert (await desk.world.tasks.explain(ADMIN, task_id)).held_by == ["anna", "role administrator"]
    with pytest.raises(Forbidden):
        await desk.answer(view, "yes", BEN)
    with pytest.raises(Invalid) as refused:
        await desk.answer(view, "maybe")
    assert [(error.pointer, error.code) for error in refused.value.errors] == [("#/option", "out-of-range")]
    await desk.answer(view, "no")
    with pytest.raises(InvalidTransition):
        await desk.answer(view, "yes")
    assert (await desk.given(2)).answers["k"].option == "no"


@pytest.mark.parametrize(("default", "state", "reason"), [("no", S.ASSIGNED, ""), (None, S.FAILED, "approval-expired")])
async def test_after_its_time_the_default_is_the_answer(
    desk: Desk, default: str | None, state: TaskState, reason: str
) -> None:
    """Nobody answers in time: the default does, and without one the task fails by a reason of its own; the question is closed."""
    ask = Ask(key="k", title="Go on?", options=["yes", "no"], timeout_seconds=60, default=default)
    task_id, view = await desk.asks(ask)
    desk.world.advance(61)
    with pytest.raises(InvalidTransition):
        await desk.answer(view, "yes")
    await desk.world.timekeeper.once()
    assert (await desk.inputs.get(ADMIN, view.id)).state is ApprovalState.EXPIRED
    if default is not None:
        answer = (await desk.given(2)).answers["k"]
        assert (answer.option, answer.by, answer.expired) == ("no", "system", True)
    ended = await desk.world.task(task_id)
    assert (ended.state, ended.reason, ended.failures) == (state, reason, 0)


async def test_cancelling_a_task_withdraws_its_question_and_a_retry_begins_without_answers(desk: Desk) -> None:
    """Nobody can answer what is not waited for any more; the task that takes its place asks anew."""
    task_id, view = await desk.asks()
    await desk.world.control.cancel(ADMIN, task_id)
    assert (await desk.inputs.get(ADMIN, view.id)).state is ApprovalState.WITHDRAWN
    with pytest.raises(InvalidTransition):
        await desk.answer(view, "yes")
    retried = await desk.world.steering.dead_letters.retry(ADMIN, task_id, Origin(principal=ADMIN.id))
    (again,) = [one for one in await desk.peer.until_given(2) if one.task_id == retried.task.id]
    assert again.answers == {}


async def test_what_may_not_be_asked_fails_the_task_for_good(desk: Desk) -> None:
    """A question that makes no sense would be asked again and again: the task says why."""
    task = await desk.world.submit()
    await desk.peer.done(await desk.given(1), "asked", ask=Ask(key="k", title=" "))
    failed = await desk.world.task(task.id)
    assert failed.failure is not None
    assert (failed.state, failed.failure.code) == (S.FAILED, "invalid-question")
    assert (await desk.inputs.list(ADMIN)).items == []


async def test_questions_go_with_their_task(desk: Desk) -> None:
    """When a task is removed after its time, nothing of it stays in the inbox."""
    task_id, view = await desk.asks()
    await desk.answer(view, "yes")
    await desk.peer.done(await desk.given(2), "asked", ask=Ask(key="more", title="More?"))
    await desk.world.control.cancel(ADMIN, task_id)
    assert len((await desk.inputs.list(ADMIN)).items) == 2
    desk.world.advance(31 * 86_400)
    await desk.world.retention.once()
    assert (await desk.inputs.list(ADMIN)).items == []


def test_a_task_asks_a_bounded_number_of_questions() -> None:
    """The question after the last one that is allowed, one with an answer, and none at all fail the task by a code."""
    answer = Answered(title="t", option="yes", by="u", at=NOW)
    full = a_task(S.RUNNING, answers={f"k{number}": answer for number in range(QUESTIONS_MAX)})
    found = [asking.refusal(full, ask) for ask in (DELETE, Ask(key="k1", title="t"), None)]
    assert [one and (one.error_class, one.code) for one in found] == [
        ("permanent", "too-many-questions"),
        ("permanent", "invalid-question"),
        ("permanent", "invalid-question"),
    ]
    assert asking.refusal(a_task(S.RUNNING), DELETE) is None


@pytest.mark.parametrize(
    ("ask", "pointer"),
    [
        (Ask(key="", title="t"), "#/key"),
        (Ask(key="k", title=""), "#/title"),
        (Ask(key="k", title="a\x00b"), "#/title"),
        (Ask(key="k", title="t", message="m" * 4001), "#/message"),
        (Ask(key="k", title="t", options=[]), "#/options"),
        (Ask(key="k", title="t", options=["a", "a"]), "#/options/1"),
        (Ask(key="k", title="t", default="approve"), "#/default"),
        (Ask(key="k", title="t", default="maybe", timeout_seconds=1), "#/default"),
        (Ask(key="k", title="t", assignees=["a"] * 101), "#/assignees"),
        (Ask(key="k", title="t", roles=[""]), "#/roles/0"),
        (Ask(key="k", title="t", timeout_seconds=0), "#/timeout_seconds"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(ask: Ask, pointer: str) -> None:
    """Each part of a question has its bounds, and the first that is passed is named."""
    assert [error.pointer for error in ask_errors(ask)] == [pointer]


@given(
    how=st.sampled_from(["answer", "time", "cancel", "expire", "exhaust"]),
    default=st.sampled_from([None, "yes"]),
    late=st.booleans(),
)
def test_a_question_is_written_twice_whatever_ends_it(how: str, default: str | None, late: bool) -> None:
    """Asked with the change that lets its task wait, closed with the one that ends that, and not written in between or after."""
    ask = Ask(key="k", title="Go on?", options=["yes", "no"], timeout_seconds=10, default=default)
    task = replace(a_task(S.RUNNING), id=make_id("task", NOW, bytes(16)))
    waiting, (asked,), (requested,) = settled(asking.ask(task, ask, NOW), "agent_a")
    assert (asked.version, requested.type) == (0, "approval.requested")
    assert settled(waiting, "u") == (waiting, [], [])
    now = NOW + (10_000 if late else 9_999)
    if how == "time":
        assert waiting.asked is not None
        after = asking.timed_out(waiting, waiting.asked, now)
    elif how == "answer":
        answer = Answered(title=ask.title, option="no", by="u", at=now)
        if late:
            with pytest.raises(InvalidTransition):
                asking.answered(waiting, "k", answer, now)
            return
        after = asking.answered(waiting, "k", answer, now)
    else:
        after = apply(how, waiting, now)
    ended, (closed,), (told,) = settled(after, "u")
    assert (closed.version, closed.id) == (1, asked.id)
    expected = {"answer": "answered", "time": "expired"}.get(how, "withdrawn")
    assert told.type == f"approval.{expected}"
    assert ended.asked is None or settled(ended, "u") == (ended, [], [])
    assert asking.inbox_ids(ended) == [asked.id]
