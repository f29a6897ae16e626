"""Where the server's time goes: its process sampled from outside with py-spy while one benchmark runs."""

import asyncio
import contextlib
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

from bench.http import connections
from bench.loads import CONNECTIONS, MODES, STAGES, apply_chain, chain_once, chains_at_once, done_by, latency_once
from bench.stand import Stand, stand

ATTACH_SECONDS: Final = 1.0  # py-spy needs a moment before it samples
_RATE: Final = 400
# Threads that wait in native code are sometimes taken for busy.
_WAITS: Final = ("concurrent/futures/thread.py:_worker",)
_FRAME: Final = re.compile(r"^(?P<name>.+?) \((?P<file>.+?)(?::(?P<line>\d+))?\)$")

# The innermost frame that matches decides. Order matters within a file only.
PARTS: Final = (
    ("SQL", ("storage/sqlite/apply.py", "storage/sqlite/queries.py", "storage/sqlite/factlog.py")),
    ("BSON", ("bson/",)),
    ("MongoDB driver", ("pymongo/",)),
    ("Redis driver", ("redis/asyncio", "redis/_parsers", "redis/client", "redis/connection")),
    ("MongoDB store", ("storage/mongo/",)),
    ("Redis queue, bus, cache", ("storage/redis/",)),
    ("commit (flush and queue of the writer)", ("storage/sqlite/writer.py", "storage/sqlite/store.py")),
    ("events (encode, deliver)", ("events/",)),
    (
        "decide (rules, task values, ledger)",
        ("tasks/transitions.py", "tasks/records.py", "tasks/ledger.py", "tasks/settling.py"),
    ),
    ("submission", ("tasks/submission.py", "tasks/service.py", "tasks/lanes.py")),
    ("dispatch", ("tasks/dispatcher.py", "agents/", "storage/local/queue.py")),
    ("pipelines", ("pipelines/",)),
    (
        "agent protocol",
        ("tasks/reports.py", "tasks/agent_sessions.py", "tasks/wire.py", "api/agent_socket.py", "api/outbox.py"),
    ),
    ("decode and check the body", ("api/decode.py", "kernel/shapes.py")),
    ("authenticate", ("security/", "api/auth.py")),
    ("HTTP", ("api/", "monitoring/", "kernel/")),
    ("HTTP and WebSocket protocol", ("uvicorn/", "websockets/", "httptools", "h11/")),
)


def part_of(stack: list[str]) -> str:
    """Return the part of the server that a stack (outermost frame first) belongs to."""
    for frame in reversed(stack):
        for part, places in PARTS:
            if any(place in frame for place in places):
                return part
    return "event loop and the rest"


@contextlib.contextmanager
def sampled(pid: int) -> Iterator[list[tuple[list[str], int]]]:
    """Sample a process during the block; the list is filled at its end: stacks, outermost frame first, and how often each was seen.

    Raises:
        FileNotFoundError: py-spy is not installed (it is among the development requirements).
    """
    found: list[tuple[list[str], int]] = []
    spy = Path(sys.executable).with_name("py-spy")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "stacks"
        command = [
            str(spy),
            "record",
            "-p",
            str(pid),
            "-r",
            str(_RATE),
            "-f",
            "raw",
            "-t",
            "-o",
            str(target),
            "-d",
            "600",
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield found
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
        for line in target.read_text().splitlines():
            stack, _, count = line.rpartition(" ")
            frames = stack.split(";")
            if _plain(frames[-1]) not in _WAITS:
                found.append((frames, int(count)))


def summary(stacks: list[tuple[list[str], int]], tasks: int, top: int = 40) -> str:
    """Return a text: share of time by thread, by part, and the functions where most time is spent themselves and in all."""
    total = sum(count for _, count in stacks) or 1
    threads: Counter[str] = Counter()
    parts: Counter[tuple[str, str]] = Counter()
    own: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    for stack, count in stacks:
        thread = next(
            (re.sub(r"thread \(0x[0-9A-Fa-f]+\)|thread \d+", "thread", f) for f in stack if f.startswith("thread")), ""
        )
        frames = [_plain(frame) for frame in stack if not frame.startswith("thread")]
        threads[thread] += count
        parts[(thread, part_of(frames))] += count
        if frames:
            own[frames[-1]] += count
        for frame in set(frames):
            whole[frame] += count
    to_us = 1e6 / _RATE / max(1, tasks)
    lines = [f"{total} samples, {total / _RATE:.1f} busy seconds, {total * to_us:.0f} us per task"]
    for title, counter in (("thread", threads), ("own time", own), ("with callees", whole)):
        lines.append(f"-- {title}")
        lines += [f"{count * to_us:8.1f} us {count / total:6.1%}  {name}" for name, count in counter.most_common(top)]
    lines.append("-- part")
    lines += [f"{count * to_us:8.1f} us {count / total:6.1%}  {t}: {name}" for (t, name), count in parts.most_common()]
    return "\n".join(lines)


def _plain(frame: str) -> str:
    match = _FRAME.match(frame)
    if match is None:
        return frame
    file = match["file"]
    for mark in ("mcp_control/", "site-packages/"):
        if mark in file:
            file = file.partition(mark)[2]
    return f"{file}:{match['name']}"


async def _tasks(there: Stand, mode: str, count: int) -> None:
    await done_by(there, MODES[mode][0], count)


async def _one_by_one(there: Stand, count: int) -> None:
    for number in range(count):
        await latency_once(there, number)


async def _chains(there: Stand, count: int) -> None:
    await apply_chain(there)
    async with connections(there.url, there.token, CONNECTIONS) as opened:
        await chains_at_once(opened, count // STAGES)


async def _chains_idle(there: Stand, count: int) -> None:
    await apply_chain(there)
    for _ in range(count // STAGES):
        await chain_once(there)


_Work = Callable[[Stand, int], Awaitable[None]]
_WORK: Final[dict[str, tuple[tuple[str, int, _Work], ...]]] = {
    "T": (
        ("batched", 40_000, lambda there, count: _tasks(there, "batched", count)),
        ("single", 15_000, lambda there, count: _tasks(there, "single", count)),
        ("sdk", 20_000, lambda there, count: _tasks(there, "sdk", count)),
    ),
    "L": (("one at a time", 1500, _one_by_one),),
    "C": (("200 at once", 6000, _chains), ("one at a time", 1800, _chains_idle)),
}


async def profiled(bench: str) -> str:
    """Run one benchmark for a few seconds and return where the server's time went; empty where there is no profile (D, H, P)."""
    found: list[str] = []
    for title, tasks, work in _WORK.get(bench, ()):
        async with stand("noop") as there:
            await work(there, tasks // 20)  # warm
            with there.metered() as usage, sampled(there.server) as stacks:
                await asyncio.sleep(ATTACH_SECONDS)
                await work(there, tasks)
            figures = ", ".join(f"{name} {value}" for name, value in usage.per_task(tasks).items())
            found.append(f"== {bench} {title}: {tasks} tasks, {figures}\n{summary(stacks, tasks)}\n")
    return "\n".join(found)
