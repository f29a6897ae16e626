"""The agent processes of the benchmarks: `python -m bench.agents noop|techdeck|uneven NAME SLOTS`."""

import asyncio
import sys
import time
from typing import Any

from mcp_control import Agent

noop = Agent("bench")


@noop.task("bench.noop")
async def nothing(payload: Any) -> dict[str, bool]:
    """Do nothing: what remains is the cost of the control plane."""
    return {"ok": True}


@noop.task("bench.step")
async def step(payload: dict[str, Any]) -> dict[str, Any]:
    """One stage of the chain: hand on the payload, counted up."""
    return {"i": payload["i"] + 1, "text": payload["text"]}


@noop.task("bench.clock")
async def clock(payload: Any) -> dict[str, float]:
    """Tell when the handler began, in seconds of this machine's clock."""
    return {"at": time.time()}


@noop.task("bench.short")
async def short(seconds: float) -> dict[str, float]:
    """Take a little time, and tell when it began and ended, in seconds of this machine's clock."""
    begun = time.time()
    await asyncio.sleep(seconds)
    return {"begun": begun, "ended": time.time()}


def uneven(name: str, slots: int) -> Agent:
    """Return an agent that needs 10 ms for a task when it is number 0, and 100 ms when it is not."""
    made = Agent(name, slots=slots)
    seconds = 0.01 if name.endswith("-0") else 0.1

    @made.task("bench.uneven")
    async def wait(payload: Any) -> None:
        await asyncio.sleep(seconds)

    return made


def agent(kind: str, name: str, slots: int) -> Agent:
    """Return an agent with the handlers of this kind."""
    if kind == "uneven":
        return uneven(name, slots)
    if kind == "techdeck":
        from mcp_control.techdeck.agent import agent as source  # its libraries are an extra
    else:
        source = noop
    made = Agent(name, slots=slots)
    for handler in source.handlers.values():
        made.add(handler)
    return made


if __name__ == "__main__":
    agent(sys.argv[1], sys.argv[2], int(sys.argv[3])).run()
