"""Events to many followers: clients in processes of their own, over two servers."""

import asyncio
import json
import sys
import time
from asyncio.subprocess import PIPE, Process
from typing import Final

from bench.cluster_stand import Cluster, Databases, cluster
from bench.http import connections
from bench.loads import payload
from bench.stand import Stand, cpu_seconds
from bench.statistics import Line, percentile, rounded

_TYPE: Final = "bench.parked"
_SETTLE: Final = 2.0
_DRAIN: Final = 3.0  # for the last events to arrive


async def _follower(stand: Stand, count: int) -> Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.followers", stand.url, str(count), stdin=PIPE, stdout=PIPE, limit=1 << 26
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{stand.token}\n".encode())
    if await process.stdout.readline() != b"ready\n":
        raise RuntimeError("the followers did not get their subscriptions")
    return process


async def _paced(there: Cluster, rate: int, seconds: float) -> int:
    """Submit tasks for which there is no agent at an even pace, on all servers in turn; each is one event."""
    count = round(rate * seconds)
    began = time.perf_counter()
    numbers = iter(range(count))

    async def work(stand: Stand) -> None:
        async with connections(stand.url, stand.token, 16) as opened:

            async def one(place: int) -> None:
                for number in numbers:
                    await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
                    await opened[place].json("POST", "/tasks", {"type": _TYPE, "payload": payload(number)})

            await asyncio.gather(*map(one, range(len(opened))))

    await asyncio.gather(*map(work, there.stands))
    return count


async def fanout(there: Databases, clients: int, rate: int, seconds: float) -> list[Line]:
    """E: from the moment of an event to its arrival, its commit included; fails where an event is missing or comes twice."""
    async with cluster(there, 2) as made:
        followers = [await _follower(stand, clients // 2) for stand in made.stands]
        try:
            await _paced(made, rate, _SETTLE)
            pids = [follower.pid for follower in followers]
            before = cpu_seconds(pids)
            with made.metered() as effort:
                count = await _paced(made, rate, seconds) + round(rate * _SETTLE)
                await asyncio.sleep(_DRAIN)
            effort.cpu["followers"] = cpu_seconds(pids) - before
            found = [json.loads((await follower.communicate(b"stop\n"))[0]) for follower in followers]
        finally:
            for follower in followers:
                if follower.returncode is None:
                    follower.kill()
    wrong = [got for each in found for got in each["events"] if got != count]
    if wrong or any(each["lost"] or each["reread"] for each in found):
        raise AssertionError(
            f"{len(wrong)} of {clients} followers got another number of events than {count}: {wrong[:5]}"
        )
    late = [each for one in found for each in one["late_ms"]]
    return [
        {
            "bench": "E",
            "clients": clients,
            "events_per_s": rate,
            "delivered": count * clients,
            "p50_ms": rounded(percentile(late, 50)),
            "p99_ms": rounded(percentile(late, 99)),
            "max_ms": rounded(max(late)),
            "cpu_us": effort.per_task(round(rate * seconds)),
        }
    ]
