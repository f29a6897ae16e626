"""Blobs as files: `blobs/ab/cdef…`, named by their SHA-256.

A blob is written beside its place, synced, renamed and its folder synced, so a name never stands for half a file, whatever breaks.
Hashing, reading and writing run in threads, a mebibyte at a time.
"""

import asyncio
import contextlib
import errno
import hashlib
import os
import re
import tempfile
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

from mcp_control.kernel.errors import NotFound, PayloadTooLarge, StorageFull
from mcp_control.storage.ports import BlobInfo, StoredBlob

T = TypeVar("T")
_CHUNK: Final = 1 << 20
_INCOMING: Final = "incoming"
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class _Upload:
    """A file that is being written; all methods block and run in threads, one at a time."""

    def __init__(self, folder: Path) -> None:
        self._descriptor, name = tempfile.mkstemp(dir=folder)  # mode 0600, not inherited by child processes
        self.path = Path(name)
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytearray) -> None:
        self._hash.update(data)
        view = memoryview(data)
        while view:
            view = view[os.write(self._descriptor, view) :]
        self.size += len(data)

    def finish(self, root: Path) -> BlobInfo:
        os.fsync(self._descriptor)
        digest = self._hash.hexdigest()
        place = _place(root, digest)
        if not place.parent.exists():
            place.parent.mkdir(mode=0o700, exist_ok=True)
            _sync_folder(root)
        if place.exists():
            os.utime(place)  # stored anew, see `Blobs.delete`
        else:
            self.path.rename(place)
        _sync_folder(place.parent)  # also where it was there: whoever renamed it may not have come this far yet
        return BlobInfo(digest, self.size)

    def discard(self) -> None:
        os.close(self._descriptor)
        self.path.unlink(missing_ok=True)


class FolderBlobs:
    """A `Blobs` in the folder `blobs` of the data folder, which is made when absent.

    Args:
        directory: the data folder.
        owner: whether the data folder's lock is held: then leftovers of uploads that broke off are removed. Others may read only.
    """

    def __init__(self, directory: Path, *, owner: bool = True) -> None:
        self._root = directory / "blobs"
        self._incoming = self._root / _INCOMING
        if not owner:
            return
        for folder in (directory, self._root, self._incoming):  # `parents=True` would make parents that others may read
            folder.mkdir(mode=0o700, exist_ok=True)
        for leftover in self._incoming.iterdir():
            leftover.unlink()

    async def put(self, chunks: AsyncIterator[bytes], limit: int) -> BlobInfo:
        """See `Blobs.put`."""
        try:
            upload = await asyncio.to_thread(_Upload, self._incoming)
            try:
                buffer = bytearray()
                async for chunk in chunks:
                    buffer += chunk
                    if upload.size + len(buffer) > limit:
                        raise PayloadTooLarge(f"more than {limit} bytes", limit=limit)
                    if len(buffer) >= _CHUNK:
                        await _to_the_end(asyncio.to_thread(upload.write, buffer))
                        buffer = bytearray()
                await _to_the_end(asyncio.to_thread(upload.write, buffer))
                return await _to_the_end(asyncio.to_thread(upload.finish, self._root))
            finally:
                upload.discard()
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise StorageFull("there is no space for this blob", retry_after=5) from error
            raise

    async def read(self, sha256: str, start: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
        """See `Blobs.read`."""
        path = self._known(sha256)
        try:
            descriptor = await asyncio.to_thread(os.open, path, os.O_RDONLY | os.O_CLOEXEC) if path else None
        except FileNotFoundError:
            descriptor = None
        if descriptor is None:
            raise NotFound("there is no such blob")
        try:
            while length is None or length > 0:
                wanted = _CHUNK if length is None else min(_CHUNK, length)
                data = await _to_the_end(asyncio.to_thread(os.pread, descriptor, wanted, start))
                if not data:
                    return
                yield data
                start += len(data)
                length = None if length is None else length - len(data)
        finally:
            os.close(descriptor)

    async def stat(self, sha256: str) -> BlobInfo | None:
        """See `Blobs.stat`."""
        path = self._known(sha256)
        with contextlib.suppress(FileNotFoundError):
            if path is not None:
                return BlobInfo(sha256, (await asyncio.to_thread(path.stat)).st_size)
        return None

    async def delete(self, sha256: str, before: int | None = None) -> bool:
        """See `Blobs.delete`."""
        path = self._known(sha256)
        return path is None or await asyncio.to_thread(_delete, path, before)

    async def names(self, after: str, limit: int) -> list[StoredBlob]:
        """See `Blobs.names`."""
        return await asyncio.to_thread(self._names, after, limit)

    async def sweep(self, before: int) -> None:
        """See `Blobs.sweep`. What an earlier server left is removed at the start; this one's uploads clear up after themselves."""

    def local_path(self, sha256: str) -> Path | None:
        """See `Blobs.local_path`."""
        path = self._known(sha256)
        return path if path is not None and path.exists() else None

    def _names(self, after: str, limit: int) -> list[StoredBlob]:
        found: list[StoredBlob] = []
        for folder in sorted(path.name for path in self._root.iterdir() if path.name != _INCOMING):
            if folder < after[:2]:
                continue
            for rest in sorted(os.listdir(self._root / folder)):
                if len(found) == limit:
                    return found
                if folder + rest > after:
                    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                        status = _place(self._root, folder + rest).stat()
                        found.append(StoredBlob(folder + rest, status.st_size, status.st_mtime_ns // 1_000_000))
        return found

    def _known(self, sha256: str) -> Path | None:
        """Return where the blob lies; None for what is no digest, which keeps other paths out of reach."""
        return _place(self._root, sha256) if _DIGEST.fullmatch(sha256) else None


def _delete(path: Path, before: int | None) -> bool:
    try:
        if before is not None and path.stat().st_mtime_ns // 1_000_000 >= before:
            return False
        path.unlink()
    except FileNotFoundError:
        pass
    return True


async def _to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Await work in a thread even when cancelled: its descriptor must not be closed, and given out again, under it."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _place(root: Path, digest: str) -> Path:
    return root / digest[:2] / digest[2:]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
