"""What the adapters of one server promise beyond their ports: bounds, order of files on disk, and memory."""

import asyncio
import gc
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from mcp_control.kernel.errors import StorageFull
from mcp_control.storage.local.blobs import FolderBlobs
from mcp_control.storage.local.bus import LocalBus
from mcp_control.storage.local.cache import LocalCache
from mcp_control.storage.local.queue import LocalQueue
from mcp_control.storage.ports import Queued
from mcp_control.testing.clock import FakeClock


async def _stream(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def test_the_least_recently_used_value_goes_first() -> None:
    """A full cache forgets what was not used for longest."""
    cache = LocalCache(FakeClock(), max_entries=2)
    await cache.set("a", b"1", 10)
    await cache.set("b", b"2", 10)
    await cache.get("a")
    await cache.set("c", b"3", 10)
    assert [await cache.get(key) for key in "abc"] == [b"1", None, b"3"]


async def test_the_cache_is_bounded_in_bytes() -> None:
    """Values never sum up to more than the bound; one that is larger than all of it is not kept."""
    cache = LocalCache(FakeClock(), max_bytes=10)
    await cache.set("a", b"x" * 6, 10)
    await cache.set("b", b"x" * 5, 10)
    assert [await cache.get(key) for key in "ab"] == [None, b"x" * 5]
    await cache.set("huge", b"x" * 11, 10)
    assert await cache.get("huge") is None
    await cache.set("b", b"x" * 9, 10)
    await cache.set("b", b"x" * 10, 10)
    assert await cache.get("b") == b"x" * 10


async def test_a_jump_of_the_wall_clock_ends_no_value() -> None:
    """Values live by monotonic time."""
    clock = FakeClock()
    cache = LocalCache(clock)
    await cache.set("a", b"1", 10)
    clock.set_wall(clock.now() + 3_600_000)
    assert await cache.get("a") == b"1"


async def test_entries_that_left_a_lane_do_not_stay_in_memory() -> None:
    """Removing and replacing for ever does not let a lane grow."""
    queue = LocalQueue()
    await queue.push([Queued("l", "stays", 9000)])
    for turn in range(5000):
        await queue.push([Queued("l", "again", turn), Queued("l", f"gone{turn}", turn)])
        await queue.remove("l", [f"gone{turn}"])
    (lane,) = queue._lanes.values()
    assert len(lane.heap) < 200
    assert [entry.id for entry in await queue.take("l", 9)] == ["again", "stays"]


async def test_a_dropped_subscription_is_forgotten() -> None:
    """A reader that went away without a word leaves nothing behind."""
    bus = LocalBus()
    reader = bus.subscribe("wake")
    await bus.publish("wake", b"1")
    assert await anext(reader) == b"1"
    del reader
    gc.collect()
    await bus.publish("wake", b"2")
    assert [len(subscribers) for subscribers in bus._topics.values()] == [0]


async def test_broken_uploads_are_cleared_away_at_start(tmp_path: Path) -> None:
    """What a killed server left half-written is removed by the next, and blobs stay."""
    blobs = FolderBlobs(tmp_path)
    info = await blobs.put(_stream(b"whole"), 100)
    (tmp_path / "blobs" / "incoming" / "half").write_bytes(b"hal")
    again = FolderBlobs(tmp_path)
    assert [*(tmp_path / "blobs" / "incoming").iterdir()] == []
    assert await again.stat(info.sha256) == info


async def test_a_cancelled_upload_leaves_nothing(tmp_path: Path) -> None:
    """Cancelling in the middle of the stream removes what was written."""
    blobs = FolderBlobs(tmp_path)
    stalled = asyncio.Event()

    async def stream() -> AsyncIterator[bytes]:
        yield b"x" * 3_000_000
        stalled.set()
        await asyncio.Event().wait()

    upload = asyncio.ensure_future(blobs.put(stream(), 10_000_000))
    await stalled.wait()
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()] == []


async def test_a_blob_lies_where_its_digest_says_and_only_the_owner_reads_it(tmp_path: Path) -> None:
    """`blobs/ab/cdef…`, file 0600, folders 0700; that path is what programs on the same machine get."""
    blobs = FolderBlobs(tmp_path)
    info = await blobs.put(_stream(b"abc"), 100)
    path = tmp_path / "blobs" / info.sha256[:2] / info.sha256[2:]
    assert blobs.local_path(info.sha256) == path
    assert path.read_bytes() == b"abc"
    assert path.stat().st_mode & 0o777 == 0o600
    assert {folder.stat().st_mode & 0o777 for folder in (path.parent, path.parent.parent)} == {0o700}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"mounting a small disk is not permitted here: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


async def test_a_blob_that_does_not_fit_is_refused_and_leaves_its_space_free(small_disk: Path) -> None:
    """A full disk is StorageFull, nothing of the blob stays, and a smaller one still goes in."""
    blobs = FolderBlobs(small_disk)
    with pytest.raises(StorageFull):
        await blobs.put(_stream(*[b"x" * 1_000_000] * 5), 10_000_000)
    info = await blobs.put(_stream(b"y" * 1_000_000), 10_000_000)
    assert await blobs.stat(info.sha256) == info
