"""Blobs in MongoDB keep the promises of the port, on several servers at once and when one of them dies."""

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from mcp_control.kernel.errors import StoreUnavailable
from mcp_control.storage.mongo.blobs import GridFsBlobs
from mcp_control.storage.mongo.client import Database, connect, database_of
from mcp_control.storage.ports import Blobs
from mcp_control.testing.blobs_conformance import *  # noqa: F403  the tests of the port
from mcp_control.testing.databases import MongoSet

PIECE = 1 << 20


@pytest.fixture
async def database(mongo_uri: str) -> AsyncIterator[Database]:
    async with connect(mongo_uri, name="tests") as client:
        yield database_of(client)


@pytest.fixture
def blobs_factory(database: Database) -> Callable[[], Awaitable[Blobs]]:
    async def make() -> Blobs:
        return GridFsBlobs(database)

    return make


async def _bytes(blobs: Blobs, digest: str, start: int = 0, length: int | None = None) -> bytes:
    return b"".join([chunk async for chunk in blobs.read(digest, start, length)])


async def _once(data: bytes, size: int = 300_000) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


async def _left(database: Database) -> dict[str, int]:
    """How many documents of each collection there are."""
    return {name: await database[f"blobs.{name}"].count_documents({}) for name in ("files", "chunks", "uploads")}


@pytest.mark.parametrize("size", [PIECE - 1, PIECE, 4 * PIECE, 4 * PIECE + 1, 11 * PIECE + 5])
async def test_any_range_of_a_large_blob_is_read(database: Database, size: int) -> None:
    """Bounds of pieces and messages do not show, and a range costs the pieces that hold it."""
    blobs = GridFsBlobs(database)
    data = secrets.token_bytes(size)
    info = await blobs.put(_once(data, 900_001), size)
    assert (await _left(database)) == {"files": 1, "chunks": -(-size // PIECE), "uploads": 0}
    assert hashlib.sha256(await _bytes(blobs, info.sha256)).hexdigest() == info.sha256
    for start in (0, 1, PIECE - 1, PIECE, size // 2, size - 1, size, size + 5):
        for length in (0, 1, PIECE, PIECE + 1, None):
            wanted = data[start:] if length is None else data[start : start + length]
            assert await _bytes(blobs, info.sha256, start, length) == wanted


async def test_a_range_is_read_through_the_index(database: Database) -> None:
    """The last bytes of a blob are found without looking at the ones before."""
    blobs = GridFsBlobs(database)
    info = await blobs.put(_once(secrets.token_bytes(9 * PIECE)), 10 * PIECE)
    file = await database["blobs.files"].find_one({"filename": info.sha256})
    assert file is not None
    plan = await database.command(
        "explain",
        {
            "find": "blobs.chunks",
            "filter": {"files_id": file["_id"], "n": {"$gte": 8, "$lt": 12, "$lte": 8}},
            "sort": {"n": 1},
        },
        verbosity="executionStats",
    )
    assert plan["executionStats"]["totalDocsExamined"] == 1


async def test_two_servers_that_store_equal_content_keep_it_once(database: Database) -> None:
    """The pieces of the second upload are gone, and either may read."""
    servers = [GridFsBlobs(database) for _ in range(4)]
    data = secrets.token_bytes(5 * PIECE)
    infos = await asyncio.gather(*(blobs.put(_once(data), len(data)) for blobs in servers))
    assert len(set(infos)) == 1
    assert await _left(database) == {"files": 1, "chunks": 5, "uploads": 0}
    assert await _bytes(servers[3], infos[0].sha256) == data


@pytest.mark.parametrize("pieces", [1, 9])
async def test_an_upload_that_breaks_off_leaves_no_piece(database: Database, pieces: int) -> None:
    """Neither an error of the stream nor cancellation leaves anything."""
    blobs = GridFsBlobs(database)
    going = asyncio.Event()

    async def endless(end: Exception | None) -> AsyncIterator[bytes]:
        yield secrets.token_bytes(pieces * PIECE)
        going.set()
        if end is not None:
            raise end
        await asyncio.Event().wait()

    with pytest.raises(ConnectionResetError):
        await blobs.put(endless(ConnectionResetError()), 100 * PIECE)
    going.clear()
    task = asyncio.create_task(blobs.put(endless(None), 100 * PIECE))
    await going.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await _left(database) == {"files": 0, "chunks": 0, "uploads": 0}


async def test_pieces_of_a_dead_server_are_swept_and_living_uploads_are_not(database: Database) -> None:
    """What was silent since the moment given goes; what still sends stays, and finishes."""
    blobs = GridFsBlobs(database)
    data = secrets.token_bytes(9 * PIECE)
    half, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield data[: 5 * PIECE]
        half.set()
        await go_on.wait()
        yield data[5 * PIECE :]

    task = asyncio.create_task(blobs.put(slow(), len(data)))
    await half.wait()
    await blobs.sweep(round(time.time() * 1000) - 3_600_000)
    go_on.set()
    info = await task
    assert await _bytes(blobs, info.sha256) == data
    assert await blobs.delete(info.sha256)

    half, go_on = asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(blobs.put(slow(), len(data)))
    await half.wait()
    assert (await _left(database))["chunks"] > 0
    await blobs.sweep(round(time.time() * 1000) + 3_600_000)
    assert await _left(database) == {"files": 0, "chunks": 0, "uploads": 0}
    go_on.set()
    with pytest.raises(StoreUnavailable, match="given up"):  # it was not dead after all, but its pieces are gone
        await task
    assert await _left(database) == {"files": 0, "chunks": 0, "uploads": 0}


async def test_deletion_that_a_crash_interrupted_is_finished_by_the_sweep(
    mongo_set: MongoSet, database: Database
) -> None:
    """The name goes first; the pieces are still known."""
    blobs = GridFsBlobs(database)
    info = await blobs.put(_once(secrets.token_bytes(5 * PIECE)), 10 * PIECE)
    await asyncio.to_thread(mongo_set.fail_command, "find", skip=1, errorCode=96)
    with pytest.raises(StoreUnavailable):
        await blobs.delete(info.sha256)
    await asyncio.to_thread(mongo_set.clear_failures)
    assert await _left(database) == {"files": 0, "chunks": 5, "uploads": 1}
    await blobs.sweep(round(time.time() * 1000) + 3_600_000)
    assert await _left(database) == {"files": 0, "chunks": 0, "uploads": 0}


async def test_a_change_of_primary_does_not_break_an_upload_or_a_download(
    mongo_set: MongoSet, database: Database
) -> None:
    """The driver repeats what the old primary did not acknowledge."""
    blobs = GridFsBlobs(database)
    data = secrets.token_bytes(12 * PIECE)

    async def disturbed() -> AsyncIterator[bytes]:
        yield data[: 6 * PIECE]
        await asyncio.to_thread(mongo_set.step_down)
        yield data[6 * PIECE :]

    info = await blobs.put(disturbed(), len(data))
    read = bytearray()
    async for chunk in blobs.read(info.sha256):
        read += chunk
        if len(read) == 4 * PIECE:
            await asyncio.to_thread(mongo_set.step_down, 2)
    assert read == data
