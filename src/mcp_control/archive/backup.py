"""Backups: writing one of a store in use, and reading one back with everything checked."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec

from mcp_control.archive.container import ContainerWriter, is_manifest, is_seal, members, unpacked, written
from mcp_control.archive.model import BACKUP_FORMAT, BackupDamaged, BlobEntry, Header, Manifest, Member
from mcp_control.archive.rows import (
    FactDigest,
    KindDigest,
    pack_entity,
    pack_facts,
    pack_page,
    unpack_facts,
    unpack_page,
)
from mcp_control.artifacts.model import ARTIFACT_KIND
from mcp_control.kernel.changes import Entity, StoredFact
from mcp_control.kernel.errors import NotFound
from mcp_control.storage.ports import Archive, Blobs

Progress = Callable[[str], None]
"""Told what goes on, in a few words, now and then."""

_PIECE_BYTES: Final = 4 << 20
_json: Final = msgspec.json.Encoder().encode


class EntityPage(msgspec.Struct, frozen=True):
    """Entities of one kind, in the order of their ids."""

    kind: str
    entities: list[Entity]


class FactPage(msgspec.Struct, frozen=True):
    """Facts in order."""

    facts: list[StoredFact]


class BlobPiece(msgspec.Struct, frozen=True):
    """A piece of a blob; pieces come in order, and `last` ends the blob."""

    sha256: str
    data: bytes
    last: bool


Part = Header | EntityPage | FactPage | BlobPiece | Manifest


class Parts:
    """Writes the parts of a backup after its header, and counts them for the manifest."""

    def __init__(self, file: ContainerWriter, header: Header) -> None:
        self._file = file
        self._kinds = {kind.name: KindDigest(kind.name) for kind in header.kinds}
        self._pages = dict.fromkeys(self._kinds, 0)
        self._facts = FactDigest()
        self._fact_pages = 0
        self._blobs: list[BlobEntry] = []
        self._missing: list[str] = []
        file.plain("header.json", _json(header))

    def entities(self, kind: str, page: Sequence[Entity]) -> int:
        """Write entities of a kind; returns how many of it there are now."""
        rows = [pack_entity(entity) for entity in page]
        digest = self._kinds[kind]
        for row in rows:
            digest.add(row)
        self._pages[kind] += 1
        self._file.packed(f"entities/{kind}/{self._pages[kind]:08d}.zst", pack_page(rows))
        return digest.total.count

    def facts(self, page: Sequence[StoredFact]) -> int:
        """Write facts; returns how many there are now."""
        self._facts.add(page)
        self._fact_pages += 1
        self._file.packed(f"facts/{self._fact_pages:08d}.zst", pack_facts(page))
        return self._facts.total.count

    async def blob(self, digest: str, chunks: AsyncIterator[bytes]) -> None:
        """Write a blob in pieces; one that is not there is noted as missing. Compresses in a thread."""
        number = size = 0
        buffer = bytearray()

        async def piece(length: int) -> None:
            nonlocal number
            number += 1
            name = f"blobs/{digest}/{number:06d}.zst"
            await asyncio.to_thread(self._file.packed, name, bytes(buffer[:length]))
            del buffer[:length]

        try:
            async for chunk in chunks:
                buffer += chunk
                size += len(chunk)
                while len(buffer) > _PIECE_BYTES:
                    await piece(_PIECE_BYTES)
        except NotFound:
            if number:
                raise
            self._missing.append(digest)
            return
        await piece(len(buffer))
        self._blobs.append(BlobEntry(sha256=digest, size=size))

    def seal(self, *, blobs_left_out: bool = False) -> Manifest:
        """Write the manifest, after which nothing may follow."""
        manifest = Manifest(
            kinds=[digest.total for digest in self._kinds.values()],
            facts=self._facts.total,
            blobs=self._blobs,
            blobs_left_out=blobs_left_out,
            blobs_missing=self._missing,
            members=self._file.members,
        )
        self._file.seal(_json(manifest))
        return manifest


async def create(
    archive: Archive, blobs: Blobs | None, path: Path, *, store: str, product: str, now: int, progress: Progress
) -> Manifest:
    """Write a backup of one moment of a store, which may be in use.

    Args:
        archive: the store.
        blobs: its blobs; None leaves them out.
        path: the file; one that is there is replaced when all is written.
        store: name of the kind of store.
        product: version of this program.
        now: wall milliseconds.
        progress: told what goes on.

    Raises:
        StoreUnavailable: the store cannot be read.
        OSError: the file cannot be written.
    """
    with written(path) as file:
        digests: set[str] = set()
        async with archive.snapshot() as snapshot:
            header = Header(
                product=product,
                store=store,
                created_at=now,
                newest_seq=snapshot.newest_seq,
                kinds=sorted(snapshot.kinds, key=lambda kind: kind.name),
            )
            parts = Parts(file, header)
            for kind in header.kinds:
                async for page in snapshot.entities(kind.name):
                    if kind.name == ARTIFACT_KIND.name:
                        digests.update(str(entity.index["sha256"]) for entity in page)
                    progress(f"{kind.name}: {parts.entities(kind.name, page)}")
            async for facts in snapshot.facts():
                progress(f"events: {parts.facts(facts)}")
        # Behind the snapshot, which holds up the store's log. A blob that goes meanwhile belongs to an artifact deleted meanwhile.
        for number, digest in enumerate(sorted(digests) if blobs is not None else (), 1):
            assert blobs is not None
            progress(f"blob {number} of {len(digests)}")
            await parts.blob(digest, blobs.read(digest))
        return parts.seal(blobs_left_out=blobs is None)


def read(path: Path) -> Iterator[Part]:
    """Return what is in a backup, part by part, checked as far as it came; the manifest comes last, when everything was right.

    Raises:
        BackupDamaged: names the first bad part. What was returned before may be bad, too.
        OSError: the file cannot be read.
    """
    reading = _Reading()
    sealed: tuple[Manifest, str] | None = None
    for member, data in members(path):
        if is_manifest(member.name):
            try:
                sealed = msgspec.json.decode(data, type=Manifest), member.sha256
            except msgspec.MsgspecError:
                raise BackupDamaged(member.name, "it is not what was written") from None
        elif is_seal(member.name):
            if sealed is None or data != sealed[1].encode():
                raise BackupDamaged("manifest.json", "it is not what was written")
        elif sealed is not None:
            raise BackupDamaged(member.name, "it stands behind the manifest")
        else:
            yield reading.part(member, data)
    assert sealed is not None  # `members` ends well only behind the seal
    reading.compare(sealed[0])
    yield sealed[0]


def verify(path: Path, progress: Progress) -> tuple[Header, Manifest]:
    """Read a whole backup and compare every digest. Raises BackupDamaged with the first bad part, or OSError."""
    header: Header | None = None
    for number, part in enumerate(read(path), 1):
        progress(f"part {number}")
        if isinstance(part, Header):
            header = part
        elif isinstance(part, Manifest):
            assert header is not None  # `read` sees to it
            return header, part
    raise AssertionError("a backup that was read to its end has a manifest")


class _Reading:
    """What was seen of a backup so far."""

    def __init__(self) -> None:
        self._members: list[Member] = []
        self._header: Header | None = None
        self._kinds: dict[str, KindDigest] = {}
        self._facts = FactDigest()
        self._blob = ""
        self._blob_size = 0
        self._blob_digest = sha256()
        self._blobs: list[BlobEntry] = []

    def part(self, member: Member, data: bytes) -> Part:
        """Return what a member holds. Raises BackupDamaged."""
        self._members.append(member)
        if self._header is None:
            self._header = _header(member.name, data)
            self._kinds = {kind.name: KindDigest(kind.name) for kind in self._header.kinds}
            return self._header
        folder, _, rest = member.name.partition("/")
        content = unpacked(member.name, data)
        try:
            match folder:
                case "entities":
                    return self._page(rest.partition("/")[0], content)
                case "facts":
                    facts = unpack_facts(content)
                    self._facts.add(facts)
                    return FactPage(facts)
                case "blobs":
                    return self._piece(rest.partition("/")[0], content)
                case _:
                    raise BackupDamaged(member.name, "it is no part of a backup")
        except (msgspec.MsgspecError, ValueError, KeyError) as error:
            raise BackupDamaged(member.name, f"it is not what was written ({error})") from None

    def _page(self, kind: str, content: bytes) -> EntityPage:
        digest = self._kinds[kind]
        entities = []
        for entity, packed in unpack_page(kind, content):
            digest.add(packed)
            entities.append(entity)
        return EntityPage(kind, entities)

    def _piece(self, digest: str, content: bytes) -> BlobPiece:
        if digest != self._blob:
            if self._blob:
                raise ValueError(f"the blob before, {self._blob}, is not whole")
            self._blob, self._blob_size, self._blob_digest = digest, 0, sha256()
        self._blob_size += len(content)
        self._blob_digest.update(content)
        last = self._blob_digest.hexdigest() == digest
        if last:
            self._blobs.append(BlobEntry(sha256=digest, size=self._blob_size))
            self._blob = ""
        return BlobPiece(digest, content, last)

    def compare(self, manifest: Manifest) -> None:
        """Compare what was seen with what must be there. Raises BackupDamaged."""
        for place, wanted in enumerate(manifest.members):
            if place >= len(self._members):
                raise BackupDamaged(wanted.name, "it is missing")
            if self._members[place] != wanted:
                raise BackupDamaged(self._members[place].name, "its bytes are not those that were written")
        if len(self._members) > len(manifest.members):
            raise BackupDamaged(self._members[len(manifest.members)].name, "nobody wrote it")
        if self._blob:
            raise BackupDamaged(f"blob {self._blob}", "its bytes are not those of its name")
        for count in manifest.kinds:
            if count.name not in self._kinds or self._kinds[count.name].total != count:
                raise BackupDamaged(f"kind {count.name}", "count or digest differ")
        if self._facts.total != manifest.facts:
            raise BackupDamaged("events", "count or digest differ")
        if self._blobs != manifest.blobs:
            raise BackupDamaged("blobs", "they are not those of the manifest")


def _header(name: str, data: bytes) -> Header:
    try:
        version = msgspec.json.decode(data).get("format")
        if name != "header.json" or not isinstance(version, int):
            raise BackupDamaged(name[:200], "this is no backup")
        if version > BACKUP_FORMAT:
            raise BackupDamaged(
                name, f"a newer version wrote this file (format {version}); take its program to read it"
            )
        return msgspec.json.decode(data, type=Header)
    except (msgspec.MsgspecError, AttributeError):
        raise BackupDamaged(name[:200], "this is no backup") from None
