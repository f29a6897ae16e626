"""The whole product over a store that times out, lies about failures and loses replies (reliability, section 1)."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import httpx2
import msgspec
import pytest

from mcp_control.server import Ready, serve
from mcp_control.storage.ports import Store
from mcp_control.testing.faulty_store import Fault, FaultyStore
from mcp_control.testing.server import START_SECONDS, RunningServer, settings_for
from tests.integration.pipelines import checksums, completed, parts_pipeline, started
from tests.integration.support import (
    API,
    AgentProcess,
    admin,
    agents_online,
    all_final,
    check_history,
    enrolment,
    read_store,
    say,
    started_agents,
    until,
    violations,
)

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.long_on_cluster]

FAULTS: tuple[Fault, ...] = ("timeout", "executed", "lost", "unavailable", "conflict")


class Weather:
    """The faults of a store, that come and go."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._rates: dict[Fault, float] = dict.fromkeys(FAULTS, 0.0)
        self.store: FaultyStore | None = None

    def around(self, store: Store) -> Store:
        """Put faults around a store."""
        self.store = FaultyStore(store, self._rates, Random(17))
        return self.store

    def bad(self) -> None:
        """Let faults happen: one call in so many, of any kind."""
        self._rates.update(dict.fromkeys(FAULTS, self._rate / len(FAULTS)))

    def good(self) -> None:
        """No faults any more."""
        self._rates.update(dict.fromkeys(FAULTS, 0.0))


@asynccontextmanager
async def _server(folder: Path, weather: Weather) -> AsyncIterator[RunningServer]:
    started_up: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()

    async def ready(there: Ready) -> None:
        started_up.set_result(there)

    running = asyncio.create_task(serve(settings_for(folder / "data", {}), ready, weather.around))
    await asyncio.wait((running, started_up), timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    there = started_up.result()
    owner = await there.services.accounts.administrator()
    token = (await there.services.accounts.create_token(owner, "tests"))[1]
    try:
        yield RunningServer(there.url, token, there.one_time_password, there.services)
    finally:
        weather.good()
        there.stop()
        assert await running == 0


async def _repeated(client: httpx2.AsyncClient, path: str, **more: Any) -> httpx2.Response:
    """Send a request as long as the answer asks for that; what it does must bear repetition."""

    async def answered() -> httpx2.Response | None:
        answer = await client.post(path, **more)
        if answer.status_code < 400:
            return answer
        problem = answer.json()
        assert problem["retryable"] is True, problem
        assert problem["code"] in ("store-unavailable", "outcome-unknown", "conflict", "overloaded"), problem
        return None

    found = await until(answered, 30, path)
    assert found is not None
    return found


@pytest.mark.parametrize("rate", [0.01, 0.1])
async def test_everything_completes_exactly_once_over_a_faulty_store(rate: float, tmp_path: Path) -> None:
    """Submits repeated with their keys, agents, a run with fan-out and artifacts: all of it ends, once, and as without faults."""
    weather = Weather(rate)
    agents: list[AgentProcess] = []
    acknowledged: dict[str, str] = {}
    async with _server(tmp_path / "server", weather) as server, admin(server) as client:
        try:
            token = await enrolment(client)
            agents = started_agents(tmp_path, server.url, token, ["one", "two"], slots=20, lease=10)
            await agents_online(client, ["one", "two"])
            definition = msgspec.json.encode(parts_pipeline())
            made = await client.post(
                f"{API}/pipelines", content=definition, headers={"Content-Type": "application/json"}
            )
            assert made.status_code == 201
            params = {"seed": "a", "parts": 30}
            quiet = await started(client, "parts", params, "quiet")
            await completed(client, quiet, 60)
            expected = await checksums(client, quiet)
            weather.bad()

            async def one(number: int) -> None:
                key = f"single-{number}"
                spec = {"type": "it.echo", "payload": number, "idempotency_key": key}
                answer = await _repeated(client, f"{API}/tasks", json=spec)
                assert answer.status_code in (200, 201), answer.text
                acknowledged[key] = answer.json()["id"]

            async def many(number: int) -> None:
                keys = {f"batch-{number}-{place}" for place in range(50)}
                while keys:
                    sent = sorted(keys)
                    specs = [{"type": "it.echo", "payload": key, "idempotency_key": key} for key in sent]
                    answer = await _repeated(client, f"{API}/tasks/batch", json={"tasks": specs})
                    assert answer.status_code == 200, answer.text
                    for key, item in zip(sent, answer.json()["items"], strict=True):
                        if "id" in item:
                            acknowledged[key] = item["id"]
                            keys.discard(key)
                        else:
                            assert item["problem"]["retryable"], item

            async def run(number: int) -> str:
                answer = await _repeated(
                    client,
                    f"{API}/pipelines/parts/execute",
                    json={"params": params},
                    headers={"Idempotency-Key": f"run-{number}"},
                )
                assert answer.status_code in (200, 201), answer.text
                run_id: str = answer.json()["id"]
                return run_id

            runs, *_ = await asyncio.gather(
                asyncio.gather(*map(run, range(3))),
                asyncio.gather(*map(one, range(200))),
                asyncio.gather(*map(many, range(40))),
            )
            assert len(set(runs)) == 3
            # The busier the machine, the more changes share a commit, and the fewer commits there are to fail.
            wanted = 5 if rate < 0.05 else 50
            for number in itertools.count(200):
                assert weather.store is not None
                if sum(weather.store.injected.values()) > wanted:
                    break
                await one(number)
            seen = 0

            async def settled() -> bool:
                nonlocal seen
                answer = await client.post(f"{API}/tasks/get", json={"ids": list(acknowledged.values())[:1000]})
                seen += 1
                return answer.status_code == 200 and all(
                    item["state"] == "completed" for item in answer.json()["items"]
                )

            await until(settled, 60, "the tasks end while the store is faulty")
            store = weather.store
            assert store is not None
            say(f"at {rate:.0%}: {dict(store.injected)}")
            assert sum(store.injected.values()) > wanted
            weather.good()
            for run_id in runs:
                await completed(client, run_id, 60)
                assert await checksums(client, run_id) == expected
            await all_final(client, 30)
            assert await violations(client) == {}
        finally:
            for agent in agents:
                agent.kill()
    check_history(await read_store(tmp_path / "server" / "data"), acknowledged)
