"""An agent that answers, fails and takes its time."""

import time
from typing import Any

from mcp_control import Agent, Permanent, SyncContext

agent = Agent("tests", slots=4)


@agent.task("tests.echo")
def echo(payload: Any, ctx: SyncContext) -> Any:
    """Give the payload back."""
    ctx.log.info("echoing", size=len(str(payload)))
    return payload


@agent.task("tests.refuse")
def refuse(payload: Any) -> None:
    """Fail for good."""
    raise Permanent("this never works", code="E_NEVER")


@agent.task("tests.wait")
def wait(payload: float, ctx: SyncContext) -> str:
    """Take that many seconds."""
    ends_at = time.monotonic() + payload
    while time.monotonic() < ends_at:
        ctx.check()
        time.sleep(0.05)
    return "waited"
