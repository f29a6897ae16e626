"""A finished run as a file: taken in elsewhere as it ended, and run again."""

import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from mcp_control.pipelines.definition import to_json
from mcp_control.testing.server import RunningServer, running_server
from tests.archive.support import create, mcpctl, place_of
from tests.integration.pipelines import checksums, completed, parts_pipeline, started
from tests.integration.support import AgentProcess

API = "/api/v1"


class Exported:
    """A server with a run that has ended, and its bundle."""

    def __init__(
        self, server: RunningServer, client: httpx2.AsyncClient, run_id: str, bundle: Path, given: str
    ) -> None:
        self.server = server
        self.client = client
        self.run_id = run_id
        self.bundle = bundle
        self.given = given


def client_of(server: RunningServer) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=server.url, headers=server.headers, timeout=60)


def person(server: RunningServer) -> dict[str, str]:
    return {"MCP_CONTROL_URL": server.url, "MCP_CONTROL_TOKEN": server.admin_token}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def exported(tmp_path_factory: pytest.TempPathFactory, backend: str) -> AsyncIterator[Exported]:
    """A run of the parts pipeline whose parameter names an input artifact."""
    folder = tmp_path_factory.mktemp("origin")
    async with running_server(folder) as server, client_of(server) as client:
        with AgentProcess(folder, "worker", server.url, await server.enrolment_token(), slots=4):
            answer = await client.post(
                f"{API}/pipelines", content=to_json(parts_pipeline()), headers={"Content-Type": "application/json"}
            )
            assert answer.status_code in (200, 201), answer.text
            given = (await client.post(f"{API}/artifacts?name=in.txt&role=input", content=b"what comes in")).json()[
                "id"
            ]
            run_id = await started(client, "parts", {"seed": given, "parts": 3}, "once")
            await completed(client, run_id, 60)
        bundle = folder / "one.mcprun"
        told = await mcpctl("runs", "export", run_id, "--output", str(bundle), "--json", **person(server))
        assert told["run"] == run_id
        yield Exported(server, client, run_id, bundle, given)


async def contents(client: httpx2.AsyncClient, run_id: str) -> tuple[Any, dict[str, Any], dict[str, bytes]]:
    """Return what a run is to its readers, without ids and times of change: the run, its tasks by place, its artifacts' bytes."""
    run = (await client.get(f"{API}/runs/{run_id}")).json()
    tasks = {}
    for item in (await client.get(f"{API}/runs/{run_id}/tasks?limit=500")).json()["items"]:
        task = (await client.get(f"{API}/tasks/{item['id']}")).json()
        place = f"{task['stage']}/{task.get('item')}"
        tasks[place] = {name: task.get(name) for name in ("type", "state", "attempt", "finished_at", "agent_id")}
    files = {}
    for item in (await client.get(f"{API}/runs/{run_id}/artifacts?limit=500")).json()["items"]:
        files[item["name"]] = (await client.get(f"{API}/artifacts/{item['id']}/content")).content
    kept = ("pipeline", "state", "created_at", "finished_at", "progress")
    return {name: run[name] for name in kept}, tasks, files


@pytest.mark.asyncio(loop_scope="module")
async def test_a_run_taken_in_elsewhere_is_what_it_was(exported: Exported, tmp_path: Path) -> None:
    """It appears finished under its own id, with its tasks, outputs and readable artifacts; once more, it gets ids of its own."""
    before = await contents(exported.client, exported.run_id)
    assert before[2], "the run made no artifacts"
    async with running_server(tmp_path) as server, client_of(server) as client:
        first = await mcpctl("runs", "import", str(exported.bundle), "--json", **person(server))
        assert (first["id"], first["state"]) == (exported.run_id, "completed")
        assert await contents(client, exported.run_id) == before
        assert (await client.get(f"{API}/artifacts/{exported.given}/content")).content == b"what comes in"

        again = await mcpctl("runs", "import", str(exported.bundle), "--json", **person(server))
        assert again["id"] != exported.run_id
        assert await contents(client, again["id"]) == before
        for stage in ("make", "final"):
            output = (await client.get(f"{API}/runs/{again['id']}/stages/{stage}/output")).json()
            artifact = (await client.get(f"{API}/artifacts/{output['artifact']}")).json()
            assert (artifact["run_id"], artifact["sha256"]) == (again["id"], output["sha256"])
        assert again["params"]["seed"] == exported.given
        names = (await client.get(f"{API}/pipelines")).json()["items"]
        assert [(one["name"], one["version"]) for one in names] == [("parts", 1)]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_bundle_can_be_run_again_elsewhere(exported: Exported, tmp_path: Path) -> None:
    """A replay is a new run of the same version with the same inputs, and comes to the same results."""
    async with running_server(tmp_path) as server, client_of(server) as client:
        with AgentProcess(tmp_path, "worker", server.url, await server.enrolment_token(), slots=4):
            told = await mcpctl("runs", "import", str(exported.bundle), "--replay", "--json", **person(server))
            assert told["run"]["id"] == exported.run_id
            assert told["replay"]["id"] != exported.run_id
            await completed(client, told["replay"]["id"], 60)
        expected = await checksums(exported.client, exported.run_id)
        assert await checksums(client, told["replay"]["id"]) == expected


@pytest.mark.asyncio(loop_scope="module")
async def test_a_damaged_or_foreign_bundle_changes_nothing(exported: Exported, tmp_path: Path) -> None:
    """A flipped byte in any part, a file that is cut off and a backup are refused with `bundle-damaged`, and nothing is written."""
    whole = exported.bundle.read_bytes()
    with tarfile.open(exported.bundle) as archive:
        places = [entry.offset_data + entry.size // 2 for entry in archive if entry.size]
    async with running_server(tmp_path) as server, client_of(server) as client:
        backup = tmp_path / "all.mcpbackup"
        await create(place_of(tmp_path), backup)
        newest = server.services.broadcaster.newest
        bad = [whole[: len(whole) // 2], b"", b"{}" * 1000, backup.read_bytes()]
        for at in places:
            flipped = bytearray(whole)
            flipped[at] ^= 4
            bad.append(bytes(flipped))
        for body in bad:
            answer = await client.post(
                f"{API}/runs/import", content=body, headers={"Content-Type": "application/octet-stream"}
            )
            assert answer.status_code == 422, answer.text
            assert [error["code"] for error in answer.json()["errors"]] == ["bundle-damaged"]
        assert server.services.broadcaster.newest == newest
        assert (await client.get(f"{API}/runs")).json()["items"] == []
        assert not list((tmp_path / "data").glob("bundle-*"))


@pytest.mark.asyncio(loop_scope="module")
async def test_only_a_run_that_has_ended_can_be_exported(exported: Exported) -> None:
    """A run that still waits answers 409, one that is not there 404."""
    client = exported.client
    running = await started(client, "parts", {"seed": "x", "parts": 1}, "waits")
    assert (await client.get(f"{API}/runs/{running}/bundle")).status_code == 409
    assert (await client.get(f"{API}/runs/run_0/bundle")).status_code == 404
    await client.post(f"{API}/runs/{running}/cancel")
