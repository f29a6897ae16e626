"""An agent with a handler of each kind: a coroutine, a function in a thread, a function in a process of its own.

Run it with `mcpctl agents start greeter:agent`.
"""

import asyncio
import hashlib
import tempfile
from pathlib import Path

import msgspec

from mcp_control import Agent, Context, Permanent, SyncContext

agent = Agent("greeter", slots=4, labels={"example": "yes"}, description="Says hello, counts words, stretches keys.")


class Person(msgspec.Struct):
    """Whom to greet. A payload of another shape fails for good, before the handler is called."""

    name: str
    times: int = 1


class Greeting(msgspec.Struct):
    """What was said."""

    text: str


class Document(msgspec.Struct):
    """A stored file to read."""

    artifact: str


class Secret(msgspec.Struct):
    """What to stretch, and how much."""

    text: str
    rounds: int = 20


@agent.task("greet")
async def greet(payload: Person, ctx: Context) -> Greeting:
    """Greet a person. A coroutine: for work that waits, e.g. for other services. Cancelling the task cancels the coroutine."""
    if not payload.name.strip():
        raise Permanent("there is nobody to greet", code="no-name")
    for number in range(payload.times):
        ctx.progress(number / payload.times, f"greeting {number + 1} of {payload.times}")
        await asyncio.sleep(0.01)
    ctx.log.info("greeted", name=payload.name, attempt=ctx.attempt)
    return Greeting(text=f"Hello, {payload.name}" + "!" * payload.times)


@agent.task("count-words")
def count_words(payload: Document, ctx: SyncContext) -> dict[str, int]:
    """Count the words of a stored file. A plain function runs in a thread: for work that blocks and is light on the processor."""
    with tempfile.TemporaryDirectory() as folder:
        path = ctx.artifacts.local(payload.artifact, Path(folder))
        lines = path.read_text(encoding="utf-8").splitlines()
        words = sum(len(line.split()) for line in ctx.track(lines, message="counting"))
    return {"lines": len(lines), "words": words}


@agent.task("stretch-key", executor="process", timeout=60)
def stretch_key(payload: Secret, ctx: SyncContext) -> dict[str, str]:
    """Stretch a key. In a process of its own: for work that keeps a core busy. `ctx.check` ends it when the task is cancelled."""
    key = payload.text.encode()
    for number in range(payload.rounds):
        ctx.check()
        key = hashlib.pbkdf2_hmac("sha256", key, b"example", 20_000)
        ctx.progress((number + 1) / payload.rounds, f"{number + 1} of {payload.rounds} rounds")
    return {"key": key.hex()}


if __name__ == "__main__":
    agent.run()
