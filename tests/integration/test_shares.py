"""Shares on real processes: weights are kept while both wait, a small share is not held up, and an operator changes weights live."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from mcp_control.kernel.changes import StoredFact
from mcp_control.testing.server import ServerProcess
from tests.integration.support import (
    API,
    AgentProcess,
    admin,
    agents_online,
    all_final,
    enrolment,
    read_store,
    until,
    violations,
)

pytestmark = pytest.mark.usefixtures("backend")
SLOTS = 4


def _busy(share: str, weight: float = 1.0) -> dict[str, Any]:
    return {"type": "it.busy", "payload": 0.01, "fairness": {"key": share, "weight": weight}}


def _given(facts: list[StoredFact]) -> list[str]:
    """Return the shares of the tasks that were given out, in their order."""
    return [msgspec.json.decode(stored.fact.data)["share"] for stored in facts if stored.fact.type == "task.assigned"]


async def test_weights_are_kept_and_a_small_share_is_not_held_up(tmp_path: Path) -> None:
    """Two shares wait, three to one: they are served so within 10 %. One task of a third starts with the next free slots."""
    with ServerProcess(tmp_path / "server") as server:
        async with admin(server) as client:
            token = await enrolment(client)
            specs = [*[_busy("light")] * 60, *[_busy("heavy", 3.0)] * 120]
            for part in (specs[:90], specs[90:]):
                answer = await client.post(f"{API}/tasks/batch", json={"tasks": part})
                assert answer.status_code == 200, answer.text
            agent = AgentProcess(tmp_path, "worker", server.url, token, slots=SLOTS).start()
            try:
                await agents_online(client, ["worker"])

                async def served() -> dict[str, dict[str, Any]]:
                    items = (await client.get(f"{API}/shares")).json()["items"]
                    return {item["key"]: item for item in items}

                async def under_way() -> bool:
                    return (await served()).get("heavy", {}).get("served", 0) >= 20

                await until(under_way, 60, "heavy is served")
                one = (await client.post(f"{API}/tasks", json=_busy("small"))).json()["id"]
                await all_final(client, 120)
            finally:
                agent.kill()
            assert await violations(client) == {}

            async def counted() -> bool:
                return {key: item["served"] for key, item in (await served()).items()} == {
                    "light": 60,
                    "heavy": 120,
                    "small": 1,
                }

            await until(counted, 30, "what was served is written down")
            assert {item["waiting"] for item in (await served()).values()} == {0}
            metrics = (await client.get("/metrics")).text
            assert 'mcp_control_share_tasks_total{share="heavy"} 120' in metrics
    found = await read_store(tmp_path / "server" / "data")
    order = _given(found.facts)
    both = order[: 160 - SLOTS]  # from then on heavy has nothing left that waits
    heavy = both.count("heavy") / (both.count("heavy") + both.count("light"))
    assert abs(heavy - 0.75) <= 0.075
    kinds = [(stored.fact.type, stored.fact.subject) for stored in found.facts]
    since = kinds[kinds.index(("task.queued", one)) : kinds.index(("task.assigned", one))]
    assert sum(kind == "task.assigned" for kind, _ in since) <= 3 * SLOTS


async def test_an_operator_s_weight_counts_while_the_work_goes_on(tmp_path: Path) -> None:
    """Two equal shares wait; one is given four times the weight, then none: what it is served follows, and events tell of it."""
    with ServerProcess(tmp_path / "server") as server:
        async with admin(server) as client:
            answer = await client.put(f"{API}/shares", json={"key": "a", "weight": 4.0})
            assert answer.status_code == 200, answer.text
            assert (answer.json()["weight"], answer.json()["ordered"]) == (4.0, True)
            refused = await client.put(f"{API}/shares", json={"key": "a", "weight": 0.0})
            assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "#/weight")
            token = await enrolment(client)
            answer = await client.post(f"{API}/tasks/batch", json={"tasks": [*[_busy("b")] * 60, *[_busy("a")] * 60]})
            assert answer.status_code == 200, answer.text
            agent = AgentProcess(tmp_path, "worker", server.url, token, slots=SLOTS).start()
            try:
                await all_final(client, 120)
            finally:
                agent.kill()
            answer = await client.put(f"{API}/shares", json={"key": "a", "weight": None})
            assert (answer.json()["weight"], answer.json()["ordered"]) == (1.0, False)
    found = await read_store(tmp_path / "server" / "data")
    first = _given(found.facts)[:60]
    assert abs(first.count("a") - 48) <= 5
    assert [stored.fact.type for stored in found.facts].count("share.updated") == 2
