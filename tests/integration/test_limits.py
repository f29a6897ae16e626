"""Limits on real processes: they hold through kill -9 of the server, change live, and say who holds what."""

import asyncio
from pathlib import Path
from typing import Any

import httpx2
import pytest

from mcp_control.testing.server import ServerProcess
from tests.integration.support import (
    API,
    AgentProcess,
    admin,
    agents_online,
    all_final,
    enrolment,
    read_store,
    submit,
    task,
    until,
    violations,
)

pytestmark = pytest.mark.usefixtures("backend")


def most_at_once(facts: list[Any]) -> int:
    """Return how many tasks were assigned or running at once, at most, by what was recorded."""
    held: set[str] = set()
    most = 0
    for stored in facts:
        kind, subject = stored.fact.type, stored.fact.subject
        if kind == "task.assigned":
            held.add(subject)
        elif kind in ("task.completed", "task.failed", "task.cancelled", "task.expired", "task.retrying"):
            held.discard(subject)
        most = max(most, len(held))
    return most


@pytest.mark.long_on_cluster
@pytest.mark.timeout(300)
async def test_limits_hold_and_nothing_is_stuck_after_kill_9(tmp_path: Path) -> None:
    """Forty tasks of a key with a limit of three: the server is killed on the way; never more than three, and all end."""
    server = ServerProcess(tmp_path / "server").start()
    agent: AgentProcess | None = None
    try:
        async with admin(server) as client:
            agent = AgentProcess(tmp_path, "worker", server.url, await enrolment(client), slots=20).start()
            await agents_online(client, ["worker"])
            limits = [{"key": "a", "concurrency": 3}, {"key": "b", "concurrency": 5}]
            specs = [
                {"type": "it.busy", "payload": 0.02, "limits": limits, "idempotency_key": f"k{n}"} for n in range(40)
            ]
            answer = await client.post(f"{API}/tasks/batch", json={"tasks": specs})
            assert answer.status_code == 200, answer.text

            async def ten_done() -> bool:
                answer = await client.get(f"{API}/tasks", params={"state": "completed", "limit": 100})
                return len(answer.json()["items"]) >= 10

            await until(ten_done, 30, "ten are done")
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
            assert await all_final(client, 60) == {"completed": 40}
            assert await violations(client) == {}
            assert (await client.get("/metrics")).text.count("mcp_control_leaked_holds_total 0") == 1
    finally:
        if agent is not None:
            agent.kill()
        assert server.stop() == 0
    found = await read_store(tmp_path / "server" / "data")
    assert 1 <= most_at_once(found.facts) <= 3
    assert not any(one.holds for one in found.tasks.values())


async def test_a_rule_counts_at_once_and_says_who_holds_what(tmp_path: Path) -> None:
    """A rule with an expression limits per customer and tier; a blocked task names its holder; raising it lets more in, removing it all."""
    with ServerProcess(tmp_path / "server") as server:
        async with admin(server) as client:
            rule = {
                "match": {"type": "it.*"},
                "key": "labels.customer",
                "concurrency": 'labels.tier == "premium" ? 2 : 1',
            }
            made = await client.put(f"{API}/limits/per-customer", json=rule)
            assert made.status_code == 200, made.text
            with AgentProcess(tmp_path, "worker", server.url, await enrolment(client), slots=20):
                await agents_online(client, ["worker"])
                hold = {"until": str(tmp_path / "end"), "journal": str(tmp_path / "journal")}
                basic = {"customer": "7", "tier": "basic"}
                first, second, third = [await submit(client, "it.hold", hold, labels=basic) for _ in range(3)]
                premium = [
                    await submit(client, "it.hold", hold, labels={"customer": "8", "tier": "premium"}) for _ in range(2)
                ]

                async def running(*ids: str) -> bool:
                    return {(await task(client, one))["state"] for one in ids} == {"running"}

                await until(lambda: running(first, *premium), 10, "one of a basic, two of a premium customer run")
                told = (await client.get(f"{API}/tasks/{second}/explain")).json()
                assert (told["state"], told["code"], told["held_by"]) == ("blocked", "limit-full", [first])
                shown = (await client.get(f"{API}/limits/per-customer")).json()
                use = {one["key"]: (one["taken"], one["waiting"]) for one in shown["use"]}
                assert use == {"7": (1, 2), "8": (2, 0)}
                await client.put(f"{API}/limits/per-customer", json={**rule, "concurrency": 2})
                await until(lambda: running(second), 10, "a raised limit lets one more in")
                assert (await task(client, third))["state"] == "blocked"
                assert (await client.delete(f"{API}/limits/per-customer")).status_code == 204
                await until(lambda: running(third), 10, "without the rule nothing waits")
                (tmp_path / "end").touch()
                assert await all_final(client, 20) == {"completed": 5}


@pytest.mark.long_on_cluster
async def test_of_many_submissions_at_once_one_gets_the_key(tmp_path: Path) -> None:
    """Twenty singletons submitted at once are one task; over its rate a throttled task is refused with 429."""
    with ServerProcess(tmp_path / "server") as server:
        async with admin(server) as client:
            unique = {"key": "nightly", "on_conflict": "return_existing"}

            async def one() -> httpx2.Response:
                return await client.post(f"{API}/tasks", json={"type": "it.echo", "unique": unique})

            answers = await asyncio.gather(*[one() for _ in range(20)])
            assert {answer.status_code for answer in answers} <= {200, 201}
            assert len({answer.json()["id"] for answer in answers}) == 1
            limits = [{"key": "mail", "rate": {"count": 2, "seconds": 60}, "on_excess": "drop"}]
            codes = [
                (await client.post(f"{API}/tasks", json={"type": "it.echo", "limits": limits})).status_code
                for _ in range(3)
            ]
            assert codes == [201, 201, 429]


async def test_the_limit_of_an_agent_holds_through_kill_9_of_the_server(tmp_path: Path) -> None:
    """An agent that takes two of a type at once holds two, also when another server lets it in; its other slots take other work."""
    server = ServerProcess(tmp_path / "server").start()
    try:
        async with admin(server) as client:
            token = await enrolment(client)
            with AgentProcess(tmp_path, "worker", server.url, token, slots=6, limit="it.hold:2"):
                await agents_online(client, ["worker"])
                shown = (await client.get(f"{API}/agents/worker")).json()
                limits = {one["name"]: one.get("limit") for one in shown["capabilities"]}
                assert (limits["it.hold"], limits["it.echo"]) == (2, None)
                hold = {"until": str(tmp_path / "end"), "journal": str(tmp_path / "journal")}
                tasks = [await submit(client, "it.hold", hold) for _ in range(5)]

                async def held() -> list[str]:
                    states = [(await task(client, one))["state"] for one in tasks]
                    return [one for one, state in zip(tasks, states, strict=True) if state == "running"]

                async def two() -> bool:
                    return len(await held()) == 2

                await until(two, 10, "two run")
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)
                await agents_online(client, ["worker"])
                other = await submit(client, "it.echo", 1)

                async def done() -> bool:
                    return (await task(client, other))["state"] == "completed"

                await until(done, 20, "other work goes on beside")

                async def said() -> bool:
                    running = await held()
                    waiting = next(one for one in tasks if one not in running)
                    told = (await client.get(f"{API}/tasks/{waiting}/explain")).json()
                    return told["code"] == "agents-full-for-type" and set(told["held_by"]) == set(running)

                await until(said, 20, "those that wait say who holds the agent")
                assert len(await held()) == 2
                await asyncio.to_thread(Path(hold["until"]).touch)
                assert await all_final(client, 30) == {"completed": 6}
    finally:
        server.stop()
    found = await read_store(tmp_path / "server" / "data")
    of_type = [stored for stored in found.facts if stored.fact.subject in tasks]
    assert most_at_once(of_type) == 2
