"""Moving a store to another place while it is in use: a copy first, what changed since when its servers have stopped, then a comparison.

Versions, leases and places in the order of events stay what they are, so agents go on with the leases they hold and readers with their
cursors.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final

import msgspec

from mcp_control.archive.backup import Progress
from mcp_control.archive.model import FactRange, KindCount
from mcp_control.archive.rows import FactDigest, KindDigest, pack_entity
from mcp_control.artifacts.model import ARTIFACT_KIND
from mcp_control.coordination.model import KINDS as FLEETING_KINDS
from mcp_control.kernel.changes import Entity, Kind
from mcp_control.kernel.errors import StoreUnavailable
from mcp_control.storage.ports import Archive, Blobs, Loading, Snapshot

FLEETING: Final = frozenset(kind.name for kind in FLEETING_KINDS)
"""What servers keep of themselves: of no use to those that come."""

_ENDLESS: Final = 1 << 62
_CHANGED: Final = 500
OpenBlobs = Callable[[], AbstractAsyncContextManager[Blobs]]
Wait = Callable[[StoreUnavailable], Awaitable[None]]


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """What a move came to: the same on both sides, as was compared. `late` entities and events came after the first copy."""

    kinds: list[KindCount]
    facts: FactRange
    newest_seq: int
    blobs: int
    late: int


class CopyDiffers(Exception):
    """What was copied is not what is there; nothing was finished."""


async def migrate(
    source: Archive,
    source_blobs: OpenBlobs,
    target: Archive,
    target_blobs: OpenBlobs,
    kinds: Sequence[Kind],
    *,
    replace: bool,
    wait: Wait,
    progress: Progress,
) -> Moved:
    """Move a store; the old one stays as it is.

    Args:
        source, target: the stores; servers may use the source until `wait` is called, and none the target.
        source_blobs: opens the blobs of the source for reading.
        target_blobs: opens those of the target for writing.
        kinds: declarations of this version of the product.
        replace: whether a target that is not empty may be replaced.
        wait: called while servers use the source, with what is in the way, until none does; may raise to give up.
        progress: told what goes on.

    Raises:
        StoreUnavailable: one of the stores cannot be used.
        CopyDiffers: the comparison found a difference.
    """
    async with source.snapshot() as snapshot:
        known = {kind.name for kind in kinds}
        wanted = [*kinds, *(kind for kind in snapshot.kinds if kind.name not in known)]
    async with target.loading(wanted, replace=replace) as loading:
        async with source.snapshot() as snapshot:
            names = [kind.name for kind in snapshot.kinds if kind.name not in FLEETING]
            for name in names:
                async for page in snapshot.entities(name):
                    await loading.put(name, page)
                    progress(f"copying: {name}")
            copied = await _facts(snapshot, loading, 0)
        async with source_blobs() as old, target_blobs() as new:
            async with loading.loaded() as there:
                await _blobs(there, old, new, progress)
            async with _rest(source, wait), source.snapshot() as snapshot:
                late = await _catch_up(snapshot, loading, names, progress)
                newest = await _facts(snapshot, loading, copied)
                blobs = await _blobs(snapshot, old, new, progress)
                async with loading.loaded() as there:
                    counts, facts = await _compared(snapshot, there, names, progress)
                await loading.finish(snapshot.newest_seq)
    return Moved(
        kinds=counts, facts=facts, newest_seq=snapshot.newest_seq, blobs=blobs, late=late + max(0, newest - copied)
    )


@asynccontextmanager
async def _rest(source: Archive, wait: Wait) -> AsyncIterator[None]:
    while True:
        resting = source.resting()
        try:
            await resting.__aenter__()
        except StoreUnavailable as in_the_way:
            await wait(in_the_way)
            continue
        break
    try:
        yield
    finally:
        await resting.__aexit__(None, None, None)


async def _facts(snapshot: Snapshot, loading: Loading, after: int) -> int:
    """Copy facts; returns the place of the last one."""
    async for page in snapshot.facts(after):
        await loading.append(page)
        after = page[-1].seq
    return after


async def _entities(snapshot: Snapshot, kind: str) -> AsyncIterator[Entity]:
    async for page in snapshot.entities(kind):
        for entity in page:
            yield entity


async def _catch_up(snapshot: Snapshot, loading: Loading, names: Sequence[str], progress: Progress) -> int:
    """Bring what changed since the copy; returns how many entities that were. Both sides come in the order of ids."""
    changes = 0
    async with loading.loaded() as there:
        for name in names:
            changed: list[Entity] = []
            gone: list[str] = []
            theirs = _entities(there, name)
            copy = await anext(theirs, None)
            async for entity in _entities(snapshot, name):
                while copy is not None and copy.id < entity.id:
                    gone.append(copy.id)
                    copy = await anext(theirs, None)
                same = copy is not None and copy.id == entity.id and pack_entity(copy) == pack_entity(entity)
                if copy is not None and copy.id == entity.id:
                    copy = await anext(theirs, None)
                if not same:
                    changed.append(entity)
                if len(changed) >= _CHANGED:
                    await loading.put(name, changed)
                    changes += len(changed)
                    changed = []
            while copy is not None:
                gone.append(copy.id)
                copy = await anext(theirs, None)
            if changed:
                await loading.put(name, changed)
            for start in range(0, len(gone), _CHANGED):
                await loading.drop(name, gone[start : start + _CHANGED])
            changes += len(changed) + len(gone)
            progress(f"what changed: {name}")
    return changes


async def _blobs(snapshot: Snapshot, old: Blobs, new: Blobs, progress: Progress) -> int:
    """Copy the blobs that artifacts name and that are not there yet; returns how many there are."""
    if ARTIFACT_KIND.name not in {kind.name for kind in snapshot.kinds}:
        return 0
    digests = {str(entity.index["sha256"]) async for entity in _entities(snapshot, ARTIFACT_KIND.name)}
    for number, digest in enumerate(sorted(digests), 1):
        progress(f"blob {number} of {len(digests)}")
        if await new.stat(digest) is None and await old.stat(digest) is not None:
            stored = await new.put(old.read(digest), _ENDLESS)
            if stored.sha256 != digest:
                raise CopyDiffers(f"the bytes of blob {digest} are damaged where they come from")
    return len(digests)


async def _compared(
    snapshot: Snapshot, there: Snapshot, names: Sequence[str], progress: Progress
) -> tuple[list[KindCount], FactRange]:
    """Compare counts and digests, kind by kind. Raises CopyDiffers."""
    counts = []
    for name in names:
        progress(f"comparing: {name}")
        ours, theirs = await _digest(snapshot, name), await _digest(there, name)
        if ours != theirs:
            raise CopyDiffers(f"{name}: {ours.count} there, {theirs.count} copied, or their digests differ")
        counts.append(ours)
    # The oldest may have been removed where it comes from since they were copied.
    first = 0
    async for page in snapshot.facts():
        first = page[0].seq
        break
    facts, copied = await _fact_digest(snapshot, first - 1), await _fact_digest(there, first - 1)
    if facts != copied:
        raise CopyDiffers(f"events: {facts.count} there, {copied.count} copied, or their digests differ")
    return counts, facts


async def _digest(snapshot: Snapshot, kind: str) -> KindCount:
    digest = KindDigest(kind)
    if kind in {one.name for one in snapshot.kinds}:
        async for entity in _entities(snapshot, kind):
            digest.add(pack_entity(entity))
    return digest.total


async def _fact_digest(snapshot: Snapshot, after: int) -> FactRange:
    digest = FactDigest()
    if after >= 0:  # else there is none
        async for page in snapshot.facts(after):
            digest.add(page)
    return digest.total
