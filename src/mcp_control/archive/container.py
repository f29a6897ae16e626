"""The file of a backup: a tar archive whose last members say what must be in it.

Members are small, so that neither writing nor reading needs much memory, and a damaged byte is named by the member it is in:

    header.json                   `Header`
    entities/<kind>/<number>.zst  pages of entities, msgpack, in the order of their ids
    facts/<number>.zst            pages of events
    blobs/<sha256>/<number>.zst   pieces of blobs
    manifest.json, manifest.sha256

Each `.zst` is a Zstandard frame with a checksum of its own (RFC 8878).
"""

import io
import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Final

import zstandard

from mcp_control.archive.model import BackupDamaged, Member

MEMBER_BYTES: Final = 256 << 20  # of one member, packed or not; more is not ours
_MANIFEST: Final = "manifest.json"
_SEAL: Final = "manifest.sha256"


class ContainerWriter:
    """Writes members one after the other."""

    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        self._compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
        self.members: list[Member] = []

    def packed(self, name: str, data: bytes) -> None:
        """Add a member, compressed."""
        self.plain(name, self._compressor.compress(data))

    def plain(self, name: str, data: bytes) -> None:
        """Add a member as it is."""
        self._add(name, data)
        self.members.append(Member(name=name, size=len(data), sha256=sha256(data).hexdigest()))

    def seal(self, manifest: bytes) -> None:
        """Add the manifest and its digest; nothing may follow."""
        self._add(_MANIFEST, manifest)
        self._add(_SEAL, sha256(manifest).hexdigest().encode())

    def _add(self, name: str, data: bytes) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        entry.mode = 0o600
        self._archive.addfile(entry, io.BytesIO(data))


@contextmanager
def written(path: Path) -> Iterator[ContainerWriter]:
    """Write a file that is there whole and durable, or not at all; only its owner may read it (mode 0600)."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
                yield ContainerWriter(archive)
            file.flush()
            os.fsync(file.fileno())
        Path(name).rename(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def members(path: Path) -> Iterator[tuple[Member, bytes]]:
    """Return the members with their bytes, in order.

    Raises:
        BackupDamaged: the file is no archive of ours, or ends too early. Whether the bytes are right is for the manifest to say.
        OSError: it cannot be read.
    """
    before = "the beginning of the file"
    sealed = False
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r|") as archive:
                for entry in archive:
                    before = entry.name
                    if not entry.isreg() or entry.size > MEMBER_BYTES:
                        raise BackupDamaged(entry.name[:200], "it is no part of a backup")
                    stream = archive.extractfile(entry)
                    data = b"" if stream is None else stream.read()
                    if len(data) != entry.size:
                        raise BackupDamaged(entry.name, "the file ends inside it")
                    yield Member(name=entry.name, size=len(data), sha256=sha256(data).hexdigest()), data
                    sealed = entry.name == _SEAL
        except tarfile.TarError as error:
            raise BackupDamaged(f"after {before}", f"it is no backup, or it is cut off ({error})") from None
    if not sealed:
        raise BackupDamaged(f"after {before}", "the file ends too early, or is damaged there")


def unpacked(name: str, data: bytes) -> bytes:
    """Return the content of a compressed member. Raises BackupDamaged."""
    try:
        if zstandard.frame_content_size(data) > MEMBER_BYTES:
            raise BackupDamaged(name, "it would be larger than any part of a backup")
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=MEMBER_BYTES)
    except zstandard.ZstdError as error:
        raise BackupDamaged(name, f"its bytes are not those that were written ({error})") from None


def is_manifest(name: str) -> bool:
    """Say whether this is the member that says what must be in the file."""
    return name == _MANIFEST


def is_seal(name: str) -> bool:
    """Say whether this is the last member, which holds the digest of the manifest."""
    return name == _SEAL
