"""Artifacts: what arrives is what was sent, what is named stays, and what nobody names goes."""

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mcp_control.artifacts.orphans import OrphanPass
from mcp_control.artifacts.service import KINDS, ArtifactFilter, Artifacts, NewArtifact, view
from mcp_control.events.broadcaster import Broadcaster
from mcp_control.kernel.changes import Change, Query
from mcp_control.kernel.errors import (
    Conflict,
    Forbidden,
    Invalid,
    InvalidCursor,
    NotFound,
    OutcomeUnknown,
    PayloadTooLarge,
    Problem,
    StoreUnavailable,
)
from mcp_control.kernel.ids import IdSource
from mcp_control.security.model import Actor
from mcp_control.storage.local.blobs import FolderBlobs
from mcp_control.storage.ports import BlobInfo
from mcp_control.storage.sqlite.store import SqliteStore
from mcp_control.testing.clock import FakeClock

ADMIN = Actor(id="user_1", kind="user", roles=("administrator",))
AGENT = Actor(id="agent_1", kind="agent", roles=("agent",))
STRANGER = Actor(id="user_2", kind="user", tenant="other", roles=("administrator",))


def _fatal(problem: Problem) -> None:
    raise AssertionError(problem)


class Disturbed:
    """Blobs that let a test act at the moment when an upload's bytes are there and its artifact is not yet."""

    def __init__(self, blobs: FolderBlobs) -> None:
        self._blobs = blobs
        self.put_done: asyncio.Event | None = None
        self.go_on = asyncio.Event()
        self.read = blobs.read
        self.stat = blobs.stat
        self.delete = blobs.delete
        self.local_path = blobs.local_path
        self.names = blobs.names
        self.sweep = blobs.sweep

    async def put(self, chunks: AsyncIterator[bytes], limit: int) -> BlobInfo:
        info = await self._blobs.put(chunks, limit)
        if self.put_done is not None:
            self.put_done.set()
            await self.go_on.wait()
        return info


class Unsure:
    """A store that does not answer as it should, for the next commit."""

    def __init__(self, store: SqliteStore) -> None:
        self.store = store
        self.next: tuple[Problem, bool] | None = None
        self.get, self.find, self.count = store.get, store.find, store.count

    async def commit(self, changes: Sequence[Change]) -> list[Problem | None]:
        if self.next is not None:
            (problem, done), self.next = self.next, None
            if done:
                await self.store.commit(changes)
            raise problem
        return await self.store.commit(changes)


class World:
    """A store, blobs and the service over them."""

    def __init__(self, folder: Path) -> None:
        self.clock = FakeClock(round(time.time() * 1000))  # files have real times
        self.store = SqliteStore(folder, fatal=_fatal)
        self.unsure = Unsure(self.store)
        self.blobs = Disturbed(FolderBlobs(folder))
        self.artifacts = Artifacts(self.unsure, self.blobs, self.clock, IdSource(self.clock), max_bytes=3_000_000)  # type: ignore[arg-type] # only the methods in use
        self.folder = folder / "blobs"

    def files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path / "data")
    await world.store.open(KINDS, Broadcaster(world.store).committed)
    yield world
    await world.store.close()


async def stream(data: bytes, size: int = 70_000) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


async def joined(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


DATA = b"".join(n.to_bytes(4, "big") for n in range(600_000))
DIGEST = hashlib.sha256(DATA).hexdigest()


async def test_bytes_come_back_as_they_were_sent(world: World) -> None:
    """Whole and in ranges, with size, digest and a file for programs on the same machine."""
    new = NewArtifact(
        name="data.bin", media_type="application/x-test", role="output", rows=7, run_id="run_1", stage="export"
    )
    artifact = await world.artifacts.upload(AGENT, new, stream(DATA), DIGEST)
    assert (artifact.size, artifact.sha256, artifact.created_by) == (len(DATA), DIGEST, "agent_1")
    shown = view(await world.artifacts.get(ADMIN, artifact.id))
    assert (shown.name, shown.role, shown.rows, shown.run_id, shown.stage) == (
        "data.bin",
        "output",
        7,
        "run_1",
        "export",
    )
    for start, length in ((0, None), (5, 10), (len(DATA) - 3, None), (len(DATA), 10), (1_000_000, 1_100_000), (0, 0)):
        _, chunks = await world.artifacts.content(AGENT, artifact.id, start, length)
        assert await joined(chunks) == DATA[start : None if length is None else start + length]
    _, path = await world.artifacts.location(AGENT, artifact.id)
    assert path is not None
    assert path.read_bytes() == DATA
    (told,) = await world.store.facts(0, 10)
    assert (told.fact.type, told.fact.subject, told.fact.run) == ("artifact.created", artifact.id, "run_1")


async def test_wrong_digest_changes_nothing(world: World) -> None:
    """Bytes that were damaged on the way leave no artifact and no file."""
    with pytest.raises(Invalid) as caught:
        await world.artifacts.upload(ADMIN, NewArtifact(name="x"), stream(DATA), "0" * 64)
    assert caught.value.errors[0].code == "digest-mismatch"
    assert world.files() == []
    assert await world.store.find("artifact", Query()) == []


async def test_too_large_broken_or_empty_streams(world: World) -> None:
    """Over the limit and broken off leave nothing; empty is a valid content."""
    with pytest.raises(PayloadTooLarge):
        await world.artifacts.upload(ADMIN, NewArtifact(name="x"), stream(DATA + DATA))

    async def broken() -> AsyncIterator[bytes]:
        yield b"x" * 100
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        await world.artifacts.upload(ADMIN, NewArtifact(name="x"), broken())
    assert world.files() == []
    empty = await world.artifacts.upload(ADMIN, NewArtifact(name="x"), stream(b""))
    assert empty.size == 0


@pytest.mark.parametrize(
    ("new", "pointer"),
    [
        (NewArtifact(name=""), "#/name"),
        (NewArtifact(name="n" * 256), "#/name"),
        (NewArtifact(name="../etc/passwd"), "#/name"),
        (NewArtifact(name="a\\b"), "#/name"),
        (NewArtifact(name=".."), "#/name"),
        (NewArtifact(name="a\nb"), "#/name"),
        (NewArtifact(name="a\x00b"), "#/name"),
        (NewArtifact(name="a\u202eb"), "#/name"),
        (NewArtifact(name="x", media_type="text"), "#/media_type"),
        (NewArtifact(name="x", media_type="text/html\r\nSet-Cookie: a=b"), "#/media_type"),
        (NewArtifact(name="x", rows=-1), "#/rows"),
        (NewArtifact(name="x", rows=2**60), "#/rows"),
    ],
)
async def test_bad_metadata_is_refused_before_a_byte_is_read(world: World, new: NewArtifact, pointer: str) -> None:
    """Names are file names and media types are media types, since both end up in headers and on other machines' disks."""

    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("read")
        yield b""

    with pytest.raises(Invalid) as caught:
        await world.artifacts.upload(ADMIN, new, never())
    assert caught.value.errors[0].pointer == pointer


async def test_content_goes_with_its_last_name(world: World) -> None:
    """Equal content is stored once and stays as long as one artifact names it."""
    first = await world.artifacts.upload(ADMIN, NewArtifact(name="a"), stream(DATA))
    second = await world.artifacts.upload(ADMIN, NewArtifact(name="b"), stream(DATA))
    assert len(world.files()) == 1
    await world.artifacts.delete(ADMIN, first.id)
    assert len(world.files()) == 1
    assert await joined((await world.artifacts.content(ADMIN, second.id))[1]) == DATA
    await world.artifacts.delete(ADMIN, second.id)
    assert world.files() == []
    for gone in (first.id, second.id, "art_none"):
        with pytest.raises(NotFound):
            await world.artifacts.delete(ADMIN, gone)
        with pytest.raises(NotFound):
            await world.artifacts.get(ADMIN, gone)
    assert await world.store.find("blob_check", Query()) == []
    assert [each.fact.type for each in await world.store.facts(0, 10)] == ["artifact.created"] * 2 + [
        "artifact.deleted"
    ] * 2


async def test_deleting_the_last_name_spares_an_upload_of_the_same_bytes(world: World) -> None:
    """An upload that found its bytes there already keeps them, or is told to repeat; it never names bytes that are gone."""
    first = await world.artifacts.upload(ADMIN, NewArtifact(name="a"), stream(DATA))
    world.blobs.put_done = asyncio.Event()
    upload = asyncio.create_task(world.artifacts.upload(ADMIN, NewArtifact(name="b"), stream(DATA)))
    await asyncio.wait_for(world.blobs.put_done.wait(), 10)
    await world.artifacts.delete(ADMIN, first.id)
    assert world.files() == []
    world.blobs.go_on.set()
    with pytest.raises(Conflict):
        await upload
    world.blobs.put_done = None
    again = await world.artifacts.upload(ADMIN, NewArtifact(name="b"), stream(DATA))
    assert await joined((await world.artifacts.content(ADMIN, again.id))[1]) == DATA


async def test_uploads_and_deletions_of_the_same_bytes_never_lose_them(world: World) -> None:
    """Many at once: at the end every artifact has its bytes, and without artifacts there are no files."""
    data = DATA[:5000]

    async def one(n: int) -> None:
        for m in range(5):
            try:
                artifact = await world.artifacts.upload(ADMIN, NewArtifact(name=f"{n}-{m}"), stream(data, 1000))
            except Conflict:
                continue
            _, chunks = await world.artifacts.content(ADMIN, artifact.id)
            assert await joined(chunks) == data
            if (n + m) % 3:
                await world.artifacts.delete(ADMIN, artifact.id)

    await asyncio.gather(*[one(n) for n in range(8)])
    left = await world.artifacts.list(ADMIN, ArtifactFilter(), limit=100)
    for artifact in left.items:
        assert await joined((await world.artifacts.content(ADMIN, artifact.id))[1]) == data
        await world.artifacts.delete(ADMIN, artifact.id)
    assert world.files() == []


async def test_sweep_finishes_what_a_crash_left(world: World) -> None:
    """A deletion that ended between its commit and the removal of the file is finished later, after a grace."""
    artifact = await world.artifacts.upload(ADMIN, NewArtifact(name="a"), stream(DATA))
    removal = world.artifacts._removal(ADMIN, artifact)
    assert await world.store.commit([removal]) == [None]
    assert len(world.files()) == 1
    assert await world.artifacts.once(world.clock.now()) == 0
    world.clock.advance(600)
    assert await world.artifacts.once(world.clock.now()) == 1
    assert world.files() == []
    assert await world.artifacts.once(world.clock.now()) == 0


async def test_blobs_that_nothing_names_are_removed_after_an_hour(world: World) -> None:
    """What an upload left whose artifact never came goes; what is named or young stays, and a pass comes once an hour."""
    kept = await world.artifacts.upload(ADMIN, NewArtifact(name="a"), stream(DATA))
    orphan = await world.blobs.put(stream(b"orphan"), 100)
    assert await world.artifacts.once(world.clock.now()) == 0
    world.clock.advance(3599)
    assert await world.artifacts.once(world.clock.now()) == 0
    world.clock.advance(3601)
    young = await world.blobs.put(stream(b"young"), 100)
    os.utime(path_of(world, young.sha256), (world.clock.now() / 1000,) * 2)
    assert await world.artifacts.once(world.clock.now()) == 1
    assert {path.parent.name + path.name for path in world.files()} == {kept.sha256, young.sha256}
    assert await world.blobs.stat(orphan.sha256) is None
    assert await joined((await world.artifacts.content(ADMIN, kept.id))[1]) == DATA


def path_of(world: World, sha256: str) -> Path:
    path = world.blobs.local_path(sha256)
    assert path is not None
    return path


async def test_the_sweep_spares_a_blob_whose_upload_is_under_way(world: World) -> None:
    """However old the bytes are: an upload that found them there already will name them."""
    world.blobs.put_done = asyncio.Event()
    upload = asyncio.create_task(world.artifacts.upload(ADMIN, NewArtifact(name="b"), stream(DATA)))
    await asyncio.wait_for(world.blobs.put_done.wait(), 10)
    assert await world.artifacts.once(world.clock.now() + 60_000) == 0
    world.blobs.go_on.set()
    artifact = await upload
    os.utime(path_of(world, DIGEST), (1, 1))
    assert await world.artifacts.once(world.clock.now() + 7_200_000) == 0
    assert await joined((await world.artifacts.content(ADMIN, artifact.id))[1]) == DATA


async def test_the_pass_over_many_blobs_goes_on_where_it_stopped(world: World) -> None:
    """Each call goes a bounded way; together they see every blob."""
    blobs: Any = world.blobs
    look = OrphanPass(world.store, blobs, blobs.delete, page=3, pages=2)
    for number in range(20):
        await world.blobs.put(stream(b"%d" % number), 100)
    now = world.clock.now() + 7_200_000
    assert [await look.once(now) for _ in range(5)] == [6, 6, 6, 2, 0]
    assert world.files() == []


async def test_servers_that_share_blobs_spare_what_another_one_just_put(world: World) -> None:
    """Deleting the last name leaves young bytes to the sweep, since an upload on another server may count on them."""
    store: Any = world.unsure
    blobs: Any = world.blobs
    here, there = (Artifacts(store, blobs, world.clock, IdSource(world.clock), shared=True) for _ in range(2))
    first = await here.upload(ADMIN, NewArtifact(name="a"), stream(DATA))
    os.utime(path_of(world, DIGEST), (1, 1))
    world.blobs.put_done = asyncio.Event()
    upload = asyncio.create_task(there.upload(ADMIN, NewArtifact(name="b"), stream(DATA)))
    await asyncio.wait_for(world.blobs.put_done.wait(), 10)
    await here.delete(ADMIN, first.id)
    world.blobs.go_on.set()
    second = await upload
    assert await joined((await here.content(ADMIN, second.id))[1]) == DATA
    await there.delete(ADMIN, second.id)
    assert len(world.files()) == 1
    world.clock.advance(601)
    assert await here.once(world.clock.now()) == 2
    assert world.files() == []


@pytest.mark.parametrize(
    ("problem", "done", "kept"),
    [(OutcomeUnknown(), True, True), (OutcomeUnknown(), False, True), (StoreUnavailable(), False, False)],
)
async def test_bytes_stay_while_their_artifact_may_exist(
    world: World, problem: Problem, done: bool, kept: bool
) -> None:
    """When the store does not know, the bytes stay; when it refused, they go."""
    world.unsure.next = (problem, done)
    with pytest.raises(type(problem)):
        await world.artifacts.upload(ADMIN, NewArtifact(name="a"), stream(DATA))
    assert len(world.files()) == int(kept)
    for artifact in (await world.artifacts.list(ADMIN, ArtifactFilter())).items:
        assert await joined((await world.artifacts.content(ADMIN, artifact.id))[1]) == DATA


async def test_listing_pages_through_everything_once(world: World) -> None:
    """By run in order, by role and name, newest first otherwise; a cursor belongs to its listing."""
    made = []
    for n in range(25):
        world.clock.advance(0.001)
        new = NewArtifact(
            name=f"part-{n % 5}", run_id="run_1" if n % 2 else None, role="output" if n % 4 == 1 else "input"
        )
        made.append(await world.artifacts.upload(ADMIN, new, stream(b"%d" % n)))

    async def pages(wanted: ArtifactFilter) -> list[str]:
        found: list[str] = []
        cursor = None
        while True:
            page = await world.artifacts.list(ADMIN, wanted, limit=3, cursor=cursor)
            assert len(page.items) <= 3
            found += [artifact.id for artifact in page.items]
            cursor = page.next_cursor
            if cursor is None:
                return found

    assert await pages(ArtifactFilter()) == [artifact.id for artifact in reversed(made)]
    assert await pages(ArtifactFilter(run="run_1")) == [artifact.id for artifact in made[1::2]]
    assert await pages(ArtifactFilter(run="run_1", role="output")) == [artifact.id for artifact in made[1::4]]
    assert await pages(ArtifactFilter(name="part-2")) == [artifact.id for artifact in reversed(made[2::5])]
    assert await pages(ArtifactFilter(run="run_none")) == []
    cursor = (await world.artifacts.list(ADMIN, ArtifactFilter(), limit=3)).next_cursor
    with pytest.raises(InvalidCursor):
        await world.artifacts.list(ADMIN, ArtifactFilter(run="run_1"), cursor=cursor)


async def test_other_tenants_and_agents_stay_outside(world: World) -> None:
    """Another tenant's artifact does not exist; an agent reads and writes but does not delete."""
    artifact = await world.artifacts.upload(AGENT, NewArtifact(name="a"), stream(DATA))
    for attempt in (world.artifacts.get, world.artifacts.content, world.artifacts.location, world.artifacts.delete):
        with pytest.raises(NotFound):
            await attempt(STRANGER, artifact.id)
    assert (await world.artifacts.list(STRANGER, ArtifactFilter())).items == []
    with pytest.raises(Forbidden):
        await world.artifacts.delete(AGENT, artifact.id)


async def test_artifacts_of_a_run_go_together(world: World) -> None:
    """The end of a run's retention removes its artifacts and their bytes, and nobody else's."""
    for n in range(7):
        await world.artifacts.upload(ADMIN, NewArtifact(name=f"{n}", run_id="run_1"), stream(b"%d" % (n % 3)))
    other = await world.artifacts.upload(ADMIN, NewArtifact(name="x", run_id="run_2"), stream(b"0"))
    assert await world.artifacts.delete_of_run(ADMIN, "run_1") == 7
    assert await world.artifacts.delete_of_run(ADMIN, "run_1") == 0
    assert [path.read_bytes() for path in world.files()] == [b"0"]
    assert (await world.artifacts.get(ADMIN, other.id)).name == "x"
