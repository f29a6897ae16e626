"""Runs that wait for people and signals, and runs that undo what they did, on real servers that are killed meanwhile."""

import asyncio
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest

from mcp_control.pipelines.builder import PipelineBuilder
from mcp_control.pipelines.definition_model import PipelineSpec
from mcp_control.pipelines.input_model import Compensate
from mcp_control.testing.server import ServerProcess, databases_for
from tests.integration.pipelines import completed, run_view, started
from tests.integration.support import (
    API,
    AgentProcess,
    admin,
    agents_online,
    enrolment,
    read_store,
    until,
    violations,
)

JSON = {"Content-Type": "application/json"}


def release() -> PipelineSpec:
    p = PipelineBuilder("release")
    build = p.stage("build", "it.echo", with_={"size": 3})
    ask = p.approval("ask", "Release ${{ stages.build.output.size }} parts?", needs=[build])
    tested = p.wait_for("tested", "report", match="output.body.parts == 3", needs=[ask])
    late = p.approval("late", "Anything else?", needs=[tested], timeout_seconds=0.5, default="approve")
    p.stage("ship", "it.echo", needs=[late], with_={"by": ask.field("by"), "report": tested.field("body", "note")})
    return p.build()


def booking(until_file: Path, journal: Path) -> PipelineSpec:
    p = PipelineBuilder("booking")
    room = p.param("room", "boolean", default=False)
    undo = {"until": str(until_file), "journal": str(journal)}
    before = None
    for name in ("flight", "car"):
        needs = [] if before is None else [before]
        before = p.stage(name, "it.echo", needs=needs, compensate=Compensate(uses="it.hold", with_=undo), timeout=60)
    assert before is not None
    p.stage("room", "it.echo", needs=[before], with_={"free": room}, gate="output.free")
    return p.build()


async def _accepted(client: httpx2.AsyncClient, spec: PipelineSpec) -> None:
    answer = await client.post(f"{API}/pipelines", content=msgspec.json.encode(spec), headers=JSON)
    assert answer.status_code == 201, answer.text


async def _in_state(client: httpx2.AsyncClient, run_id: str, state: str) -> dict[str, Any]:
    async def there() -> dict[str, Any] | None:
        found = await run_view(client, run_id)
        return found if found["state"] == state else None

    found = await until(there, 60, f"{run_id} is {state}")
    assert found is not None
    return found


async def _pending(client: httpx2.AsyncClient, run_id: str) -> dict[str, Any]:
    async def there() -> list[dict[str, Any]]:
        answer = await client.get(f"{API}/approvals", params={"state": "pending", "run": run_id})
        assert answer.status_code == 200, answer.text
        items: list[dict[str, Any]] = answer.json()["items"]
        return items

    return (await until(there, 30, "an approval waits"))[0]


@pytest.mark.timeout(240)
async def test_a_run_waits_for_people_and_signals_over_the_death_of_its_server(backend: str, tmp_path: Path) -> None:
    """kill -9 while an approval waits: nothing is lost, a signal sent before is kept, of many answers one wins, the default is taken."""
    servers = [ServerProcess(tmp_path / "one", node="one")]
    if backend == "cluster":
        servers.append(ServerProcess(tmp_path / "two", node="two", **databases_for(tmp_path / "one" / "data")))
    for server in servers:
        server.start()
    try:
        async with admin(servers[0]) as client:
            await _accepted(client, release())
            token = await enrolment(client)
            with AgentProcess(tmp_path, "worker", servers[-1].url, token, slots=2, lease=3):
                await agents_online(client, ["worker"])
                run_id = await started(client, "release", {}, "one")
                asked = await _pending(client, run_id)
                assert asked["title"] == "Release 3 parts?"
                for body in ({"parts": 4}, {"parts": 3, "note": "well"}):
                    for status in (201, 200):  # the second time it is the same signal
                        sent = await client.post(
                            f"{API}/runs/{run_id}/signals/report",
                            json={"body": body},
                            headers={"Idempotency-Key": f"report-{body['parts']}"},
                        )
                        assert sent.status_code == status, sent.text
                for server in servers:
                    await asyncio.to_thread(server.kill)
                    await asyncio.to_thread(server.start)
            async with admin(servers[0]) as first, admin(servers[-1]) as last:
                assert (await _in_state(first, run_id, "input_required"))["stages"][1]["waits_for"][
                    "approval"
                ] == asked["id"]
                path = f"{API}/approvals/{asked['id']}/answer"
                headers = {"If-Match": f'"{asked["etag"]}"'}
                assert (await first.post(path, json={"option": "approve"})).status_code == 428
                answers = await asyncio.gather(
                    *(door.post(path, json={"option": "approve"}, headers=headers) for door in (first, last) * 4)
                )
                assert sorted({answer.status_code for answer in answers} - {409, 412}) == [200]
                assert [answer.status_code for answer in answers].count(200) == 1
                with AgentProcess(tmp_path, "worker", servers[-1].url, token, slots=2, lease=3):
                    await completed(first, run_id, 60)
                output = (await first.get(f"{API}/runs/{run_id}/stages/ship/output")).json()
                assert output["report"] == "well"
                assert output["by"].startswith("user_")
                signals = (await first.get(f"{API}/runs/{run_id}/signals")).json()["items"]
                assert [one.get("stage") for one in signals] == [None, "tested"]
                assert await violations(first) == {}
    finally:
        for server in servers:
            assert server.stop() == 0
    facts = [one.fact for one in (await read_store(tmp_path / "one" / "data")).facts]
    told = [fact.type for fact in facts if fact.run == run_id and fact.type.startswith("approval.")]
    assert sorted(told) == ["approval.answered", "approval.expired", "approval.requested", "approval.requested"]


@pytest.mark.usefixtures("backend")
@pytest.mark.long_on_cluster
@pytest.mark.timeout(240)
async def test_a_failed_run_undoes_what_it_did_over_the_death_of_its_server(tmp_path: Path) -> None:
    """kill -9 while a compensation runs: each is done, the last first, the run ends after them; a retry with another value completes."""
    go, journal = tmp_path / "go", tmp_path / "journal"
    journal.touch()
    with ServerProcess(tmp_path / "server") as server:
        async with admin(server) as client:
            await _accepted(client, booking(go, journal))
            token = await enrolment(client)
            with AgentProcess(tmp_path, "worker", server.url, token, slots=2, lease=3):
                await agents_online(client, ["worker"])
                run_id = await started(client, "booking", {}, "one")
                await until(lambda: len(journal.read_text().splitlines()) == 1, 30, "the first compensation runs")
                view = await run_view(client, run_id)
                assert [(one["stage"], one["state"]) for one in view["compensations"]] == [
                    ("car", "running"),
                    ("flight", "pending"),
                ]
                assert view["state"] == "running"
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)
                go.touch()
            async with admin(server) as again:
                with AgentProcess(tmp_path, "worker", server.url, token, slots=2, lease=3):
                    ended = await _in_state(again, run_id, "failed")
                    assert ended["reason"] == "gate-failed"
                    assert ended["summary"]["compensated"] == ["car", "flight"]
                    body = {"params": {"room": True}, "reason": "there is one now"}
                    answer = await again.post(f"{API}/runs/{run_id}/retry", json=body)
                    assert answer.status_code == 200, answer.text
                    after = await completed(again, run_id, 60)
                assert after["params"] == {"room": True}
                assert [(one["params"], one["reason"]) for one in after["retries"]] == [(["room"], "there is one now")]
                assert after.get("compensations", []) == []
                assert await violations(again) == {}
    found = await read_store(tmp_path / "server" / "data")
    undone = [one for one in found.tasks.values() if one.links.item == -2]
    assert sorted((one.links.stage, one.state.value) for one in undone) == [
        ("car", "completed"),
        ("flight", "completed"),
    ]
    assert len({line.split()[0] for line in journal.read_text().splitlines()}) == 2
