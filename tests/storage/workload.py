"""A little of everything the product does, on one server: every list with every filter, every janitor, whatever looks something up."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from itertools import combinations
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

import httpx2
import msgspec

from mcp_control.api.assembly import routes
from mcp_control.api.routing import Endpoint
from mcp_control.kernel.changes import Change, Entity
from mcp_control.tasks.parking import UNREADABLE
from mcp_control.testing.server import RunningServer
from tests.archive.support import Poller, poller
from tests.integration.pipelines import completed, parts_pipeline, started
from tests.integration.support import API, AgentProcess, agents_online, enrolment, in_state, submit, until

JSON: Final = {"Content-Type": "application/json"}
SPEC: Final = {"name": "poller", "capabilities": [{"name": "polled"}], "slots": 10, "lease_seconds": 300}
_PAGES: Final = frozenset({"limit", "cursor", "after", "wait"})
Once = Callable[[int], Awaitable[object]]


class Workload:
    """Drives a server through all of it.

    Args:
        janitors: what the server does again and again, by name.
        without_redis: makes the server work without Redis; None where it has none.

    Attributes:
        unknown: parameters for which there is no example here.
    """

    def __init__(
        self,
        server: RunningServer,
        client: httpx2.AsyncClient,
        folder: Path,
        janitors: Mapping[str, Once],
        without_redis: Callable[[], Awaitable[None]] | None,
    ) -> None:
        self._server = server
        self._client = client
        self._folder = folder
        self._janitors = janitors
        self._without_redis = without_redis
        self._known: dict[str, str] = {}
        self.unknown: set[str] = set()

    async def run(self) -> None:
        """Do it."""
        await self._access()
        await self._pipelines()
        await self._tasks()
        await self._schedules()
        await self._bounds()
        await self._groups()
        await self._parked()
        await self._operations()
        await self._questions()
        await self._lists()
        if self._without_redis is not None:
            await self._without_redis()
            await self._store_alone()
        await self._ends()
        await self._keep()

    async def _post(self, path: str, body: object = None, **options: Any) -> Any:
        answer = await self._client.post(f"{API}{path}", **({} if body is None else {"json": body}), **options)
        assert answer.status_code < 300, (path, answer.text)
        return answer.json() if answer.content else None

    async def _get(self, path: str, **params: Any) -> Any:
        answer = await self._client.get(path, params=params)
        # What has no budget or no output was looked up all the same; 422 is for values that are made up.
        assert answer.status_code in ((200, 404, 422) if self.unknown else (200, 404)), (path, params, answer.text)
        return answer.json() if "json" in answer.headers["content-type"] else None

    async def _access(self) -> None:
        wrong = {"username": "admin", "password": "not the one that was printed"}
        assert (await self._client.post(f"{API}/auth/login", json=wrong)).status_code == 401
        token = await self._post("/auth/tokens", {"name": "another"})
        assert (await self._client.delete(f"{API}/auth/tokens/{token['id']}")).status_code < 300

    async def _pipelines(self) -> None:
        token = await enrolment(self._client)
        with (
            AgentProcess(self._folder, "worker", self._server.url, token, slots=4),
            AgentProcess(self._folder, "other", self._server.url, token, slots=4),
        ):
            for text in ("first", "second"):
                spec = msgspec.to_builtins(parts_pipeline())
                spec["metadata"]["description"] = text
                await self._post("/pipelines", spec)
            run_id = await started(self._client, "parts", {"seed": "a", "parts": 2}, "one")
            again = await started(self._client, "parts", {"seed": "a", "parts": 2}, "one")
            assert again == run_id
            await completed(self._client, run_id, 60)
            done = await submit(self._client, "it.echo", 1, labels={"team": "a"}, idempotency_key="once")
            await in_state(self._client, done, "completed", 30)
            await agents_online(self._client, ["worker", "other"])
            quick = await submit(self._client, "it.echo", 1, needs={"balancing": "fastest"})
            await in_state(self._client, quick, "completed", 30)
        self._known |= {"run_id": run_id, "run": run_id, "pipeline": "parts", "stage": "final"}
        waits = await started(self._client, "parts", {"seed": "b", "parts": 1}, "two")  # nobody does it
        await self._get(f"{API}/runs/{waits}/explain")
        uploaded = await self._client.post(f"{API}/artifacts?name=in.txt&role=input", content=b"what comes in")
        self._known |= {"artifact_id": uploaded.json()["id"], "name": "in.txt"}

    async def _tasks(self) -> None:
        headers = {"Authorization": f"Bearer {await self._server.enrolment_token()}"}
        async with httpx2.AsyncClient(base_url=self._server.url, headers=headers) as fresh:
            told = (await fresh.post(f"{API}/agents/register", json=SPEC)).json()
        self._known |= {"agent": told["agent"]["id"], "agent:name": "poller", "capability": "polled"}
        self._credential = told["credential"]
        async with poller(self._server, self._credential) as peer:
            for number in range(3):
                await submit(self._client, "polled", number, labels={"team": "a"})
            first, second, _ = (await peer.claim(3)).values()
            await self._log(peer, first)
            for one in (first, second):
                assert await peer.done(one) == (200, "")
            self._known |= {"task_id": first["task_id"], "type": "polled", "label": "team:a", "code": "boom"}
            self._known |= {"ended_after": "2026-01-01T00:00:00Z", "ended_before": "2100-01-01T00:00:00Z"}
            await self._logged_run(peer)
        later = (datetime.now(UTC) + timedelta(days=1)).isoformat()
        await submit(self._client, "it.nobody", 1, run_at=later)
        due = (datetime.now(UTC) + timedelta(seconds=0.3)).isoformat()
        await in_state(self._client, await submit(self._client, "it.nobody", 1, run_at=due), "queued")
        cancelled = await submit(self._client, "it.nobody", 1)
        await self._post(f"/tasks/{cancelled}/cancel", {"reason": "enough"})

    async def _log(self, peer: Poller, one: dict[str, Any]) -> None:
        lines = [{"at": 1, "message": f"line {number}"} for number in range(3)]
        logs = [{"task_id": one["task_id"], "lease_token": one["lease_token"], "lines": lines}]
        async with httpx2.AsyncClient(
            base_url=self._server.url, headers={"Authorization": f"Bearer {self._credential}"}
        ) as agent:
            path = f"{API}/agents/session/{peer.instance_id}/report"
            answer = await agent.post(path, json={"op": "report", "id": 9, "logs": logs})
        assert answer.status_code == 200, answer.text

    async def _logged_run(self, peer: Poller) -> None:
        """A run whose task has a log, to be exported."""
        stage = {"id": "one", "uses": "polled"}
        spec = {"metadata": {"name": "logged"}, "spec": {"stages": [stage]}}
        await self._post("/pipelines", {"apiVersion": "mcp-control/v1", "kind": "Pipeline", **spec})
        self._logged = await started(self._client, "logged", {}, "logged")
        (one,) = (await peer.claim(1)).values()
        await self._log(peer, one)
        assert await peer.done(one) == (200, "")
        await completed(self._client, self._logged, 30)

    async def _store_alone(self) -> None:
        """Claim without Redis, with something left that waits."""
        async with poller(self._server, self._credential) as peer:
            for number in range(3):
                await submit(self._client, "polled", number)
            last = await submit(self._client, "polled", 1, needs={"slots": 2})  # in another lane, behind them
            await self._get(f"{API}/lanes")
            await self._get(f"{API}/tasks/{last}/explain")
            await peer.claim(1)

    async def _schedules(self) -> None:
        every = {"every": 1, "overlap": "allow"}
        await self._post("/schedules", {"name": "tasks", "task": {"type": "it.nobody", "payload": 1}, **every})
        params = {"seed": "c", "parts": 1}
        await self._post("/schedules", {"name": "runs", "run": {"pipeline": "parts", "params": params}, **every})
        await self._post("/schedules/tasks/trigger", {"idempotency_key": "by-hand"})
        begin = (datetime.now(UTC) - timedelta(seconds=90)).isoformat()
        end = (datetime.now(UTC) - timedelta(seconds=30)).isoformat()
        await self._post("/schedules/tasks/backfill", {"from": begin, "to": end, "width": 4})
        self._known["schedule"] = "tasks"

        async def fired() -> bool:
            return len((await self._get(f"{API}/schedules/tasks/fires"))["items"]) >= 3

        await until(fired, 20, "the schedule fires")

    async def _bounds(self) -> None:
        """Limits, shares, keys and budgets, with something that waits at each."""
        rule = {"match": {"type": "it.*"}, "key": "labels.team", "concurrency": 1}
        answer = await self._client.put(f"{API}/limits/teams", json=rule)
        assert answer.status_code < 300, answer.text
        answer = await self._client.put(f"{API}/shares", json={"key": "customer-7", "weight": 3.0})
        assert answer.status_code < 300, answer.text
        self._known["limit"] = "teams"
        for number in range(3):
            given: dict[str, Any] = {"labels": {"team": "b"}, "fairness": {"key": "customer-7"}}
            last = await submit(self._client, "it.nobody", number, **given)
        await self._get(f"{API}/tasks/{last}/explain")
        for _ in range(2):
            once = {"type": "it.nobody", "unique": {"key": "u"}, "idempotency_key": "unique"}
            await self._post("/tasks", once)
        await submit(self._client, "it.nobody", 1, debounce={"key": "d", "seconds": 0.2})
        asks = {"attempts": 1, "on_exhausted": "ask"}
        spender = await submit(self._client, "polled", 1, budget=asks)
        await submit(self._client, "polled", 1, parent_id=spender)
        await self._get(f"{API}/tasks/{spender}/explain")
        async with poller(self._server, self._credential) as peer:
            await peer.claim(1)
            await self._janitors["drift"](0)
        child = {"type": "polled", "parent_id": spender, "idempotency_key": "too-much"}
        assert (await self._client.post(f"{API}/tasks", json=child)).status_code == 409
        answer = await self._client.patch(f"{API}/tasks/{spender}/budget", json={"add": {"attempts": 2}})
        assert answer.status_code < 300, answer.text

    async def _groups(self) -> None:
        """Groups: one whose members end, one with a member that fails, one that is cancelled."""
        one = {"type": "polled", "payload": 1}
        callbacks = {"completed": {"type": "it.nobody"}, "ended": {"type": "it.nobody"}}
        made = await self._post("/groups", {"tasks": [one], "on": callbacks, "open": True, "idempotency_key": "group"})
        await self._post("/groups", {"tasks": [one], "on": callbacks, "open": True, "idempotency_key": "group"})
        await self._post(f"/groups/{made['id']}/tasks", {"tasks": [{"type": "it.unheard"}], "idempotency_key": "more"})
        await self._get(f"{API}/groups/{made['id']}")
        await self._post(f"/groups/{made['id']}/seal", {})
        self._known |= {"group": made["id"], "group_id": made["id"]}
        where = {"group": made["id"], "state": ["queued"]}
        asked = {"verb": "cancel", "where": where, "expected_at_most": 100, "reason": "enough"}
        answer = await self._client.post(f"{API}/operations", json=asked, params={"wait": 10})
        assert answer.status_code < 300, answer.text

        async def ended() -> bool:
            return "finished_at" in await self._get(f"{API}/groups/{made['id']}", wait=1)

        await until(ended, 20, "the group has ended")
        await self._post(f"/groups/{made['id']}/retry", {})
        other = await self._post("/groups", {"tasks": [{"type": "it.unheard"}], "open": True})
        await self._post(f"/groups/{other['id']}/cancel", {"reason": "enough"})

    async def _parked(self) -> None:
        """A task that cannot be read, removed by hand."""
        spoilt = Entity("task", "task_spoilt", 0, {"tenant": "default", "state": UNREADABLE}, b"\xff", {})
        assert await self._server.services.store.commit([Change([spoilt])]) == [None]
        assert (await self._client.delete(f"{API}/dead-letters/parked/task_spoilt")).status_code < 300

    async def _operations(self) -> None:
        """One change of many tasks."""
        for number in range(3):
            await submit(self._client, "it.unheard", number)
        where = {"type": "it.unheard", "state": ["queued"]}
        asked = {"verb": "cancel", "where": where, "expected_at_most": 100, "reason": "enough"}
        answer = await self._client.post(f"{API}/operations", json=asked, params={"wait": 10})
        assert answer.status_code < 300, answer.text
        self._known["operation_id"] = answer.json()["id"]

    async def _questions(self) -> None:
        """A run that asks people and waits for a signal."""
        stages = [{"id": "ask", "approval": {"title": "Go on?"}}, {"id": "paid", "wait_for": {"signal": "payment"}}]
        spec = {"metadata": {"name": "asking"}, "spec": {"stages": stages}}
        await self._post("/pipelines", {"apiVersion": "mcp-control/v1", "kind": "Pipeline", **spec})
        run_id = await started(self._client, "asking", {}, "asking")

        async def asked() -> Any:
            return (await self._get(f"{API}/approvals", run=run_id))["items"]

        self._known["approval_id"] = (await until(asked, 20, "the question"))[0]["id"]
        await self._post(f"/runs/{run_id}/signals/payment", {"body": {"amount": 20}})
        inside = [{"id": "inside", "uses": "pipeline:asking", "version": "1"}]
        limited = {"stages": inside, "budget": {"attempts": 10}}
        outer = {"metadata": {"name": "outer"}, "spec": limited}
        await self._post("/pipelines", {"apiVersion": "mcp-control/v1", "kind": "Pipeline", **outer})
        budgeted = await started(self._client, "outer", {}, "outer")
        answer = await self._client.patch(f"{API}/runs/{budgeted}/budget", json={"add": {"attempts": 2}})
        assert answer.status_code < 300, answer.text

    async def _lists(self) -> None:
        """Ask every route that reads, with every filter alone, by twos and all together, and go on to the next page."""
        for endpoint in routes(""):
            if endpoint.method == "GET" and endpoint.full_path.startswith(API):
                for params in self._filters(endpoint):
                    await self._read(endpoint, params)

    async def _read(self, endpoint: Endpoint, params: dict[str, object]) -> None:
        path = endpoint.full_path
        while "{" in path:
            before, _, rest = path.partition("{")
            name, _, behind = rest.partition("}")
            path = before + self._value(name, endpoint.full_path) + behind
        names = {field.encode_name for field in msgspec.structs.fields(endpoint.query.type)}
        page = {"limit": 1} if "limit" in names else {}
        answer = await self._get(path, **page, **params)
        if "cursor" in names and (cursor := answer.get("next_cursor")):
            await self._get(path, **page, **params, cursor=cursor)
        if page:
            await self._get(path, **params)

    def _filters(self, endpoint: Endpoint) -> Iterator[dict[str, object]]:
        fields = {field.encode_name: field.type for field in msgspec.structs.fields(endpoint.query.type)}
        choices = {
            name: [*self._choices(name, type_, endpoint.full_path)]
            for name, type_ in fields.items()
            if name not in _PAGES
        }
        yield {}
        for count in {1, 2, len(choices)}:
            for names in combinations(choices, count):
                for place in range(max([len(choices[name]) for name in names], default=0)):
                    yield {name: choices[name][place % len(choices[name])] for name in names}

    def _choices(self, name: str, type_: Any, path: str) -> Iterator[object]:
        for one in (type_, *get_args(type_)):
            if isinstance(one, type) and issubclass(one, StrEnum):
                yield from [each.value for each in one]
                return
            if get_origin(one) is Literal:
                yield from get_args(one)
                return
            if one is bool:
                yield "true"
                return
            if one is int or int in get_args(one):
                yield 1
                return
        yield self._value(name, path)

    def _value(self, name: str, path: str) -> str:
        known = {"type": "task.completed", "subject": self._known["task_id"]} if path.endswith("/events") else {}
        for each in (name, name.partition(":")[0]):
            if (found := {**self._known, **known}.get(each)) is not None:
                return found
        self.unknown.add(f"{name} of {path}")
        return "unknown"

    async def _ends(self) -> None:
        """What ends: schedules, runs, versions, agents, artifacts, with what is looked up for it."""
        bundle = await self._client.get(f"{API}/runs/{self._logged}/bundle")
        await self._post("/runs/import", content=bundle.content, headers={"Content-Type": "application/octet-stream"})
        for path in ("/schedules/tasks", "/schedules/runs"):
            assert (await self._client.delete(f"{API}{path}")).status_code < 300
        for run in (await self._get(f"{API}/runs", limit=500))["items"]:
            if run["state"] in ("pending", "running"):
                await self._post(f"/runs/{run['id']}/cancel", {"reason": "enough"})
        answer = await self._client.delete(f"{API}/pipelines/parts", params={"version": 1})
        assert answer.status_code in (200, 204, 409), answer.text
        assert (await self._client.delete(f"{API}/artifacts/{self._known['artifact_id']}")).status_code < 300
        await self._post("/agents/poller/retire", {"note": "done"})

    async def _keep(self) -> None:
        """Do what servers do again and again, at a moment when everything has become old."""
        later = round((datetime.now(UTC) + timedelta(days=400)).timestamp() * 1000)
        for _ in range(2):
            for once in self._janitors.values():
                await once(later)
            await asyncio.sleep(0)
