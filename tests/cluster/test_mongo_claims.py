"""Two servers claim from the store at the same time: what keeps a task from being given out twice is the version in the write."""

from pathlib import Path

import pytest

from mcp_control.storage.mongo import writer
from mcp_control.testing.server import running_server
from tests.cluster.harness import Follower, read_tasks
from tests.cluster.history import History, check, violations
from tests.cluster.unguarded import unguarded
from tests.integration.support import API, AgentProcess, admin, agents_online, all_final, journal, say, until

TASKS = 300


@pytest.mark.parametrize("guarded", [True, pytest.param(False, id="control-no-version", marks=[pytest.mark.long])])
async def test_two_servers_that_claim_from_the_store_never_give_out_one_attempt_twice(
    guarded: bool, mongo_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I1 to I9 hold without any Redis; with no version in the filters, as the control, attempts are given out twice."""
    if not guarded:
        monkeypatch.setattr(writer, "steps", unguarded)
    history = History()
    written = tmp_path / "journal"
    agents: list[AgentProcess] = []
    try:
        async with (
            running_server(tmp_path / "a", mongo__uri=mongo_uri) as a,
            running_server(tmp_path / "b", mongo__uri=mongo_uri) as b,
            admin(a) as client,
        ):
            token = await a.enrolment_token()
            # Quarantined until the work is there, so that both begin at the same time.
            agents = [
                AgentProcess(tmp_path, name, server.url, token, slots=4).start()
                for name, server in (("one", a), ("two", b))
            ]
            await agents_online(client, ["one", "two"])
            for name in ("one", "two"):
                assert (await client.post(f"{API}/agents/{name}/drain")).status_code == 200
            follower = await Follower(history).start(client)
            work = {"type": "it.hold", "payload": {"until": "/", "journal": str(written)}}
            for first in range(0, TASKS, 100):
                batch = [{**work, "idempotency_key": f"k{first + number}"} for number in range(100)]
                answer = await client.post(f"{API}/tasks/batch", json={"tasks": batch})
                assert answer.status_code == 200, answer.text
                for given, item in zip(batch, answer.json()["items"], strict=True):
                    history.acked(str(given["idempotency_key"]), item["id"])
            for name in ("one", "two"):
                assert (await client.post(f"{API}/agents/{name}/resume")).status_code == 200
            if guarded:
                await all_final(client, 60)
                await follower.caught_up(client)
                await read_tasks(client, history)
            else:
                await until(lambda: len(journal(written)) > TASKS, 60, "more executions than tasks")
            await follower.stop()
    finally:
        for agent in agents:
            agent.kill()
    history.journal(journal(written))
    by = {one.pid for one in history.executions}
    say(f"{len(history.executions)} executions by {len(by)} agents")
    assert len(by) == 2, "both took part"
    if guarded:
        check(history)
    else:
        assert [one for one in violations(history) if one.startswith("I3 attempt")]
