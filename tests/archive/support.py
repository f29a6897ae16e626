"""What the tests of backups share: an agent that polls, and commands as people give them."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2

from mcp_control.app import KINDS
from mcp_control.archive import backup
from mcp_control.archive.model import Manifest
from mcp_control.archive.restore import restore
from mcp_control.kernel.changes import Entity, StoredFact
from mcp_control.kernel.clock import SystemClock
from mcp_control.offline import Place, in_database, in_folder
from mcp_control.testing.server import RunningServer, databases_for

SPEC = {"name": "poller", "capabilities": [{"name": "polled"}], "slots": 10, "lease_seconds": 300}


def quiet(_: str) -> None:
    """Progress that nobody looks at."""


def place_of(folder: Path) -> Place:
    """Return the store of the servers of this folder, wherever this run of the tests puts it."""
    given = databases_for(folder / "data")
    return in_database(str(given["mongo.uri"])) if given else in_folder(folder / "data")


def name_of(folder: Path) -> str:
    """Return how commands name that store."""
    given = databases_for(folder / "data")
    return str(given["mongo.uri"]) if given else f"sqlite:{folder / 'data'}"


async def create(place: Place, path: Path, *, blobs: bool = True) -> Manifest:
    """Write a backup."""
    async with place.blobs() as there:
        return await backup.create(
            place.archive,
            there if blobs else None,
            path,
            store=place.kind,
            product="1",
            now=SystemClock().now(),
            progress=quiet,
        )


async def restored(path: Path, place: Place, *, replace: bool = False) -> int:
    """Restore a backup and return the generation."""
    now = SystemClock().now()
    return (await restore(path, place.archive, place.own_blobs, KINDS, now=now, replace_old=replace, progress=quiet))[2]


async def content(place: Place) -> tuple[dict[tuple[str, str], Entity], list[StoredFact]]:
    """Return everything in a store, entities with null index fields left out."""
    async with place.archive.snapshot() as snapshot:
        entities = {
            (kind.name, entity.id): entity
            for kind in snapshot.kinds
            async for page in snapshot.entities(kind.name)
            for entity in page
        }
        facts = [fact async for page in snapshot.facts() for fact in page]
        assert snapshot.newest_seq == (facts[-1].seq if facts else 0)
        return entities, facts


async def mcpctl(*args: str, code: int = 0, **environ: str) -> Any:
    """Run a command; returns what it printed as JSON, or what it said when it failed."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("MCP_CONTROL_", "MONGODB_", "REDIS_"))
    }
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "mcp_control.cli.main", *args],
        capture_output=True,
        text=True,
        timeout=100,
        env={**kept, **environ},
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout) if code == 0 else done.stderr


class Poller:
    """An agent without a socket, that keeps every lease it was ever given."""

    def __init__(self, client: httpx2.AsyncClient, instance_id: str) -> None:
        self._client = client
        self.instance_id = instance_id

    async def claim(self, count: int) -> dict[str, dict[str, Any]]:
        """Take so many tasks, and return them by id."""
        found: dict[str, dict[str, Any]] = {}
        while len(found) < count:
            answer = await self._client.post(f"/api/v1/agents/session/{self.instance_id}/claim?wait=20&limit={count}")
            assert answer.status_code == 200, answer.text
            tasks = answer.json()["tasks"]
            assert tasks, "no work came"
            found |= {task["task_id"]: task for task in tasks}
        return found

    async def done(self, task: dict[str, Any], session: str = "") -> tuple[int, str]:
        """Report a task as completed; returns the status and the problem's code."""
        body = {
            "op": "report",
            "id": 1,
            "done": [
                {"task_id": task["task_id"], "lease_token": task["lease_token"], "outcome": "completed", "result": 1}
            ],
        }
        answer = await self._client.post(f"/api/v1/agents/session/{session or self.instance_id}/report", json=body)
        return answer.status_code, answer.json().get("code", "")


async def credential(server: RunningServer) -> str:
    """Register the agent and return its credential."""
    headers = {"Authorization": f"Bearer {await server.enrolment_token()}"}
    async with httpx2.AsyncClient(base_url=server.url, headers=headers) as client:
        answer = await client.post("/api/v1/agents/register", json=SPEC)
    assert answer.status_code == 201, answer.text
    found: str = answer.json()["credential"]
    return found


@asynccontextmanager
async def poller(server: RunningServer, secret: str, instance_id: str | None = None) -> AsyncIterator[Poller]:
    """Open a session, resuming the instance where the server lets it."""
    headers = {"Authorization": f"Bearer {secret}"}
    async with httpx2.AsyncClient(base_url=server.url, headers=headers, timeout=30) as client:
        hello = {"op": "hello", "agent": SPEC, "instance_id": instance_id}
        answer = await client.post("/api/v1/agents/session", json=hello)
        assert answer.status_code == 200, answer.text
        yield Poller(client, answer.json()["instance_id"])


def fence(task: dict[str, Any]) -> tuple[int, ...]:
    """Return the fence of a task as numbers that compare."""
    return tuple(int(part) for part in task["fence"].split("."))
