"""Backups of a data folder: consistent while a server runs, checked to the last byte, restored whole or not at all."""

import asyncio
import shutil
import tarfile
from pathlib import Path

import httpx2
import pytest

from mcp_control.archive import backup
from mcp_control.archive.model import BackupDamaged
from mcp_control.kernel.errors import StoreUnavailable
from mcp_control.offline import in_folder
from mcp_control.testing.server import ServerProcess, running_server
from tests.archive.support import content, create, credential, fence, mcpctl, name_of, place_of, poller, quiet, restored


@pytest.mark.long_on_cluster
async def test_a_backup_under_load_holds_one_moment_with_everything_acknowledged_before(
    tmp_path: Path, backend: str
) -> None:
    """What was acknowledged before the backup began is in it; what is in it fits together; and a restored server has it."""
    original = ServerProcess(tmp_path / "one").start()
    acknowledged: dict[str, int] = {}
    stop, enough = asyncio.Event(), asyncio.Event()

    async def load(client: httpx2.AsyncClient) -> None:
        while not stop.is_set():
            number = len(acknowledged)
            answer = await client.post("/api/v1/tasks", json={"type": "echo", "payload": number})
            if answer.status_code == 201:
                acknowledged[answer.json()["id"]] = number
            if len(acknowledged) >= 200:
                enough.set()

    path = tmp_path / "one.mcpbackup"
    try:
        async with httpx2.AsyncClient(base_url=original.url, headers=original.headers, timeout=30) as client:
            data = bytes(range(256)) * 40_000
            artifact = (await client.post("/api/v1/artifacts?name=data.bin", content=data)).json()
            loads = [asyncio.create_task(load(client)) for _ in range(4)]
            await asyncio.wait_for(enough.wait(), 60)
            before = list(acknowledged)
            told = await mcpctl(
                "backup", "create", "--store", name_of(tmp_path / "one"), "--output", str(path), "--json"
            )
            at_end = len(acknowledged)
            stop.set()
            await asyncio.gather(*loads)
    finally:
        original.kill()
    assert at_end > len(before), "nothing was submitted while the backup was made"
    assert path.stat().st_mode & 0o777 == 0o600
    sound = await mcpctl("backup", "verify", str(path), "--json")
    assert sound["entities"] == told["entities"]

    place = place_of(tmp_path / "two")
    await mcpctl("backup", "restore", str(path), "--store", name_of(tmp_path / "two"), "--json")
    entities, facts = await content(place)
    tasks = {task_id for kind, task_id in entities if kind == "task"}
    assert set(before) <= tasks <= set(acknowledged)
    assert {fact.fact.subject for fact in facts if fact.fact.type == "task.queued"} == tasks
    assert [fact.seq for fact in facts] == list(range(1, len(facts) + 1))
    async with (
        running_server(tmp_path / "two") as server,
        httpx2.AsyncClient(base_url=server.url, headers=server.headers) as client,
    ):
        for task_id in before[::20]:
            assert (await client.get(f"/api/v1/tasks/{task_id}")).json()["payload"] == acknowledged[task_id]
        assert (await client.get(f"/api/v1/artifacts/{artifact['id']}/content")).content == data


@pytest.mark.embedded
async def test_a_flipped_byte_in_any_part_is_found_and_the_part_named(tmp_path: Path, backend: str) -> None:
    """Whichever part is damaged, `verify` names it and ends with exit code 1; a file that is cut off is no backup."""
    async with (
        running_server(tmp_path) as server,
        httpx2.AsyncClient(base_url=server.url, headers=server.headers) as client,
    ):
        for n in range(20):
            await client.post("/api/v1/tasks", json={"type": "echo", "payload": {"n": n}})
        await client.post("/api/v1/artifacts?name=data.bin", content=b"some data" * 1000)
        path = tmp_path / "sound.mcpbackup"
        await create(in_folder(tmp_path / "data"), path)
    whole = path.read_bytes()
    backup.verify(path, quiet)
    with tarfile.open(path) as archive:
        parts = [(entry.name, entry.offset, entry.offset_data, entry.size) for entry in archive]
    assert {"header.json", "entities/task/00000001.zst", "facts/00000001.zst", "manifest.json"} <= {
        name for name, *_ in parts
    }
    for number, (name, offset, start, size) in enumerate(parts):
        for at in {start, start + size // 2, start + size - 1, offset + 100}:
            damaged = bytearray(whole)
            damaged[at] ^= 0x10
            path.write_bytes(damaged)
            with pytest.raises(BackupDamaged) as found:
                backup.verify(path, quiet)
            named = {name, parts[number - 1][0]} if at < start else {name}
            if name == "manifest.sha256":
                named.add("manifest.json")
            assert any(one in found.value.where for one in named) or number == 0, (name, at, str(found.value))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BackupDamaged):
        backup.verify(path, quiet)
    path.write_bytes(b"no backup at all" * 1000)
    with pytest.raises(BackupDamaged):
        backup.verify(path, quiet)
    name, _, start, size = next(part for part in parts if part[0].startswith("blobs/"))
    damaged = bytearray(whole)
    damaged[start + size // 2] ^= 1
    path.write_bytes(damaged)
    assert name in await mcpctl("backup", "verify", str(path), code=1)


@pytest.mark.long_on_cluster
async def test_a_restore_is_whole_or_nothing_and_keeps_off_a_store_in_use(tmp_path: Path, backend: str) -> None:
    """A damaged backup, a store that is not empty and a running server each leave the store as it was."""
    place = place_of(tmp_path)
    path = tmp_path / "one.mcpbackup"
    async with (
        running_server(tmp_path) as server,
        httpx2.AsyncClient(base_url=server.url, headers=server.headers) as client,
    ):
        await client.post("/api/v1/tasks", json={"type": "before"})
        await create(place, path)
        await client.post("/api/v1/tasks", json={"type": "after"})
        refused = await mcpctl(
            "backup", "restore", str(path), "--store", name_of(tmp_path), "--replace", "--yes", code=5
        )
        assert "is in use by" in refused
    before = await content(place)
    with pytest.raises(StoreUnavailable, match="holds a store already"):
        await restored(path, place)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 3] ^= 0x10
    bad = tmp_path / "bad.mcpbackup"
    bad.write_bytes(damaged)
    with pytest.raises(BackupDamaged):
        await restored(bad, place, replace=True)
    assert await content(place) == before
    await restored(path, place, replace=True)
    if backend == "embedded":
        assert sorted(one.name for one in (tmp_path / "data").glob("store*")) == ["store.db"]
    types = {str(entity.index["type"]) for (kind, _), entity in (await content(place))[0].items() if kind == "task"}
    assert types == {"before"}


async def test_a_restore_voids_every_lease_of_then_and_fences_go_on_growing(tmp_path: Path, backend: str) -> None:
    """Fault row 27: stale calls get 409 `lease-superseded`, and no fence is given twice, not even one the backup never knew."""
    place = place_of(tmp_path)
    path = tmp_path / "one.mcpbackup"
    async with (
        running_server(tmp_path) as server,
        httpx2.AsyncClient(base_url=server.url, headers=server.headers) as client,
    ):
        secret = await credential(server)
        async with poller(server, secret) as agent:
            old_instance = agent.instance_id
            await client.post("/api/v1/tasks", json={"type": "polled"})
            held = await agent.claim(1)  # when the backup is made, it is held
            waiting = (await client.post("/api/v1/tasks", json={"type": "polled"})).json()["id"]
            await create(place, path)
            later = await agent.claim(1)  # of this lease the backup knows nothing
            assert list(later) == [waiting]
    old = held | later
    generation = await restored(path, place, replace=True)
    async with running_server(tmp_path) as server, poller(server, secret, old_instance) as agent:
        assert agent.instance_id != old_instance
        for task in old.values():
            assert await agent.done(task, session=old_instance) == (409, "lease-superseded")
            assert await agent.done(task) == (409, "lease-superseded")
        again = await agent.claim(2)
        assert again.keys() == old.keys()
        for task_id, task in again.items():
            assert fence(task) > fence(old[task_id])
            assert await agent.done(old[task_id]) == (409, "lease-superseded")
            assert await agent.done(task) == (200, "")
        entity = (await server.services.store.get("task", list(held)))[0]
        assert entity is not None
        async with httpx2.AsyncClient(base_url=server.url, headers=server.headers) as client:
            view = (await client.get(f"/api/v1/tasks/{next(iter(held))}")).json()
            assert [attempt["outcome"] for attempt in view["attempts"]] == ["restored", "completed"]
            new = (await client.post("/api/v1/tasks", json={"type": "other"})).json()
            assert fence(new)[0] == generation
    # The same backup once more: the histories that were lost meanwhile gave fences, too.
    assert await restored(path, place_of(tmp_path / "twice")) > generation


@pytest.mark.long_on_cluster
@pytest.mark.embedded
async def test_without_a_new_generation_a_stale_lease_would_be_honoured(tmp_path: Path, backend: str) -> None:
    """The negative control: where the database is only copied back, the old report counts and a fence is given twice."""
    async with (
        running_server(tmp_path) as server,
        httpx2.AsyncClient(base_url=server.url, headers=server.headers) as client,
    ):
        secret = await credential(server)
        async with poller(server, secret) as agent:
            old_instance = agent.instance_id
            await client.post("/api/v1/tasks", json={"type": "polled"})
            held = await agent.claim(1)
            await client.post("/api/v1/tasks", json={"type": "polled"})
            shutil.copytree(tmp_path / "data", tmp_path / "copied" / "data")
            later = await agent.claim(1)
    async with running_server(tmp_path / "copied") as server, poller(server, secret, old_instance) as agent:
        again = await agent.claim(2)
        for task_id, task in later.items():
            assert fence(again[task_id]) == fence(task)
            assert again[task_id]["lease_token"] != task["lease_token"]
        for task in held.values():
            assert await agent.done(task) == (200, "")


async def test_a_task_that_may_start_once_is_not_started_again_by_a_restore(tmp_path: Path, backend: str) -> None:
    """Held tasks with one attempt fail with the code `lost`; those that somebody asked to cancel end cancelled."""
    place = place_of(tmp_path)
    path = tmp_path / "one.mcpbackup"
    async with (
        running_server(tmp_path) as server,
        httpx2.AsyncClient(base_url=server.url, headers=server.headers) as client,
    ):
        secret = await credential(server)
        async with poller(server, secret) as agent:
            once = await client.post("/api/v1/tasks", json={"type": "polled", "retry": {"max_attempts": 1}})
            unwanted = await client.post("/api/v1/tasks", json={"type": "polled"})
            await agent.claim(2)
            await client.post(f"/api/v1/tasks/{unwanted.json()['id']}/cancel")
            await create(place, path)
    await restored(path, place, replace=True)
    async with (
        running_server(tmp_path) as server,
        httpx2.AsyncClient(base_url=server.url, headers=server.headers) as client,
    ):
        failed = (await client.get(f"/api/v1/tasks/{once.json()['id']}")).json()
        cancelled = (await client.get(f"/api/v1/tasks/{unwanted.json()['id']}")).json()
    assert (failed["state"], failed["reason"]) == ("failed", "lost")
    assert cancelled["state"] == "cancelled"


@pytest.mark.long_on_cluster
async def test_blobs_may_be_left_out_and_are_then_taken_from_the_folder(tmp_path: Path, backend: str) -> None:
    """A backup without blobs is small, says so, and restores over a folder that still holds them."""
    place = place_of(tmp_path)
    path = tmp_path / "one.mcpbackup"
    async with (
        running_server(tmp_path) as server,
        httpx2.AsyncClient(base_url=server.url, headers=server.headers) as client,
    ):
        artifact = (await client.post("/api/v1/artifacts?name=a", content=b"kept")).json()
        manifest = await create(place, path, blobs=False)
    assert manifest.blobs_left_out
    assert manifest.blobs == []
    await restored(path, place, replace=True)
    async with (
        running_server(tmp_path) as server,
        httpx2.AsyncClient(base_url=server.url, headers=server.headers) as client,
    ):
        assert (await client.get(f"/api/v1/artifacts/{artifact['id']}/content")).content == b"kept"
