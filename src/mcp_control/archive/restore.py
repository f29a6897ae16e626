"""Restoring a backup: the store as it was then, with every lease of then void.

Between the backup and now the old store went on: leases were given, and fences told to outside systems, that the backup knows nothing
of. So the generation, which is the larger half of every fence, is raised beyond any that was ever given, each task that is not final gets
it, held tasks are taken back, and instances end (promise G3; fault row 27). One backup may be restored more than once, so its own
generation plus one is not enough: the new one is the wall time in milliseconds.
"""

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from msgspec.structs import replace

from mcp_control.agents.model import INSTANCE_KIND
from mcp_control.agents.records import read_instance, write_instance
from mcp_control.archive.backup import BlobPiece, EntityPage, FactPage, Part, Progress, read, verify
from mcp_control.archive.migrate import FLEETING
from mcp_control.archive.model import BUNDLE, BackupDamaged, Header, Manifest
from mcp_control.events.log import fact
from mcp_control.kernel.changes import Entity, Fact, Kind, StoredFact
from mcp_control.storage.ports import Archive, Blobs
from mcp_control.tasks.model import GENERATION_KIND, HELD_STATES, TASK_KIND
from mcp_control.tasks.records import read as read_task
from mcp_control.tasks.records import task_fact, write_generation
from mcp_control.tasks.records import write as write_task
from mcp_control.tasks.transitions import raise_generation
from mcp_control.tasks.transitions import restore as take_back

_ENDLESS = 1 << 62


async def restore(
    path: Path,
    archive: Archive,
    open_blobs: Callable[[], AbstractAsyncContextManager[Blobs]],
    kinds: Sequence[Kind],
    *,
    now: int,
    replace_old: bool,
    progress: Progress,
) -> tuple[Header, Manifest, int]:
    """Make a store of a backup; nothing happens unless all of it is sound. Returns the new generation last.

    Args:
        path: the backup; it is checked whole before anything is written.
        archive: the store, which no server uses.
        open_blobs: opens its blobs, when the store is ours.
        kinds: declarations of this version of the product; kinds of the backup that are not among them are kept as they are.
        now: wall milliseconds.
        replace_old: whether a store that is not empty may be replaced.
        progress: told what goes on.

    Raises:
        BackupDamaged: names the first bad part of the file.
        StoreUnavailable: a server uses the store, or it is not empty.
    """
    header, manifest = verify(path, lambda text: progress(f"checking: {text}"))
    if header.store == BUNDLE:
        raise BackupDamaged("header.json", "this is the bundle of one run; `mcpctl runs import` reads it")
    known = {kind.name for kind in kinds}
    wanted = [*kinds, *(kind for kind in header.kinds if kind.name not in known)]
    async with archive.loading(wanted, replace=replace_old) as loading, open_blobs() as blobs:
        generation = now
        facts: list[Fact] = []
        parts = read(path)
        for part in parts:
            match part:
                case EntityPage(kind) if kind in FLEETING:
                    pass
                case EntityPage(kind, entities):
                    if kind == GENERATION_KIND.name:
                        generation = max([generation, *(int(entity.hot) + 1 for entity in entities)])
                        continue
                    # Pages come by kind in the order of names, so the generation is known before the tasks come.
                    restored = [_restored(entity, generation, now, facts) for entity in entities]
                    await loading.put(kind, restored)
                    progress(f"restoring: {kind}")
                case FactPage(found):
                    await loading.append(found)
                    progress("restoring: events")
                case BlobPiece():
                    await blobs.put(_pieces(part, parts), _ENDLESS)
                    progress("restoring: blobs")
                case _:
                    pass
        await loading.put(GENERATION_KIND.name, [write_generation(generation)])
        facts.append(fact("store.restored", "store", "system", now, {"generation": generation}))
        await loading.append([StoredFact(seq, one) for seq, one in enumerate(facts, header.newest_seq + 1)])
        await loading.finish(header.newest_seq + len(facts))
    return header, manifest, generation


def _restored(entity: Entity, generation: int, now: int, facts: list[Fact]) -> Entity:
    """Return an entity as it is after the restore. What was final, and what holds no lease, stays as it was."""
    if entity.kind == TASK_KIND.name:
        before = read_task(entity)
        if before.final:
            return entity
        after = raise_generation(before, generation)
        if before.state in HELD_STATES:
            after = take_back(after, now)
            verb = f"task.{after.state.value}" if after.final else "task.restored"
            facts.append(task_fact(verb, after, "system", now))
        _, written = write_task(after)
        return replace(written, version=entity.version + 1, cold=entity.cold)
    if entity.kind == INSTANCE_KIND.name:
        instance = read_instance(entity)
        if instance.ended_at is None:
            _, written = write_instance(replace(instance, ended_at=now, end_reason="restored"))
            return replace(written, version=entity.version + 1)
    return entity


async def _pieces(first: BlobPiece, rest: Iterator[Part]) -> AsyncIterator[bytes]:
    """Return the bytes of a blob from its first piece on; leaves the parts behind its last one."""
    piece = first
    yield piece.data
    while not piece.last:
        following = next(rest)
        assert isinstance(following, BlobPiece)  # `read` refuses a blob that is not whole
        piece = following
        yield piece.data
