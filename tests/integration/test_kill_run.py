"""kill -9 of the server in the middle of a run: after the restart the run ends as if nothing had happened."""

import asyncio
import random
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest

from mcp_control.techdeck.synthetic import generate
from mcp_control.testing.server import ServerProcess
from tests.integration.pipelines import checksums, completed, outputs, parts_pipeline, run_view, started
from tests.integration.support import (
    API,
    AgentProcess,
    admin,
    agents_online,
    enrolment,
    read_store,
    say,
    started_agents,
    until,
    violations,
)

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.long_on_cluster]

LONG = [pytest.mark.long, pytest.mark.timeout(3600)]


async def _done(client: httpx2.AsyncClient, run_id: str, share: float) -> float:
    """Wait until this share of a run is done; returns the share that was seen."""

    async def there() -> float:
        found = await run_view(client, run_id)
        return float(found["progress"]) if found["progress"] >= share else 0.0

    return await until(there, 90, f"{share:.0%} of {run_id}")


async def _undisturbed_and_killed(
    server: ServerProcess, pipeline: str, params: dict[str, Any], moments: list[float], seconds: float
) -> None:
    """Run once in peace, then once with a kill -9 at each of these shares of the work, and compare."""
    async with admin(server) as client:
        quiet = await started(client, pipeline, params, "quiet")
        before = await completed(client, quiet, seconds)
        expected = await checksums(client, quiet)
        assert expected
        for number, moment in enumerate(moments):
            run_id = await started(client, pipeline, params, f"disturbed-{number}")
            at = await _done(client, run_id, moment)
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
            view = await completed(client, run_id, seconds)
            assert await checksums(client, run_id) == expected, f"killed at {at}"
            same = ("name", "state", "total", "done", "failed", "counts", "rows_in", "rows_out", "rejected")
            for stage, quiet_stage in zip(view["stages"], before["stages"], strict=True):
                assert {name: stage.get(name) for name in same} == {name: quiet_stage.get(name) for name in same}
            say(f"{pipeline}: killed at {at:.0%}, the same {len(expected)} files")
        assert await violations(client) == {}


async def _checked(folder: Path) -> None:
    """Every task ended once, whatever happened; only a handler that spoke with the server when it died had to try again."""
    found = await read_store(folder / "server" / "data")
    for one in found.tasks.values():
        assert one.state == "completed", (one.id, one.state, one.message)
        assert [attempt.outcome for attempt in one.attempts].count("completed") == 1
        assert one.failures <= 1, one.attempts
    ended = [stored.fact.subject for stored in found.facts if stored.fact.type == "task.completed"]
    assert sorted(ended) == sorted(found.tasks)
    runs = [stored.fact.subject for stored in found.facts if stored.fact.type == "run.completed"]
    assert len(runs) == len(set(runs))


@pytest.mark.parametrize("count", [4, pytest.param(20, marks=LONG)])
async def test_a_run_survives_kill_9_of_the_server(count: int, tmp_path: Path) -> None:
    """A fan-out with artifacts: the same outputs and the same counts as undisturbed, whenever the server is killed."""
    chances = random.Random(5)
    server = ServerProcess(tmp_path / "server", leases__drift_seconds=1.0).start()
    agents: list[AgentProcess] = []
    try:
        async with admin(server) as client:
            token = await enrolment(client)
            agents = started_agents(tmp_path, server.url, token, ["one", "two"], slots=1, lease=20)
            await agents_online(client, ["one", "two"])
            definition = msgspec.json.encode(parts_pipeline())
            made = await client.post(
                f"{API}/pipelines", content=definition, headers={"Content-Type": "application/json"}
            )
            assert made.status_code == 201, made.text
        # The three stages are a third each; nearly all the time goes to the second.
        moments = [chances.uniform(0.01, 0.65) for _ in range(count)]
        await _undisturbed_and_killed(server, "parts", {"seed": "a", "parts": 300}, moments, 60)
        async with admin(server) as client:
            runs = (await client.get(f"{API}/runs?limit=100")).json()["items"]
            named = [await outputs(client, run["id"]) for run in runs]
            assert len(named) == count + 1
            assert all(one == named[0] for one in named)
    finally:
        for agent in agents:
            agent.kill()
        assert server.stop() == 0
    await _checked(tmp_path)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("count", [4, pytest.param(20, marks=LONG)])
async def test_a_techdeck_run_survives_kill_9_of_the_server(count: int, tmp_path: Path) -> None:
    """All six stages over data with planted faults: the exported files have the checksums of an undisturbed run."""
    chances = random.Random(9)
    source = tmp_path / "data.jsonl"
    generate(source, seed=3, n=400)
    server = ServerProcess(tmp_path / "server", leases__drift_seconds=1.0).start()
    agents: list[AgentProcess] = []
    try:
        async with admin(server) as client:
            token = await enrolment(client)
            agents = started_agents(tmp_path, server.url, token, ["deck-1", "deck-2"], kind="deck", slots=1, lease=20)
            await agents_online(client, ["deck-1", "deck-2"])
            definition = files("mcp_control.techdeck").joinpath("pipeline.yaml").read_bytes()
            made = await client.post(
                f"{API}/pipelines", content=definition, headers={"Content-Type": "application/yaml"}
            )
            assert made.status_code in (200, 201), made.text
            uploaded = await client.post(
                f"{API}/artifacts?name=data.jsonl&role=input",
                content=source.read_bytes(),
                headers={"Content-Type": "application/octet-stream"},
            )
            assert uploaded.status_code == 201, uploaded.text
        params = {"input": uploaded.json()["id"], "quality": {"gate": "warn"}}
        moments = [chances.uniform(0.01, 0.95) for _ in range(count)]
        await _undisturbed_and_killed(server, "techdeck", params, moments, 90)
    finally:
        for agent in agents:
            agent.kill()
        assert server.stop() == 0
    await _checked(tmp_path)
