"""Artifacts: names for blobs, which are streamed in and out, checked by their digest and removed with their last name.

A blob has no owner: its references are the artifacts that name its SHA-256. Deleting writes a note in the same change (`blob_check`);
the blob goes when nothing refers to it any more and no upload of the same bytes is under way. A crash in between leaves the note, and
the next sweep acts on it. Where several servers share the blobs, an upload under way on another one shows only by the age of its blob: a
young one stays for now.
"""

import asyncio
import builtins
import contextlib
import re
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.artifacts.model import ARTIFACT_KIND, Artifact, ArtifactView, Role
from mcp_control.artifacts.orphans import OrphanPass
from mcp_control.events.log import fact
from mcp_control.kernel.changes import Change, Entity, Field, Index, IndexValue, Key, Kind, Query, Where
from mcp_control.kernel.clock import Clock, to_datetime
from mcp_control.kernel.errors import Conflict, FieldError, Invalid, NotFound, OutcomeUnknown, Problem, field_error
from mcp_control.kernel.ids import IdSource
from mcp_control.kernel.paging import Page, decode_cursor, encode_cursor
from mcp_control.security.model import Actor
from mcp_control.security.policy import allow
from mcp_control.storage.ports import Blobs, Store

BLOB_CHECK_KIND: Final = Kind(
    name="blob_check", fields=(Field("due", "int"),), indexes=(Index("blob_check_due", ("due", "id")),)
)
KINDS: Final = (ARTIFACT_KIND, BLOB_CHECK_KIND)
GRACE_MS: Final = 600_000

_MEDIA_TYPE: Final = re.compile(
    r"[A-Za-z0-9!#$&^_.+-]{1,63}/[A-Za-z0-9!#$&^_.+-]{1,63}(; ?[A-Za-z0-9_-]{1,40}=[A-Za-z0-9_.-]{1,40})?"
)
_NAME_CHARS: Final = 255
_MAX_ROWS: Final = 2**53
_SCAN_PAGES: Final = 20
_PAGE: Final = 500

_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Artifact).decode


class NewArtifact(msgspec.Struct, frozen=True, kw_only=True):
    """What an uploader says of an artifact; ownership by a run or task was checked by whoever calls."""

    name: str
    media_type: str = "application/octet-stream"
    role: Role = "intermediate"
    rows: int | None = None
    run_id: str | None = None
    stage: str | None = None
    task_id: str | None = None


class ArtifactFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which artifacts; None is any."""

    run: str | None = None
    name: str | None = None
    role: Role | None = None


class Artifacts:
    """Artifacts of one server.

    Args:
        max_bytes: largest artifact.
        shared: whether other servers use the same blobs.
    """

    def __init__(
        self,
        store: Store,
        blobs: Blobs,
        clock: Clock,
        ids: IdSource,
        *,
        max_bytes: int = 10 << 30,
        shared: bool = False,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._clock = clock
        self._ids = ids
        self._max_bytes = max_bytes
        self._pinned: Counter[str] = Counter()
        self._removing = asyncio.Lock()
        self._shared = shared
        self._orphans = OrphanPass(store, blobs, self._remove_unused)

    async def upload(
        self, actor: Actor, new: NewArtifact, chunks: AsyncIterator[bytes], sha256: str | None = None
    ) -> Artifact:
        """Store a stream under a name.

        Args:
            actor: who uploads.
            new: its name and what is known of it.
            chunks: the bytes.
            sha256: lower-case hexadecimal digest the bytes must have, where the uploader states one.

        Raises:
            Invalid: bad metadata, or `digest-mismatch`.
            PayloadTooLarge, StorageFull: nothing was stored.
            Conflict: the same bytes were being removed just now; repeat the upload.
        """
        allow(actor, "artifacts.create")
        check(new)
        now = self._clock.now()
        artifact = Artifact(
            id=self._ids.new("art"),
            version=1,
            tenant=actor.tenant,
            name=new.name,
            sha256="",
            size=0,
            media_type=new.media_type,
            role=new.role,
            rows=new.rows,
            run_id=new.run_id,
            stage=new.stage,
            task_id=new.task_id,
            created_at=now,
            created_by=actor.id,
        )
        (stored,) = await self._keep(actor, [artifact], chunks, sha256)
        return stored

    async def adopt(self, actor: Actor, artifacts: Sequence[Artifact], chunks: AsyncIterator[bytes]) -> None:
        """Store artifacts that were made elsewhere, under the ids they have; all of them have the same bytes.

        Raises:
            Invalid: the bytes are not those they name.
            Conflict: one of the ids is taken, or the same bytes were being removed just now.
            PayloadTooLarge, StorageFull: nothing was stored.
        """
        allow(actor, "artifacts.create")
        await self._keep(actor, artifacts, chunks, artifacts[0].sha256)

    async def _keep(
        self, actor: Actor, artifacts: Sequence[Artifact], chunks: AsyncIterator[bytes], sha256: str | None
    ) -> builtins.list[Artifact]:
        blob = await self._blobs.put(chunks, self._max_bytes)
        # From here to the end of the commit the blob must not be removed as unused. Nothing awaits between `put` and this line.
        self._pinned[blob.sha256] += 1
        try:
            if sha256 is not None and sha256 != blob.sha256:
                raise field_error(
                    "#/content", "digest-mismatch", "the bytes that arrived are not those that were announced"
                )
            async with self._removing:  # whoever was removing these bytes has finished
                if await self._blobs.stat(blob.sha256) is None:
                    raise Conflict("the same content was being deleted: repeat the upload", retry_after=0.1)
            stored = [replace(artifact, sha256=blob.sha256, size=blob.size) for artifact in artifacts]
            await self._record(actor, stored)
        except OutcomeUnknown:  # the artifact may be there, so its bytes stay
            self._unpin(blob.sha256)
            raise
        except BaseException:
            self._unpin(blob.sha256)
            with contextlib.suppress(Problem):  # the reason of the failure is what the caller must hear
                await asyncio.shield(self._remove_unused(blob.sha256))
            raise
        self._unpin(blob.sha256)
        return stored

    async def get(self, actor: Actor, id: str) -> Artifact:
        """Return an artifact. Raises NotFound, also for another tenant's."""
        allow(actor, "artifacts.get", id)
        return await self._load(actor, id)

    async def list(
        self, actor: Actor, wanted: ArtifactFilter, *, limit: int = 50, cursor: str | None = None
    ) -> Page[Artifact]:
        """Return artifacts: of a run in the order they were made, else newest first. Raises InvalidCursor."""
        allow(actor, "artifacts.list")
        where = [Where("tenant", "eq", actor.tenant)]
        order: str | None = None
        if wanted.run is not None:
            where.append(Where("run", "eq", wanted.run))
        else:
            order = "created"
        if wanted.name is not None:
            where.append(Where("name", "eq", wanted.name))
        scope = f"artifacts:{wanted.run or ''}:{wanted.name or ''}:{wanted.role or ''}"
        position = decode_cursor(scope, cursor, 1 if order is None else 2) if cursor is not None else None
        found: list[Artifact] = []
        for _ in range(_SCAN_PAGES):
            query = Query(
                where=where,
                order=order,
                descending=order is not None,
                after=position,
                limit=_PAGE if wanted.role else limit + 1,
            )
            page = await self._store.find(ARTIFACT_KIND.name, query)
            for entity in page:
                artifact = _decode(entity.hot)
                if wanted.role is None or artifact.role == wanted.role:
                    if len(found) == limit:
                        return Page(items=found, next_cursor=encode_cursor(scope, _place(found[-1], order)))
                    found.append(artifact)
            if len(page) < query.limit:
                return Page(items=found)
            position = _place(_decode(page[-1].hot), order)
        return Page(items=found, next_cursor=encode_cursor(scope, position or ()))

    async def content(
        self, actor: Actor, id: str, start: int = 0, length: int | None = None
    ) -> tuple[Artifact, AsyncIterator[bytes]]:
        """Return an artifact and its bytes from `start`; a range beyond the end is empty. Raises NotFound."""
        allow(actor, "artifacts.read", id)
        artifact = await self._load(actor, id)
        return artifact, self._blobs.read(artifact.sha256, start, length)

    async def location(self, actor: Actor, id: str) -> tuple[Artifact, Path | None]:
        """Return an artifact and the file that holds it, for programs on the same machine. The file must not be written to."""
        allow(actor, "artifacts.read", id)
        artifact = await self._load(actor, id)
        return artifact, self._blobs.local_path(artifact.sha256)

    async def delete(self, actor: Actor, id: str) -> None:
        """Remove an artifact, and its bytes when it was the last to name them. Raises NotFound."""
        allow(actor, "artifacts.delete", id)
        artifact = await self._load(actor, id)
        (problem,) = await self._store.commit([self._removal(actor, artifact)])
        if problem is not None:
            raise NotFound if isinstance(problem, Conflict) else problem
        await self._settle([(artifact.id, artifact.sha256)])

    async def delete_of_run(self, actor: Actor, run_id: str) -> int:
        """Remove all artifacts of a run, as when its retention ends; returns how many."""
        allow(actor, "artifacts.delete")
        removed = 0
        where = (Where("run", "eq", run_id),)
        while found := await self._store.find(ARTIFACT_KIND.name, Query(where=where, limit=_PAGE)):
            artifacts = [_decode(entity.hot) for entity in found]
            outcomes = await self._store.commit([self._removal(actor, artifact) for artifact in artifacts])
            for problem in outcomes:
                if problem is not None and not isinstance(problem, Conflict):
                    raise problem
            gone = [artifact for artifact, problem in zip(artifacts, outcomes, strict=True) if problem is None]
            removed += len(gone)
            await self._settle([(artifact.id, artifact.sha256) for artifact in gone])
        return removed

    async def once(self, now: int) -> int:
        """Act on the notes that deletions left, and look for blobs that nothing names; returns how many were settled."""
        due = Query(where=(Where("due", "le", now - GRACE_MS),), order="due", limit=_PAGE)
        notes = await self._store.find(BLOB_CHECK_KIND.name, due)
        return await self._settle([(note.id, note.hot.decode()) for note in notes]) + await self._orphans.once(now)

    # --- inside ---------------------------------------------------------------------------------------------------

    async def _load(self, actor: Actor, id: str) -> Artifact:
        (found,) = await self._store.get(ARTIFACT_KIND.name, [id])
        artifact = None if found is None else _decode(found.hot)
        if artifact is None or artifact.tenant != actor.tenant:
            raise NotFound("there is no such artifact")
        return artifact

    async def _record(self, actor: Actor, artifacts: Sequence[Artifact]) -> None:
        now = self._clock.now()
        writes = []
        facts = []
        for artifact in artifacts:
            index: dict[str, IndexValue] = {
                "tenant": artifact.tenant,
                "sha256": artifact.sha256,
                "run": artifact.run_id,
                "name": artifact.name,
                "created": artifact.created_at,
            }
            writes.append(Entity(ARTIFACT_KIND.name, artifact.id, 0, index, _encode(artifact)))
            data = {
                "name": artifact.name,
                "size": artifact.size,
                "sha256": artifact.sha256,
                "role": artifact.role,
                "stage": artifact.stage,
            }
            facts.append(
                fact(
                    "artifact.created",
                    artifact.id,
                    actor.id,
                    now,
                    data,
                    tenant=artifact.tenant,
                    run=artifact.run_id or "",
                )
            )
        (problem,) = await self._store.commit([Change(writes=writes, facts=facts)])
        if problem is not None:
            raise problem

    def _removal(self, actor: Actor, artifact: Artifact) -> Change:
        now = self._clock.now()
        note = Entity(BLOB_CHECK_KIND.name, artifact.id, 0, {"due": now}, artifact.sha256.encode())
        deleted = fact(
            "artifact.deleted",
            artifact.id,
            actor.id,
            now,
            {"name": artifact.name},
            tenant=artifact.tenant,
            run=artifact.run_id or "",
        )
        return Change(
            writes=(note,), deletes=(Key(ARTIFACT_KIND.name, artifact.id, artifact.version),), facts=(deleted,)
        )

    async def _settle(self, notes: Sequence[tuple[str, str]]) -> int:
        """Remove the blobs of notes (note id, digest) where nothing refers to them, then the notes."""
        settled = [note for note, sha256 in notes if await self._remove_unused(sha256)]
        if settled:
            await self._store.commit([Change(deletes=tuple(Key(BLOB_CHECK_KIND.name, note) for note in settled))])
        return len(settled)

    async def _remove_unused(self, sha256: str, before: int | None = None) -> bool:
        """Remove the blob if nothing refers to it; say whether that is settled (an upload under way leaves it open).

        Args:
            sha256: its name.
            before: a blob that was stored since then stays.
        """
        if before is None and self._shared:
            before = self._clock.now() - GRACE_MS
        async with self._removing:
            if self._pinned[sha256]:
                return False
            if await self._store.count(ARTIFACT_KIND.name, (Where("sha256", "eq", sha256),), 1):
                return True
            if self._pinned[sha256]:  # began while we counted
                return False
            return await self._blobs.delete(sha256, before)

    def _unpin(self, sha256: str) -> None:
        self._pinned[sha256] -= 1
        if not self._pinned[sha256]:
            del self._pinned[sha256]


def check(new: NewArtifact) -> None:
    """Say whether the metadata is acceptable. Pure. Raises Invalid with all that is wrong."""
    errors: list[FieldError] = []

    def wrong(name: str, code: str, detail: str) -> None:
        errors.append(FieldError(pointer=f"#/{name}", code=code, detail=detail))

    if not 1 <= len(new.name) <= _NAME_CHARS:
        wrong("name", "out-of-range", f"1 to {_NAME_CHARS} characters")
    elif not new.name.isprintable() or "/" in new.name or "\\" in new.name or new.name in (".", ".."):
        # A client saves a download under this name.
        wrong("name", "invalid-character", "a file name: printable, without slashes")
    if _MEDIA_TYPE.fullmatch(new.media_type) is None:
        wrong("media_type", "invalid-character", "a media type, type/subtype")
    if new.rows is not None and not 0 <= new.rows <= _MAX_ROWS:
        wrong("rows", "out-of-range", "0 to 2^53")
    if errors:
        raise Invalid(errors[0].detail, errors=errors)


def read(entity: Entity) -> Artifact:
    """Return the artifact in a stored entity."""
    return _decode(entity.hot)


def view(artifact: Artifact) -> ArtifactView:
    """Return an artifact as callers see it."""
    return ArtifactView(
        id=artifact.id,
        name=artifact.name,
        sha256=artifact.sha256,
        size=artifact.size,
        media_type=artifact.media_type,
        role=artifact.role,
        rows=artifact.rows,
        run_id=artifact.run_id,
        stage=artifact.stage,
        task_id=artifact.task_id,
        created_at=to_datetime(artifact.created_at),
    )


def _place(artifact: Artifact, order: str | None) -> list[IndexValue]:
    return [artifact.id] if order is None else [artifact.created_at, artifact.id]
