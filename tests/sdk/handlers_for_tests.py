"""Handlers for worker processes, which import them by name."""

import os
import time
from typing import Any

from mcp_control.sdk.agent import Agent
from mcp_control.sdk.context import SyncContext
from mcp_control.sdk.errors import Permanent

template = Agent("template")


@template.task("proc.double", executor="process")
def double(payload: dict[str, Any]) -> dict[str, Any]:
    """Double a number."""
    return {"n": payload["n"] * 2, "pid": os.getpid()}


@template.task("proc.talk", executor="process")
def talk(payload: dict[str, Any], ctx: SyncContext) -> str:
    """Report progress and log."""
    ctx.log.info("counting", upto=payload["n"])
    for _ in ctx.track(range(payload["n"])):
        pass
    return ctx.fence


@template.task("proc.stubborn", executor="process")
def stubborn(payload: dict[str, Any], ctx: SyncContext) -> None:
    """Never look at the flag."""
    ctx.progress(0.1, "deaf")
    while True:
        time.sleep(0.01)


@template.task("proc.polite", executor="process")
def polite(payload: dict[str, Any], ctx: SyncContext) -> None:
    """Wait for the flag."""
    ctx.progress(0.1, "waiting")
    ctx.cancelled.wait()
    ctx.check()


@template.task("proc.die", executor="process")
def die(payload: dict[str, Any]) -> None:
    """Die as a crashing library would."""
    os._exit(7)


@template.task("proc.refuse", executor="process")
def refuse(payload: dict[str, Any]) -> None:
    """Fail for good."""
    raise Permanent("no such thing", code="no-such-thing")


@template.task("proc.call", executor="process")
def call(payload: dict[str, Any], ctx: SyncContext) -> str:
    """Call a peer that does not answer."""
    with ctx.breaker("peer", failures=1, open_for=60.0):
        raise ConnectionError("refused")


@template.task("proc.ask", executor="process")
def ask(payload: dict[str, Any], ctx: SyncContext) -> str:
    """Ask a person."""
    try:
        return ctx.ask("Go on?", key="go").option
    except Exception:
        return "passed over"
