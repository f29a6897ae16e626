"""Agents for these tests, one process each: `python -m tests.integration.agents NAME [option=value ...]`.

Options: slots, limit (TYPE:N), lease, drain, transport, and `kind=deck` for the agent that does techdeck's tasks.
"""

import asyncio
import hashlib
import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict

import httpx2

from mcp_control import Agent, Cancelled, Context, SyncContext


class Hold(TypedDict):
    """Work that lasts until a file is there; who worked on it is written down."""

    until: str
    journal: str


class Part(TypedDict):
    """One part of a made-up data set."""

    seed: str
    part: int
    rows: int


def _note(path: str, ctx: Any) -> None:
    with Path(path).open("a") as file:
        file.write(f"{ctx.task_id} {ctx.attempt} {os.getpid()}\n")


async def echo(payload: Any) -> Any:
    """Give back what came."""
    return payload


async def hold(payload: Hold, ctx: Context) -> str:
    """Work until a file is there. Looks for the file and not for cancellation: a handler that does not listen."""
    _note(payload["journal"], ctx)
    for _ in range(6000):
        if _there(payload["until"]):
            break
        await asyncio.sleep(0.02)
    return f"{ctx.attempt}"


async def block(payload: Hold, ctx: Context) -> str:
    """Stop the whole event loop until a file is there: what a handler must not do."""
    _note(payload["journal"], ctx)
    while not _there(payload["until"]):
        time.sleep(0.02)  # noqa: ASYNC251 - blocking is what this is for
    return f"{ctx.attempt}"


def _there(path: str) -> bool:
    return os.path.exists(path)


class Burn(TypedDict):
    """Steps that cost something: how much each, and how many; who took a step writes it down."""

    tokens: int
    steps: int
    journal: str


async def burn(payload: Burn, ctx: Context) -> int:
    """Use tokens, step by step, and go on until told to stop: an agent in a loop. Each step waits until it may take the next one."""
    for _ in range(payload["steps"]):
        ctx.use(tokens=payload["tokens"], calls=1, money="0.002")
        _note(payload["journal"], ctx)
        await ctx.reserve()  # answered when what was used is counted
    return payload["steps"]


def deaf(payload: Burn, ctx: SyncContext) -> int:
    """Use tokens in a thread that does not listen."""
    for _ in range(payload["steps"]):
        with suppress(Cancelled):
            ctx.use(tokens=payload["tokens"])
        time.sleep(0.05)  # the work of a step, in a thread
    return payload["steps"]


async def careful(payload: Burn, ctx: Context) -> int:
    """Reserve before each step and end in good order when there is no more."""
    for step in range(payload["steps"]):
        held = await ctx.reserve(tokens=payload["tokens"])
        if not held:
            return step
        held.use(tokens=payload["tokens"])
    return payload["steps"]


async def spawn(payload: dict[str, Any], ctx: Context) -> dict[str, Any]:
    """Have parts of the work done as tasks of their own."""
    ids = [(await ctx.submit("it.echo", part, key=f"part-{part}")).id for part in range(payload["children"])]
    return {"ids": ids, "again": (await ctx.submit("it.echo", 0, key="part-0")).id}


def spawn_sync(payload: dict[str, Any], ctx: SyncContext) -> dict[str, Any]:
    """Have parts of the work done as tasks of their own."""
    ids = [ctx.submit("it.echo", part, key=f"part-{part}").id for part in range(payload["children"])]
    return {"ids": ids, "again": ctx.submit("it.echo", 0, key="part-0").id}


async def ask(payload: dict[str, Any], ctx: Context) -> dict[str, Any]:
    """Ask a person before the work is done."""
    _note(payload["journal"], ctx)
    answer = await ctx.ask("Delete 40 rows?", key="delete", options=["yes", "no"], message="of the old ones")
    return {"option": answer.option, "by": answer.by}


def ask_sync(payload: dict[str, Any], ctx: SyncContext) -> dict[str, Any]:
    """Ask a person before the work is done, in a thread."""
    _note(payload["journal"], ctx)
    answer = ctx.ask("Delete 40 rows?", key="delete", options=["yes", "no"], message="of the old ones")
    return {"option": answer.option, "by": answer.by}


async def call(payload: dict[str, Any], ctx: Context) -> int:
    """Ask a peer over HTTP, unless it is left alone."""
    async with ctx.breaker("shop", failures=2, open_for=payload["open_for"]), httpx2.AsyncClient() as peer:
        return (await peer.get(payload["url"])).raise_for_status().status_code


async def chat(payload: int, ctx: Context) -> None:
    """Log so many lines."""
    for number in range(payload):
        ctx.log.info("a line", number=number)


def busy(seconds: float) -> float:
    """Occupy a thread for a while."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        time.sleep(min(0.01, seconds))
    return seconds


def split(payload: dict[str, Any]) -> dict[str, Any]:
    """Say which parts there are."""
    return {
        "parts": [{**payload, "part": number} for number in range(payload["parts"])],
        "counts": {"rows_out": payload["parts"]},
    }


def make(payload: dict[str, Any], ctx: SyncContext) -> dict[str, Any]:
    """Make the bytes of a part, which its input alone decides."""
    block = hashlib.sha256(f"{payload['seed']}/{payload['part']}".encode()).digest()
    chunks = (block * 64 for _ in range(payload["blocks"]))
    view = ctx.artifacts.upload(chunks, f"part-{payload['part']}.bin", role="intermediate")
    return {"artifact": view.id, "sha256": view.sha256, "counts": {"rows_out": payload["blocks"]}}


def join(payload: dict[str, Any], ctx: SyncContext) -> dict[str, Any]:
    """Put the parts together."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        for item in ctx.track(payload["items"]):
            digest.update(ctx.artifacts.local(item["artifact"], Path(folder)).read_bytes())
    view = ctx.artifacts.upload(digest.hexdigest().encode(), "joined.txt", role="output")
    return {"artifact": view.id, "sha256": view.sha256, "parts": len(payload["items"])}


def final(payload: dict[str, Any], ctx: SyncContext) -> dict[str, Any]:
    """Write the last file from the joined one."""
    view = ctx.artifacts.upload(ctx.artifacts.read(payload["joined"])[::-1], "final.txt", role="output")
    return {"artifact": view.id, "sha256": view.sha256}


def build(name: str, options: dict[str, str]) -> Agent:
    """Return the agent that the command line asks for."""
    agent = Agent(
        name,
        slots=int(options.get("slots", "4")),
        limits={task_type: int(limit) for task_type, _, limit in [options.get("limit", "").partition(":")] if limit},
        lease_seconds=float(options.get("lease", "30")),
        drain_seconds=float(options.get("drain", "5")),
        transport=options.get("transport", "auto"),  # type: ignore[arg-type]  # checked by the agent
        cancel_grace=1.0,
    )
    if options.get("kind") == "deck":
        from mcp_control.techdeck.agent import agent as techdeck

        for handler in techdeck.handlers.values():
            agent.add(handler)
        return agent
    for handler_name, function in (
        ("it.echo", echo),
        ("it.hold", hold),
        ("it.block", block),
        ("it.busy", busy),
        ("it.burn", burn),
        ("it.deaf", deaf),
        ("it.careful", careful),
        ("it.chat", chat),
        ("it.spawn", spawn),
        ("it.spawn_sync", spawn_sync),
        ("it.ask", ask),
        ("it.ask_sync", ask_sync),
        ("it.call", call),
        ("it.split", split),
        ("it.make", make),
        ("it.join", join),
        ("it.final", final),
    ):
        agent.task(handler_name)(function)
    return agent


if __name__ == "__main__":
    build(sys.argv[1], dict(pair.split("=", 1) for pair in sys.argv[2:])).run()
