"""Large fan-outs on real processes: the memory of the server does not follow the number of items, nor is there a cap on events."""

from pathlib import Path

import psutil
import pytest

from mcp_control.testing.server import ServerProcess
from tests.integration.pipelines import started
from tests.integration.support import API, AgentProcess, admin, enrolment, read_store, say, until, violations

MEGABYTE = 1 << 20
TEXT = """
metadata: {name: wide}
spec:
  params: {numbers: {type: array}}
  stages:
  - {id: a, uses: it.echo, with: {n: "${{ item }}"}, fan_out: {over: params.numbers, width: 64}}
  - {id: b, uses: it.echo, needs: [a], with: {n: "${{ item.n }}"}, fan_out: {over: stages.a.output, width: 64}}
  - {id: c, uses: it.echo, needs: [b], with: {n: "${{ item.n }}"}, fan_out: {over: stages.b.output, width: 64}}
  - {id: d, uses: it.echo, needs: [c], with: {n: "${{ item.n }}"}, fan_out: {over: stages.c.output, mode: adaptive, width: 64}}
"""


async def _wide(folder: Path, items: int, seconds: float) -> tuple[list[int], int]:
    """Run it; returns the memory of the server in bytes, of 20 samples over the run, and the events of the run."""
    server = ServerProcess(folder / "one")
    server.start()
    samples: list[tuple[float, int]] = []
    try:
        async with admin(server) as client:
            process = psutil.Process(server.pid)
            token = await enrolment(client)
            with (
                AgentProcess(folder, "one", server.url, token, slots=32),
                AgentProcess(folder, "two", server.url, token, slots=32),
            ):
                made = await client.post(f"{API}/pipelines", content=TEXT, headers={"Content-Type": "application/yaml"})
                assert made.status_code == 201, made.text
                run_id = await started(client, "wide", {"numbers": list(range(items))}, "wide")

                async def ended() -> bool:
                    answer = await client.get(f"{API}/runs/{run_id}")
                    if answer.status_code == 503:
                        return False  # work goes before looking at it
                    assert answer.status_code == 200, answer.text
                    run = answer.json()
                    samples.append((run["progress"], process.memory_info().rss))
                    return run["state"] == "completed"

                await until(ended, seconds, "the end of the run")
                output = (await client.get(f"{API}/runs/{run_id}/stages/d/output")).json()
                assert output == [{"n": number} for number in range(items)]
                assert await violations(client) == {}
    finally:
        assert server.stop() == 0
    events = sum(stored.fact.run == run_id for stored in (await read_store(folder / "one" / "data")).facts)
    found = [max((size for progress, size in samples if progress <= at / 20), default=0) for at in range(1, 21)]
    say(
        f"{items} items four times: {events} events, MiB by progress: {' '.join(str(size // MEGABYTE) for size in found)}"
    )
    return found, events


@pytest.mark.long_on_cluster
@pytest.mark.usefixtures("backend")
@pytest.mark.timeout(180)
async def test_a_fan_out_of_bounded_width_completes_in_order(tmp_path: Path) -> None:
    """A hundred items through four stages, 64 at a time; the memory is that of the beginning."""
    sizes, events = await _wide(tmp_path, 100, 160)
    assert events > 100 * 4 * 3
    assert sizes[-1] - sizes[4] < 60 * MEGABYTE


@pytest.mark.long
@pytest.mark.usefixtures("backend")
@pytest.mark.timeout(1800)
async def test_ten_thousand_items_take_no_more_memory_than_a_few(tmp_path: Path) -> None:
    """Ten thousand items through four stages are more than 100,000 events of one run, without a cap, in flat memory."""
    sizes, events = await _wide(tmp_path, 10_000, 1700)
    assert events > 100_000
    assert sizes[-1] - sizes[4] < 80 * MEGABYTE
