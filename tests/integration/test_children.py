"""Children on real processes: handlers submit tasks for their own, with no more than the agent's credential."""

from pathlib import Path

import pytest

from mcp_control.testing.server import ServerProcess
from tests.integration.support import API, AgentProcess, admin, agents_online, all_final, enrolment, submit, task

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.long_on_cluster
async def test_handlers_submit_tasks_for_their_own(tmp_path: Path) -> None:
    """Coroutines and threads submit children, which run, name their parent and draw from its budget; the same key makes one."""
    with ServerProcess(tmp_path / "server") as server:
        async with admin(server) as client:
            with AgentProcess(tmp_path, "worker", server.url, await enrolment(client), slots=4):
                await agents_online(client, ["worker"])
                parents = [
                    await submit(client, kind, {"children": 3}, budget={"attempts": 4})
                    for kind in ("it.spawn", "it.spawn_sync")
                ]
                assert await all_final(client, 30) == {"completed": 8}
                for parent in parents:
                    result = (await client.get(f"{API}/tasks/{parent}")).json()["result"]
                    assert result["again"] == result["ids"][0]
                    for child in result["ids"]:
                        shown = await task(client, child)
                        assert (shown["parent_id"], shown["budgets"]) == (parent, [parent])
