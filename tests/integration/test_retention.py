"""Retention: what has ended is removed after its time, a little at once, and old cursors say so."""

from pathlib import Path

import httpx2
import msgspec
import pytest

from mcp_control.testing.server import ServerProcess
from tests.integration.pipelines import completed, parts_pipeline, started
from tests.integration.support import (
    API,
    AgentProcess,
    admin,
    agents_online,
    all_final,
    enrolment,
    read_store,
    submit,
    tasks_by_state,
    until,
    violations,
)

pytestmark = pytest.mark.usefixtures("backend")

SECOND_IN_DAYS = 1 / 86_400
JSON = {"Content-Type": "application/json"}


async def _count(client: httpx2.AsyncClient, path: str) -> int:
    answer = await client.get(f"{API}/{path}", params={"limit": 500})
    assert answer.status_code == 200, answer.text
    return len(answer.json()["items"])


@pytest.mark.long_on_cluster
async def test_what_has_ended_is_removed_after_its_time_and_nothing_else(tmp_path: Path) -> None:
    """Finished tasks, runs and old events go; a waiting task and the newest events stay; `410 cursor-expired` for an old cursor."""
    server = ServerProcess(
        tmp_path / "server",
        retention__tasks_days=2 * SECOND_IN_DAYS,
        retention__runs_days=2 * SECOND_IN_DAYS,
        retention__events_days=2 * SECOND_IN_DAYS,
        retention__interval_seconds=0.2,
    ).start()
    agent: AgentProcess | None = None
    try:
        async with admin(server) as client:
            agent = AgentProcess(tmp_path, "worker", server.url, await enrolment(client), slots=20).start()
            await agents_online(client, ["worker"])
            waiting = await submit(client, "it.nobody", "still here")
            made = await client.post(f"{API}/pipelines", content=msgspec.json.encode(parts_pipeline()), headers=JSON)
            assert made.status_code == 201
            run_id = await started(client, "parts", {"seed": "a", "parts": 5}, "one")
            await completed(client, run_id, 20)
            specs = [{"type": "it.echo", "payload": number} for number in range(600)]
            batch = await client.post(f"{API}/tasks/batch", json={"tasks": specs})
            ids = [item["id"] for item in batch.json()["items"]]

            async def gone() -> bool:
                return await tasks_by_state(client) == {"queued": 1}

            await until(gone, 30, "finished tasks are removed")
            assert (await client.get(f"{API}/tasks/{ids[0]}")).status_code == 404
            kept = await client.get(f"{API}/tasks/{waiting}")
            assert kept.json()["payload"] == "still here"

            async def no_runs() -> bool:
                return await _count(client, "runs") == 0

            await until(no_runs, 20, "finished runs are removed")
            assert (await client.get(f"{API}/runs/{run_id}")).status_code == 404

            async def expired() -> httpx2.Response | None:
                answer = await client.get(f"{API}/events", params={"after": "evt_1"})
                return answer if answer.status_code == 410 else None

            refused = await until(expired, 20, "the first events are removed")
            assert refused is not None
            assert refused.json()["code"] == "cursor-expired"
            fresh = await submit(client, "it.echo", "new")
            newest = (await client.get(f"{API}/events", params={"limit": 100})).json()
            assert newest["next"]
            after = await client.get(f"{API}/events", params={"after": newest["next"]})
            assert after.status_code == 200
            assert fresh
            assert await violations(client) == {}
    finally:
        if agent is not None:
            agent.kill()
        assert server.stop() == 0
    found = await read_store(tmp_path / "server" / "data")
    assert waiting in found.tasks
    seqs = [stored.seq for stored in found.facts]
    assert seqs == list(range(seqs[0], seqs[0] + len(seqs))) if seqs else True


async def test_events_beyond_the_number_to_keep_are_removed(tmp_path: Path) -> None:
    """Of many events about so many newest are kept, and the store shrinks to what is kept."""
    with ServerProcess(tmp_path / "server", retention__events_count=500, retention__interval_seconds=0.2) as server:
        async with admin(server) as client:
            agent = AgentProcess(tmp_path, "worker", server.url, await enrolment(client), slots=50).start()
            try:
                await agents_online(client, ["worker"])
                specs = [{"type": "it.echo", "payload": number} for number in range(1000)]
                for _ in range(3):
                    assert (await client.post(f"{API}/tasks/batch", json={"tasks": specs})).status_code == 200
                await all_final(client, 30)

                async def expired() -> bool:
                    return (await client.get(f"{API}/events", params={"after": "evt_100"})).status_code == 410

                await until(expired, 20, "the oldest events are removed")
                newest = (await client.get(f"{API}/status")).json()["store"]["events"]
                kept = await client.get(f"{API}/events", params={"after": f"evt_{newest - 400}", "limit": 500})
                assert kept.status_code == 200
                assert len(kept.json()["items"]) >= 400
            finally:
                agent.kill()


@pytest.mark.long_on_cluster
async def test_payloads_are_removed_after_their_time_and_their_tasks_stay(tmp_path: Path) -> None:
    """Large and small payloads and results of finished tasks go; the tasks say since when, those that wait keep theirs."""
    with ServerProcess(
        tmp_path / "server", retention__payload_days=SECOND_IN_DAYS, retention__interval_seconds=0.2
    ) as server:
        async with admin(server) as client:
            with AgentProcess(tmp_path, "worker", server.url, await enrolment(client), slots=20):
                await agents_online(client, ["worker"])
                waiting = await submit(client, "it.nobody", "still here")
                done = [await submit(client, "it.echo", "x" * size) for size in (10, 100_000)]

                async def emptied() -> bool:
                    shown = [(await client.get(f"{API}/tasks/{one}")).json() for one in done]
                    return all("payload_removed_at" in one for one in shown)

                await until(emptied, 30, "payloads are removed")
                for one in done:
                    shown = (await client.get(f"{API}/tasks/{one}")).json()
                    assert (shown["state"], shown.keys() & {"payload", "result"}) == ("completed", set())
                    assert (await client.post(f"{API}/tasks/{one}/retry")).json()["code"] == "payload-removed"
                assert (await client.get(f"{API}/tasks/{waiting}")).json()["payload"] == "still here"


@pytest.mark.long_on_cluster
async def test_a_log_ends_at_its_cap_and_counts_what_it_dropped(tmp_path: Path) -> None:
    """Of two hundred lines the first are kept, the last one kept says that there were more, and the task tells how many."""
    with ServerProcess(tmp_path / "server", limits__max_log_lines=50) as server:
        async with admin(server) as client:
            with AgentProcess(tmp_path, "worker", server.url, await enrolment(client), slots=1):
                await agents_online(client, ["worker"])
                chatty = await submit(client, "it.chat", 200)
                assert await all_final(client, 30) == {"completed": 1}
                shown = (await client.get(f"{API}/tasks/{chatty}")).json()
                assert (shown["log_lines"], shown["log_dropped"]) == (50, 151)
                lines = (await client.get(f"{API}/tasks/{chatty}/logs")).json()["lines"]
                assert (lines[48]["fields"], lines[-1]["message"]) == ({"number": 48}, "log cut off after 49 lines")
