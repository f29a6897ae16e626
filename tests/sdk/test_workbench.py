"""The attempts in hand, without a server."""

import asyncio
from typing import Any

import msgspec
import pytest

from mcp_control import Agent
from mcp_control.sdk.runtime.outbox import Outbox
from mcp_control.sdk.runtime.work import StopReason
from mcp_control.sdk.runtime.workbench import Workbench
from mcp_control.tasks.wire import Assignment


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
