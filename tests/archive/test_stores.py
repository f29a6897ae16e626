"""Backups and moves between the two kinds of store: what arrives is what was sent."""

import asyncio
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pymongo
import pytest

from mcp_control.app import KINDS
from mcp_control.archive.backup import verify
from mcp_control.archive.migrate import FLEETING, migrate
from mcp_control.cli.errors import CONFLICT, USAGE
from mcp_control.coordination.model import Node
from mcp_control.kernel.errors import StoreUnavailable
from mcp_control.offline import Place, in_database, in_folder
from mcp_control.storage.mongo.store import MongoStore
from mcp_control.testing.server import running_server
from tests.archive.support import content, create, credential, fence, mcpctl, poller, quiet, restored

BEFORE = Node(id="before", name="elder", software="0.0.9", started_at=0, until=1 << 50)


async def filled(folder: Path) -> dict[str, Any]:
    """Run a server on a data folder and give it a bit of everything; returns ids."""
    async with (
        running_server(folder) as server,
        httpx2.AsyncClient(base_url=server.url, headers=server.headers) as client,
    ):
        secret = await credential(server)
        async with poller(server, secret) as agent:
            await client.post("/api/v1/tasks", json={"type": "polled"})
            held = await agent.claim(1)
            await client.post("/api/v1/tasks", json={"type": "polled"})
            done = (await agent.claim(1)).popitem()[1]
            assert await agent.done(done) == (200, "")
            large = {"text": "x" * 200_000}
            waiting = [(await client.post("/api/v1/tasks", json={"type": "later", "payload": large})).json()["id"]]
            for number in range(30):
                answer = await client.post("/api/v1/tasks", json={"type": "later", "payload": number})
                waiting.append(answer.json()["id"])
            artifact = (await client.post("/api/v1/artifacts?name=a", content=b"bytes" * 300_000)).json()["id"]
            instance = agent.instance_id
    return {"secret": secret, "held": held, "waiting": waiting, "artifact": artifact, "instance": instance}


async def equal(one: Place, other: Place) -> None:
    """Compare two stores wholly, but for what servers keep of themselves."""
    entities, facts = await content(one)
    others, other_facts = await content(other)
    plain = {
        key: (entity.version, {k: v for k, v in entity.index.items() if v is not None}, entity.hot, dict(entity.cold))
        for key, entity in entities.items()
        if key[0] not in FLEETING
    }
    other_plain = {
        key: (entity.version, {k: v for k, v in entity.index.items() if v is not None}, entity.hot, dict(entity.cold))
        for key, entity in others.items()
        if key[0] not in FLEETING
    }
    assert plain == other_plain
    assert facts == other_facts


async def moved(source: Place, target: Place, *, replace: bool = False) -> Any:
    """Move a store that no server uses."""

    async def wait(error: StoreUnavailable) -> None:
        raise error

    return await migrate(
        source.archive,
        source.blobs,
        target.archive,
        target.own_blobs,
        KINDS,
        replace=replace,
        wait=wait,
        progress=quiet,
    )


async def test_a_store_moved_there_and_back_is_the_same(tmp_path: Path, mongo_uri: str) -> None:
    """SQLite to MongoDB and back: every entity with its version and parts, every event with its place, every blob."""
    made = await filled(tmp_path / "one")
    here, there, back = (
        in_folder(tmp_path / "one" / "data"),
        in_database(mongo_uri),
        in_folder(tmp_path / "two" / "data"),
    )
    told = await moved(here, there)
    assert told.blobs == 1
    await equal(here, there)
    await moved(there, back)
    await equal(here, back)
    with pytest.raises(StoreUnavailable, match="holds a store already"):
        await moved(here, there)

    async with (
        running_server(tmp_path / "two") as server,
        httpx2.AsyncClient(base_url=server.url, headers=server.headers) as client,
    ):
        content_url = f"/api/v1/artifacts/{made['artifact']}/content"
        assert (await client.get(content_url)).content == b"bytes" * 300_000
        async with poller(server, made["secret"], made["instance"]) as agent:
            assert agent.instance_id == made["instance"], "the session was not taken up"
            for task in made["held"].values():
                assert await agent.done(task) == (200, ""), "a lease did not survive the move"


async def test_a_backup_of_one_kind_of_store_restores_into_the_other(tmp_path: Path, mongo_uri: str) -> None:
    """SQLite's backup into MongoDB, and MongoDB's of that into SQLite: entities and events are the same but for what a restore changes."""
    made = await filled(tmp_path / "one")
    there, back = in_database(mongo_uri), in_folder(tmp_path / "two" / "data")
    first, second = tmp_path / "one.mcpbackup", tmp_path / "two.mcpbackup"
    await create(in_folder(tmp_path / "one" / "data"), first)
    generation = await restored(first, there)
    await create(there, second)
    assert verify(second, quiet)[0].store == "mongodb"
    assert await restored(second, back) > generation
    entities, facts = await content(in_folder(tmp_path / "one" / "data"))
    others, other_facts = await content(back)
    assert others.keys() - entities.keys() == {("generation", "current")}
    assert entities.keys() <= others.keys()
    assert [fact for fact in other_facts if fact.seq <= facts[-1].seq] == facts
    large = made["waiting"][0]
    assert others["task", large].cold == entities["task", large].cold
    for task_id, task in made["held"].items():
        assert str(others["task", task_id].index["state"]) == "queued"
        assert fence(task) < (generation, 0)


async def test_no_server_opens_a_store_that_is_not_whole(tmp_path: Path, mongo_uri: str) -> None:
    """A load that breaks off leaves a folder without a store, and a database that every server refuses; repeating it helps."""
    await filled(tmp_path / "one")
    here, there, folder = in_folder(tmp_path / "one" / "data"), in_database(mongo_uri), in_folder(tmp_path / "two")

    async def broken_off(place: Place) -> None:
        async with place.archive.loading(KINDS, replace=False) as loading, here.archive.snapshot() as snapshot:
            async for page in snapshot.entities("task"):
                await loading.put("task", page)
            raise ZeroDivisionError

    for place in (there, folder):
        with pytest.raises(ZeroDivisionError):
            await broken_off(place)
    assert not list((tmp_path / "two").glob("store*"))
    store = MongoStore(mongo_uri, node="n")
    with pytest.raises(StoreUnavailable, match="broken off"):
        await store.open(KINDS, lambda facts: None)
    await moved(here, there)
    await store.open(KINDS, lambda facts: None)
    await store.close()


async def test_a_store_moves_while_its_server_works(tmp_path: Path, mongo_uri: str) -> None:
    """What is accepted between the copy and the stop of the server arrives; the move ends by itself when the server has stopped."""
    folder = tmp_path / "one"
    await filled(folder)
    copied = asyncio.Event()
    async with (
        running_server(folder) as server,
        httpx2.AsyncClient(base_url=server.url, headers=server.headers) as client,
    ):
        here, there = in_folder(folder / "data"), in_database(mongo_uri)

        async def wait(_: StoreUnavailable) -> None:
            copied.set()
            await asyncio.sleep(0.05)

        moving = asyncio.create_task(
            migrate(
                here.archive,
                here.blobs,
                there.archive,
                there.own_blobs,
                KINDS,
                replace=False,
                wait=wait,
                progress=quiet,
            )
        )
        await asyncio.wait_for(copied.wait(), 30)
        late = (await client.post("/api/v1/tasks", json={"type": "late"})).json()["id"]
        artifact = (await client.post("/api/v1/artifacts?name=b", content=b"late bytes")).json()
    told = await asyncio.wait_for(moving, 60)
    assert told.late >= 2
    await equal(here, there)
    entities, _ = await content(there)
    assert ("task", late) in entities
    async with there.blobs() as blobs:
        assert b"".join([chunk async for chunk in blobs.read(artifact["sha256"])]) == b"late bytes"


async def test_what_an_earlier_version_left_goes_when_its_last_server_has_gone(tmp_path: Path, mongo_uri: str) -> None:
    """`contract-store` names it and removes it beside servers of this version; never beside others, and only when told to."""
    environ = {"MONGODB_URI": mongo_uri, "MCP_CONTROL_DATA": str(tmp_path)}
    async with running_server(tmp_path / "one", mongo__uri=mongo_uri):
        with pymongo.MongoClient[dict[str, Any]](mongo_uri) as client:
            database = client.get_default_database()
            database["task"].create_index("i.old", name="task_old:old")
            database["node"].insert_one(
                {"_id": "before", "v": 1, "i": {"until": 1 << 50}, "h": msgspec.msgpack.encode(BEFORE)}
            )
            refused = await mcpctl("contract-store", "--json", "--yes", code=CONFLICT, **environ)
            assert "elder (0.0.9)" in refused
            database["node"].delete_one({"_id": "before"})
            seen = await mcpctl("contract-store", "--dry-run", "--json", **environ)
            assert (seen["surplus"], seen["removed"]) == (["task.task_old:old"], [])
            await mcpctl("contract-store", "--no-input", code=USAGE, **environ)
            assert "task_old:old" in database["task"].index_information()
            done = await mcpctl("contract-store", "--yes", "--json", **environ)
            assert done["removed"] == ["task.task_old:old"]
            assert "task_old:old" not in database["task"].index_information()
    await mcpctl("contract-store", "--store", f"sqlite:{tmp_path}", code=USAGE)
