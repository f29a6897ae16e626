"""Large definitions (D): how long until one is accepted and a run of it has begun, and how long others wait meanwhile."""

import asyncio
import time
from typing import Final

import httpx2

from bench.http import connections
from bench.loads import DURABLE
from bench.stand import Stand, stand
from bench.statistics import Line, median, rounded

_ROWS: Final = 50
_YAML: Final = {"Content-Type": "application/yaml"}


def _text(name: str, stages: int) -> str:
    width = max(1, stages // _ROWS)
    lines = [f"metadata: {{name: {name}}}\nspec:\n  stages:"]
    for number in range(stages):
        before = number - width
        given = f", needs: [s{before}], with: {{b: '${{{{ stages.s{before}.output }}}}'}}" if before >= 0 else ""
        lines.append(f"  - {{id: s{number}, uses: bench.none{given}}}")
    return "\n".join(lines)


async def definitions(reps: int) -> list[Line]:
    """D: definitions in YAML of 1,000 and 10,000 stages, fifty in a row; a small request is sent again and again beside them."""
    found: list[Line] = []
    async with stand() as there:
        for stages in (1000, 10_000):
            figures = [await _once(there, f"d{stages}-{rep}", stages) for rep in range(reps + 1)][1:]
            accept, start, held = (median(each) for each in zip(*figures, strict=True))
            found.append(
                {
                    "bench": "D",
                    "mode": f"{stages} stages",
                    "accept_ms": rounded(accept),
                    "start_ms": rounded(start),
                    "held_ms": rounded(held),
                    "durable": DURABLE,
                }
            )
    return found


async def _once(there: Stand, name: str, stages: int) -> tuple[float, float, float]:
    """Return milliseconds until a definition was accepted, until its run had begun, and the longest wait of another request."""
    headers = {"Authorization": f"Bearer {there.token}"}
    async with (
        httpx2.AsyncClient(base_url=f"{there.url}/api/v1", headers=headers, timeout=60) as client,
        connections(there.url, there.token, 1) as (beside,),
    ):
        waits: list[float] = []

        async def ask() -> None:
            while True:
                began = time.perf_counter()
                await beside.json("GET", "/tasks?limit=1")
                waits.append(time.perf_counter() - began)
                await asyncio.sleep(0.001)

        asking = asyncio.create_task(ask())
        try:
            began = time.perf_counter()
            (await client.post("/pipelines", content=_text(name, stages), headers=_YAML)).raise_for_status()
            accepted = time.perf_counter()
            (await client.post(f"/pipelines/{name}/execute", json={})).raise_for_status()
            begun = time.perf_counter()
        finally:
            asking.cancel()
        return (accepted - began) * 1000, (begun - accepted) * 1000, max(waits) * 1000
