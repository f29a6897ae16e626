"""Flow of pipelines on real processes: conditions, bounded and lenient fan-outs, runs inside runs, deadlines, cleaning up."""

import asyncio
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from mcp_control.testing.server import ServerProcess, databases_for
from tests.integration.pipelines import completed, run_view, started
from tests.integration.support import API, AgentProcess, admin, enrolment, until, violations

YAML = {"Content-Type": "application/yaml"}
INNER = """
metadata: {name: flow-inner}
spec:
  params: {until: {type: string}, journal: {type: string}}
  stages:
  - {id: hold, uses: it.hold, with: {until: "${{ params.until }}", journal: "${{ params.journal }}"}}
  outputs: {attempt: "${{ stages.hold.output }}"}
"""
OUTER = """
metadata: {name: flow-outer}
spec:
  params: {until: {type: string}, journal: {type: string}}
  mode: adaptive
  stages:
  - {id: first, uses: it.echo, with: {numbers: [1, 2, nothing, 4, 5]}}
  - {id: rare, uses: it.echo, needs: [first], when: size(stages.first.output.numbers) > 9}
  - id: each
    uses: it.split
    needs: [first]
    with: {parts: "${{ item }}"}
    retry: {max_attempts: 1}
    fan_out: {over: stages.first.output.numbers, width: 2, at_least: "80%"}
  - id: inner
    uses: pipeline:flow-inner
    needs: [each]
    with: {until: "${{ params.until }}", journal: "${{ params.journal }}"}
  - {id: either, uses: it.echo, needs: [rare, inner], run_when: any_completed, with: {got: "${{ stages.inner.output }}"}}
  - {id: clean, uses: it.echo, needs: [either], run_when: always}
"""
LATE = """
metadata: {name: flow-late}
spec:
  params: {until: {type: string}, journal: {type: string}}
  stages:
  - id: slow
    uses: it.hold
    deadline_seconds: 1
    with: {until: "${{ params.until }}", journal: "${{ params.journal }}"}
  - {id: clean, uses: it.echo, needs: [slow], run_when: always, with: {state: "${{ stages.slow.state }}"}}
"""

CACHED = """
metadata: {name: flow-cached}
spec:
  params: {n: {type: integer}}
  stages:
  - {id: one, uses: it.split, with: {parts: "${{ params.n }}"}, cache: {seconds: 3600}}
  - id: each
    uses: it.split
    needs: [one]
    with: {parts: "${{ item.part }}"}
    fan_out: {over: stages.one.output.parts, combine: {uses: it.echo}}
    cache: {seconds: 3600}
"""


async def _applied(client: httpx2.AsyncClient, *texts: str) -> None:
    for text in texts:
        made = await client.post(f"{API}/pipelines", content=text, headers=YAML)
        assert made.status_code == 201, made.text


def _stages(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {stage["name"]: stage for stage in run["stages"]}


@pytest.mark.timeout(180)
async def test_a_run_flows_as_its_definition_says_though_its_server_dies(backend: str, tmp_path: Path) -> None:
    """Skips, nulls, a run inside the run, and an end after a kill; a stage that is late fails and is cleaned up after."""
    servers = [ServerProcess(tmp_path / "one", node="one")]
    if backend == "cluster":
        servers.append(ServerProcess(tmp_path / "two", node="two", **databases_for(tmp_path / "one" / "data")))
    for server in servers:
        server.start()
    go, journal = tmp_path / "go", tmp_path / "journal"
    params = {"until": str(go), "journal": str(journal)}
    try:
        async with admin(servers[0]) as client:
            with AgentProcess(tmp_path, "worker", servers[0].url, await enrolment(client), slots=4):
                await _applied(client, INNER, OUTER, LATE)
                run_id = await started(client, "flow-outer", params, "flow")

                async def holding() -> str | None:
                    stage = _stages(await run_view(client, run_id))["inner"]
                    return stage["children"][0] if stage["state"] == "running" and journal.exists() else None

                inner = await until(holding, 30, "the inner run holds")
                assert (await run_view(client, inner or ""))["parent"] == {"run_id": run_id, "stage": "inner"}
                await asyncio.to_thread(servers[0].kill)
                await asyncio.to_thread(servers[0].start)
                async with admin(servers[-1]) as again:
                    go.touch()
                    stages = _stages(await completed(again, run_id, 60))
                    states = {name: stage["state"] for name, stage in stages.items()}
                    assert states == {name: "skipped" if name == "rare" else "completed" for name in states}
                    output = (await again.get(f"{API}/runs/{run_id}/stages/each/output")).json()
                    assert [None if part is None else len(part["parts"]) for part in output] == [1, 2, None, 4, 5]
                    either = (await again.get(f"{API}/runs/{run_id}/stages/either/output")).json()
                    assert either == {"got": {"attempt": (await run_view(again, inner or ""))["output"]["attempt"]}}

                    go.unlink()
                    late_id = await started(again, "flow-late", params, "late")

                    async def ended() -> dict[str, Any] | None:
                        run = await run_view(again, late_id)
                        return run if run["state"] == "failed" else None

                    late = await until(ended, 60, "the late run fails")
                    go.touch()
                    assert late is not None
                    stages = _stages(late)
                    assert (stages["slow"]["state"], stages["slow"]["reason"]) == ("failed", "deadline-exceeded")
                    assert stages["clean"]["state"] == "completed"
                    cleaned = await again.get(f"{API}/runs/{late_id}/stages/clean/output")
                    assert cleaned.json() == {"state": "failed"}
                    assert await violations(again) == {}
    finally:
        for server in servers:
            assert server.stop() == 0


async def _ran(client: httpx2.AsyncClient, n: int, key: str, *, no_cache: bool = False) -> tuple[dict[str, int], Any]:
    answer = await client.post(
        f"{API}/pipelines/flow-cached/execute",
        json={"params": {"n": n}, "no_cache": no_cache},
        headers={"Idempotency-Key": key},
    )
    run = await completed(client, answer.json()["id"], 60)
    output = await client.get(f"{API}/runs/{run['id']}/stages/each/output")
    return {stage["name"]: stage.get("cached", 0) for stage in run["stages"]}, output.json()


@pytest.mark.timeout(120)
async def test_a_result_is_computed_once_for_the_same_input(backend: str, tmp_path: Path) -> None:
    """A second run takes the results of the first, item by item and combined; one that is told to computes anew; the output is the same."""
    server = ServerProcess(tmp_path / "one", node="one")
    server.start()
    try:
        async with admin(server) as client:
            with AgentProcess(tmp_path, "worker", server.url, await enrolment(client), slots=4):
                await _applied(client, CACHED)
                first, output = await _ran(client, 3, "first")
                assert first == {"one": 0, "each": 0}

                async def taken() -> bool:
                    # Results are kept soon after the run ended; until then they are computed.
                    return (await _ran(client, 3, uuid4().hex))[0] == {"one": 1, "each": 4}

                await until(taken, 30, "all results are taken")
                assert (await _ran(client, 3, "third"))[1] == output
                assert (await _ran(client, 3, "anew", no_cache=True))[0] == {"one": 0, "each": 0}
                more, _ = await _ran(client, 4, "more")
                assert more == {"one": 0, "each": 4}, (
                    "items count that were there before, by whatever stage; their combination is new"
                )
                assert await violations(client) == {}
    finally:
        assert server.stop() == 0
