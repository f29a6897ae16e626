"""The attempts in hand, without a server."""

import asyncio
from typing import Any

import msgspec
import pytest

from mcp_control import Agent, Context, SyncContext
from mcp_control.sdk.runtime.outbox import Outbox
from mcp_control.sdk.runtime.work import StopReason
from mcp_control.sdk.runtime.workbench import Workbench
from mcp_control.tasks.ask_model import QUESTIONS_MAX, Answered
from mcp_control.tasks.wire import Assignment, Done


async def _value(payload: Any) -> Any:
    return payload


@pytest.mark.parametrize(("reason", "told"), [("lease", "released"), ("cancel", "cancelled"), ("gone", None)])
async def test_an_attempt_that_is_stopped_before_its_first_step_leaves_its_slot(
    reason: StopReason, told: str | None
) -> None:
    """What is stopped in the moment in which it came is neither held for ever nor forgotten to be told of."""
    agent = Agent("one")
    agent.task("value")(_value)
    outbox = Outbox()
    bench = Workbench(agent.handlers, outbox, lambda: None, None, None, 10.0)  # type: ignore[arg-type]  # not asked for
    assignment = Assignment(
        task_id="task_1", type="value", attempt=1, fence="1.1", lease_token="token", payload=msgspec.Raw(b"1")
    )
    bench.accept([assignment])
    bench.stop(["task_1"], reason, grace=0.0)
    async with asyncio.timeout(5):
        await bench.emptied()
    assert bench.works == {}
    assert [done.outcome for done in outbox.take().done] == ([told] if told else [])


class _NoClients:
    """For handlers that use none."""

    def sync(self) -> None:
        """There is none."""

    def asynchronous(self) -> None:
        """There is none."""


def _bench(agent: Agent, outbox: Outbox) -> Workbench:
    return Workbench(agent.handlers, outbox, lambda: None, _NoClients(), None, 10.0)  # type: ignore[arg-type]  # not asked for


async def _ended(agent: Agent, answers: dict[str, Answered] | None = None, attempt: int = 1) -> Done:
    outbox = Outbox()
    bench = _bench(agent, outbox)
    bench.accept(
        [
            Assignment(
                task_id="task_1",
                type="ask",
                attempt=attempt,
                fence="1.1",
                lease_token="token",
                payload=msgspec.Raw(b"40"),
                answers=answers or {},
            )
        ]
    )
    async with asyncio.timeout(5):
        await bench.emptied()
    (done,) = outbox.take().done
    return done


def _asking(how: str) -> Agent:
    """Return an agent whose handler asks, and passes over every error on the way."""
    agent = Agent("one")
    asked: dict[str, Any] = {"key": "delete", "options": ["yes", "no"], "timeout": 60, "default": "no"}

    if how == "thread":

        def delete(payload: int, ctx: SyncContext) -> str:
            try:
                return ctx.ask(f"Delete {payload} rows?", **asked).option
            except Exception:
                return "passed over"

        agent.task("ask")(delete)
        return agent

    async def delete_async(payload: int, ctx: Context) -> str:
        try:
            if how == "coroutine":
                return (await ctx.ask(f"Delete {payload} rows?", **asked)).option
            async with asyncio.TaskGroup() as group:
                found = group.create_task(ctx.ask(f"Delete {payload} rows?", **asked))
            return found.result().option
        except Exception:
            return "passed over"

    agent.task("ask")(delete_async)
    return agent


@pytest.mark.parametrize("how", ["coroutine", "group", "thread"])
async def test_a_handler_that_asks_ends_its_attempt_and_then_gets_the_answer(how: str) -> None:
    """Where nobody has answered, the attempt ends with the question, past every `except Exception`; else the answer is there at once."""
    done = await _ended(_asking(how))
    assert done.outcome == "asked"
    assert done.ask is not None
    assert (done.ask.key, done.ask.title, done.ask.options, done.ask.timeout_seconds, done.ask.default) == (
        "delete",
        "Delete 40 rows?",
        ["yes", "no"],
        60,
        "no",
    )
    answer = Answered(title="Delete 40 rows?", option="yes", by="user_anna", at=1)
    done = await _ended(_asking(how), {"delete": answer})
    assert (done.outcome, bytes(done.result)) == ("completed", b'"yes"')


_OTHER = Answered(title="Delete 39 rows?", option="yes", by="user_anna", at=1)


@pytest.mark.parametrize(
    ("options", "answers", "code"),
    [
        ({"key": "delete"}, {"delete": _OTHER}, "invalid-question"),
        ({"key": "delete", "options": ["a", "a"]}, {}, "invalid-question"),
        ({"key": "delete", "default": "approve"}, {}, "invalid-question"),
        ({}, {}, "invalid-question"),
        ({"key": "new"}, {f"k{number}": _OTHER for number in range(QUESTIONS_MAX)}, "too-many-questions"),
    ],
)
async def test_a_question_that_makes_no_sense_fails_for_good(
    options: dict[str, Any], answers: dict[str, Answered], code: str
) -> None:
    """Another question under the same key, options that are none, and one question too many say so, and no repetition helps."""
    agent = Agent("one")

    @agent.task("ask")
    async def ask(payload: int, ctx: Context) -> str:
        return (await ctx.ask(f"Delete {payload} rows?", **options)).option

    done = await _ended(agent, answers)
    assert done.failure is not None
    assert (done.outcome, done.failure.error_class, done.failure.code) == ("failed", "permanent", code)


async def test_answers_do_not_use_up_the_retries_of_a_handler() -> None:
    """The attempt after a question is the same one to the handler's own number of retries."""
    agent = Agent("one")

    @agent.task("ask", retries=1)
    async def ask(payload: int) -> None:
        raise RuntimeError

    first = await _ended(agent, {"delete": _OTHER}, attempt=2)
    second = await _ended(agent, {"delete": _OTHER}, attempt=3)
    assert [done.failure and done.failure.error_class for done in (first, second)] == ["temporary", "permanent"]
