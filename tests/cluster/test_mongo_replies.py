"""The database did what it was asked and the answer did not say so (fault matrix, row 17)."""

from pathlib import Path
from typing import Any

import httpx2
import pytest

from mcp_control.testing.databases import MongoSet
from mcp_control.testing.server import running_server
from tests.integration.support import API, admin, until

_DONE_BUT_UNSURE: dict[str, Any] = {"writeConcernError": {"code": 91, "errmsg": "shutting down"}}
_CUT: dict[str, Any] = {"closeConnection": True}


async def _leads(client: httpx2.AsyncClient) -> bool:
    servers = (await client.get(f"{API}/status")).json()["cluster"]["servers"]
    return any(server["leader"] for server in servers)


async def _submit(client: httpx2.AsyncClient, key: str | None) -> httpx2.Response:
    return await client.post(f"{API}/tasks", json={"type": "it.none", "payload": 1, "idempotency_key": key})


async def _taken(client: httpx2.AsyncClient, key: str | None) -> httpx2.Response:
    """Submit, and again where the server was too busy to take it."""

    async def taken() -> httpx2.Response | None:
        answer = await _submit(client, key)
        assert answer.status_code in (200, 201) or answer.json()["code"] == "overloaded", answer.text
        return answer if answer.is_success else None

    answer = await until(taken, 20, "taken")
    assert answer is not None
    return answer


async def _all(client: httpx2.AsyncClient) -> list[str]:
    answer = await client.get(f"{API}/tasks", params={"limit": 100})
    return [task["id"] for task in answer.json()["items"]]


@pytest.mark.parametrize("times", [pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize("how", [pytest.param(_DONE_BUT_UNSURE, id="unsure"), pytest.param(_CUT, id="cut")])
async def test_an_answer_that_gets_lost_once_or_twice_is_not_even_noticed(
    how: dict[str, Any], times: int, mongo_set: MongoSet, mongo_uri: str, tmp_path: Path
) -> None:
    """The commit is asked for again and answered alike: the client hears success, and one task is there."""
    async with running_server(tmp_path, mongo__uri=mongo_uri) as server, admin(server) as client:
        mongo_set.fail_command("commitTransaction", times=times, **how)
        answer = await _submit(client, "key")
        mongo_set.clear_failures()
        assert answer.status_code == 201, answer.text
        assert await _all(client) == [answer.json()["id"]]


@pytest.mark.parametrize("key", ["key", pytest.param(None, id="control-no-key", marks=[pytest.mark.long])])
async def test_a_submit_of_unknown_outcome_can_be_repeated_with_its_key(
    key: str | None, mongo_set: MongoSet, mongo_uri: str, tmp_path: Path
) -> None:
    """Where no answer is to be had, the client hears 503 within 5 s, and the same key has the same effect and answer afterwards.

    Without a key, as the control, the repetition makes a second task: the first one had happened.
    """
    async with running_server(tmp_path, mongo__uri=mongo_uri) as server, admin(server) as client:
        assert await _all(client) == []
        # What a server does in its first seconds, as to take the lead, are commits, too, which this one would wait behind.
        await until(lambda: _leads(client), 20, "the server leads")
        mongo_set.fail_command("commitTransaction", times=None, **_DONE_BUT_UNSURE)
        for _ in range(5):
            unsure = await _submit(client, key)
            assert unsure.status_code == 503
            assert unsure.elapsed.total_seconds() <= 6.0
            if unsure.json()["code"] == "outcome-unknown":
                break  # else it waited behind another commit, and nothing happened
        mongo_set.clear_failures()
        assert unsure.json()["code"] == "outcome-unknown"
        again = [await _taken(client, key) for _ in range(2)]
        ids = {answer.json()["id"] for answer in again}
        if key is None:
            assert len(await _all(client)) == 3
        else:
            assert await _all(client) == [*ids]
