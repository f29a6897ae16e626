"""What every `Blobs` promises, as tests.

An adapter's test module provides the fixture `blobs_factory`, a callable that returns a fresh, empty blob store (awaitable), and imports
all of this: `from mcp_control.testing.blobs_conformance import *`.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest

from mcp_control.kernel.errors import NotFound, PayloadTooLarge
from mcp_control.storage.ports import BlobInfo, Blobs

BlobsFactory = Callable[[], Awaitable[Blobs]]
_ABSENT = "0" * 64


async def _stream(chunks: Sequence[bytes], error: Exception | None = None) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
    if error is not None:
        raise error


async def _bytes(blobs: Blobs, digest: str, start: int = 0, length: int | None = None) -> bytes:
    return b"".join([chunk async for chunk in blobs.read(digest, start, length)])


@pytest.mark.parametrize("sizes", [(), (0,), (1,), (3, 0, 5), (700_000, 700_000, 700_000, 7)], ids=str)
async def test_a_blob_is_named_by_its_digest_and_read_back(blobs_factory: BlobsFactory, sizes: tuple[int, ...]) -> None:
    """Whatever the chunks, the same bytes come back under their SHA-256, whole or from any start."""
    blobs = await blobs_factory()
    chunks = [bytes([at + 1]) * size for at, size in enumerate(sizes)]
    whole = b"".join(chunks)
    info = await blobs.put(_stream(chunks), 10_000_000)
    assert info == BlobInfo(hashlib.sha256(whole).hexdigest(), len(whole))
    assert await blobs.stat(info.sha256) == info
    assert await _bytes(blobs, info.sha256) == whole
    assert await _bytes(blobs, info.sha256, len(whole) // 2) == whole[len(whole) // 2 :]
    assert await _bytes(blobs, info.sha256, 2, 3) == whole[2:5]
    assert await _bytes(blobs, info.sha256, len(whole) + 1) == b""


async def test_equal_content_is_one_blob_however_many_put_it_at_once(blobs_factory: BlobsFactory) -> None:
    """Concurrent puts of the same bytes all succeed with the same name."""
    blobs = await blobs_factory()
    infos = await asyncio.gather(*(blobs.put(_stream([b"same" * 1000]), 10_000) for _ in range(8)))
    assert len({info.sha256 for info in infos}) == 1
    assert await _bytes(blobs, infos[0].sha256) == b"same" * 1000


async def test_more_than_the_limit_is_refused(blobs_factory: BlobsFactory) -> None:
    """A stream of exactly `limit` bytes passes, one byte more is refused and leaves nothing."""
    blobs = await blobs_factory()
    await blobs.put(_stream([b"x" * 99, b"y"]), 100)
    with pytest.raises(PayloadTooLarge):
        await blobs.put(_stream([b"x" * 100, b"y"]), 100)
    assert await blobs.stat(hashlib.sha256(b"x" * 100 + b"y").hexdigest()) is None


async def test_a_stream_that_breaks_off_leaves_nothing(blobs_factory: BlobsFactory) -> None:
    """The error reaches the caller, and no blob of the part that came exists."""
    blobs = await blobs_factory()
    with pytest.raises(ConnectionResetError):
        await blobs.put(_stream([b"x" * 2_000_000], ConnectionResetError()), 10_000_000)
    assert await blobs.stat(hashlib.sha256(b"x" * 2_000_000).hexdigest()) is None


async def test_absent_blobs(blobs_factory: BlobsFactory) -> None:
    """What is not there has no size and no path, cannot be read, and can be deleted without complaint."""
    blobs = await blobs_factory()
    assert await blobs.stat(_ABSENT) is None
    assert blobs.local_path(_ABSENT) is None
    assert await blobs.delete(_ABSENT)
    with pytest.raises(NotFound):
        await _bytes(blobs, _ABSENT)


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "a" * 63, "A" * 64, "a" * 63 + "/"])
async def test_only_a_digest_names_a_blob(blobs_factory: BlobsFactory, name: str) -> None:
    """A name that is no lower-case SHA-256 leads nowhere, least of all out of the store."""
    blobs = await blobs_factory()
    assert await blobs.stat(name) is None
    assert blobs.local_path(name) is None
    assert await blobs.delete(name)
    with pytest.raises(NotFound):
        await _bytes(blobs, name)


async def test_a_deleted_blob_is_gone_and_can_be_put_again(blobs_factory: BlobsFactory) -> None:
    """Deleting removes the bytes; the same content may come again."""
    blobs = await blobs_factory()
    info = await blobs.put(_stream([b"abc"]), 10)
    assert await blobs.delete(info.sha256)
    assert await blobs.stat(info.sha256) is None
    assert await blobs.put(_stream([b"abc"]), 10) == info
    path = blobs.local_path(info.sha256)
    assert path is None or await asyncio.to_thread(path.read_bytes) == b"abc"


async def test_a_blob_put_since_a_moment_is_spared(blobs_factory: BlobsFactory) -> None:
    """Putting it again makes it young again, so a deletion that looks at its age leaves it to whoever put it."""
    blobs = await blobs_factory()
    info = await blobs.put(_stream([b"abc"]), 10)
    (first,) = await blobs.names("", 10)
    assert not await blobs.delete(info.sha256, before=first.stored_at)
    while (second := (await blobs.names("", 10))[0]).stored_at <= first.stored_at:
        await blobs.put(_stream([b"abc"]), 10)
    assert not await blobs.delete(info.sha256, before=second.stored_at)
    assert await _bytes(blobs, info.sha256) == b"abc"
    assert await blobs.delete(info.sha256, before=second.stored_at + 1)
    assert await blobs.stat(info.sha256) is None
    assert await blobs.delete(info.sha256, before=0)


async def test_blobs_are_listed_by_name_page_by_page(blobs_factory: BlobsFactory) -> None:
    """Every blob once, in order, with its size; broken-off uploads and deleted blobs are not among them."""
    blobs = await blobs_factory()
    assert await blobs.names("", 10) == []
    infos = [await blobs.put(_stream([b"%d" % number]), 10) for number in range(7)]
    with pytest.raises(ConnectionResetError):
        await blobs.put(_stream([b"x"], ConnectionResetError()), 10)
    await blobs.delete(infos.pop().sha256)
    await blobs.sweep(0)
    wanted = sorted((info.sha256, info.size) for info in infos)
    listed: list[tuple[str, int]] = []
    while page := await blobs.names(listed[-1][0] if listed else "", 4):
        assert len(page) <= 4
        listed.extend((blob.sha256, blob.size) for blob in page)
    assert listed == wanted
    moments = [blob.stored_at for blob in await blobs.names("", 10)]
    assert max(moments) - min(moments) < 60_000
    assert min(moments) > 1_600_000_000_000
