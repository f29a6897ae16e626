"""Agents on real processes that live and get nothing done: seen, relieved of their tasks, kept away, and back by a probe."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.integration.support import API, in_state, journal, submit, task, until
from tests.integration.test_agent_faults import GRACE, LEASE, World, world

pytestmark = pytest.mark.usefixtures("backend")

QUICK = {
    "health__interval_seconds": 0.2,
    "health__least_history": 3,
    "health__slow_factor": 2,
    "health__stuck_factor": 1,
    "health__stuck_seconds": 2,
    "health__silent_seconds": 1.5,
    "health__probe_seconds": 1,
}


async def _agent(w: World, name: str) -> dict[str, Any]:
    found: dict[str, Any] = (await w.client.get(f"{API}/agents/{name}")).json()
    return found


async def _verdict(w: World, name: str, verdict: str, seconds: float = 20) -> dict[str, Any]:
    async def there() -> dict[str, Any] | None:
        found = await _agent(w, name)
        return found if found["health"]["verdict"] == verdict else None

    found = await until(there, seconds, f"{name} is {verdict}")
    assert found is not None
    return found


async def test_a_task_that_stands_still_moves_on_and_its_agent_comes_back(tmp_path: Path) -> None:
    """Against the history of its type: fenced, run elsewhere exactly once more, the agent quarantined and restored by one task."""
    async with world(tmp_path, **QUICK) as w:
        await w.agent("one", slots=2, lease=20)
        done = tmp_path / "done"
        done.touch()
        for _ in range(4):
            quick = await submit(w.client, "it.hold", {"until": str(done), "journal": str(tmp_path / "quick")})
            await in_state(w.client, quick, "completed")

        async def known() -> bool:
            items = (await w.client.get(f"{API}/tasks/statistics")).json()["items"]
            return any(item["type"] == "it.hold" and item["completed"] >= 4 for item in items)

        await until(known, 20, "the type has a history")
        held = await w.held()
        await in_state(w.client, held, "running")
        stuck = await _verdict(w, "one", "stuck")
        assert stuck["state"] in ("quarantined", "online", "busy"), "the probe may have begun"
        assert "stand still" in stuck["health"]["reason"]
        await w.agent("two", slots=1, lease=20)
        await until(lambda: len(journal(w.journal)) >= 2, 20, "somebody else works on it")
        w.go.touch()
        found = await in_state(w.client, held, "completed")
        outcomes = [attempt["outcome"] for attempt in found["attempts"]]
        assert outcomes[0] == "lost"
        assert outcomes.count("completed") == 1
        # Back by one task; whatever the probe was, one that succeeds restores it.
        echo = await submit(w.client, "it.echo", 1, needs={"agent": "one"})
        await in_state(w.client, echo, "completed")
        back = await _verdict(w, "one", "ok")
        assert (back["state"], back["health"]["probing"], back["health"]["until"]) == ("online", False, None)
        text = (await w.client.get("/metrics")).text
        assert 'mcp_control_agent_health{state="ok"} 2.0' in text
        assert "mcp_control_slot_drift 0.0" in text


@pytest.mark.long
async def test_an_agent_that_beats_and_takes_nothing_is_silent(tmp_path: Path) -> None:
    """A poller that never claims while matching work waits is shown as such; another one does the work."""
    async with world(tmp_path, **QUICK) as w:
        spec = {"name": "mute", "capabilities": [{"name": "it.echo"}], "lease_seconds": 5}
        made = await w.client.post(f"{API}/agents/register", json=spec, headers={"Authorization": f"Bearer {w.token}"})
        own = {"Authorization": f"Bearer {made.json()['credential']}"}
        hello = {"op": "hello", "protocol": 1, "agent": spec}
        session = (await w.client.post(f"{API}/agents/session", json=hello, headers=own)).json()
        waiting = await submit(w.client, "it.echo", "x")
        beats = 0

        async def silent() -> bool:
            nonlocal beats
            beats += 1
            path = f"{API}/agents/session/{session['instance_id']}/heartbeat"
            beat = {"beat": {"tick": beats, "free_slots": 1}}
            assert (await w.client.post(path, json=beat, headers=own)).status_code == 200
            return bool((await _agent(w, "mute"))["health"]["verdict"] == "silent")

        await until(silent, 20, "it is seen to be silent")
        assert "took no work" in (await _agent(w, "mute"))["health"]["reason"]
        assert (await task(w.client, waiting))["state"] == "queued"
        await w.agent("able", slots=1)
        await in_state(w.client, waiting, "completed")


@pytest.mark.long
async def test_a_handler_that_blocks_the_work_loop_stops_the_heartbeat(tmp_path: Path) -> None:
    """Heartbeats share the fate of the loop: the task moves on, exactly once more, and what comes late changes nothing."""
    async with world(tmp_path, **QUICK) as w:
        await w.agent("blocked", slots=1)
        blocking = {"until": str(w.go), "journal": str(w.journal)}
        held = await submit(w.client, "it.block", blocking)
        await until(lambda: len(journal(w.journal)) == 1, 20, "the agent works on it")
        await w.agent("other", slots=1)
        await until(lambda: len(journal(w.journal)) == 2, LEASE + GRACE, "the other agent works on it")
        w.go.touch()
        found = await in_state(w.client, held, "completed")
        assert [attempt["outcome"] for attempt in found["attempts"]] == ["lost", "completed"]
        echo = await submit(w.client, "it.echo", 2, needs={"agent": "blocked"})
        await in_state(w.client, echo, "completed")
        after = await task(w.client, held)
        assert (after["etag"], after["result"]) == (found["etag"], found["result"])
        assert len(journal(w.journal)) == 2


@pytest.mark.long
async def test_busy_threads_do_not_stop_the_heartbeat(tmp_path: Path) -> None:
    """Handlers that keep threads busy for longer than a lease lose nothing: the loop gets its turn."""
    async with world(tmp_path) as w:
        await w.agent("busy", slots=4)
        tasks = [await submit(w.client, "it.busy", LEASE * 2) for _ in range(4)]
        found = await asyncio.gather(*(in_state(w.client, one, "completed", 40) for one in tasks))
        assert [len(one["attempts"]) for one in found] == [1] * 4
