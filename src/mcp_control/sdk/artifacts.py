"""Artifacts: upload from files, bytes or streams; download with the digest checked, taken up where a connection broke.

A program on the server's machine reads the blob file itself where it may: no byte travels.
"""

import asyncio
import base64
import hashlib
import os
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypedDict, Unpack

import msgspec

from mcp_control.artifacts.model import ArtifactView, Role
from mcp_control.sdk import calls
from mcp_control.sdk.calls import Location
from mcp_control.sdk.errors import DigestMismatch, Unreachable
from mcp_control.sdk.transport import ATTEMPTS

if TYPE_CHECKING:
    from mcp_control.sdk.client import AsyncClient, Client

CHUNK: Final = 1 << 20
Source = Path | bytes | bytearray | memoryview | Iterable[bytes]


class UploadOptions(TypedDict, total=False):
    """What may be said about an artifact. `rows` counts records, for data."""

    media_type: str
    role: Role
    rows: int
    run_id: str | None
    stage: str | None
    task_id: str | None


class _Upload:
    """One upload, whichever client carries it out. Its digest is counted on the way and compared with the server's answer."""

    def __init__(self, source: object, name: str | None, fields: Mapping[str, object]) -> None:
        if isinstance(source, str):
            raise TypeError("a str is neither bytes nor a Path: say which is meant")
        self.source = source
        self.again = isinstance(source, Path | bytes | bytearray | memoryview)
        known = dict(fields)
        token = known.pop("lease_token", None)
        chosen = name or (source.name if isinstance(source, Path) else None)
        if not chosen:
            raise TypeError("what is not a file needs a name")
        self._hash = hashlib.sha256()
        digest: str | None = None
        if isinstance(source, bytes | bytearray | memoryview):
            digest = f"sha-256=:{base64.b64encode(hashlib.sha256(source).digest()).decode()}:"
        fields = {"name": chosen, **known}
        self.call = calls.upload_call(fields, str(token) if token else None, digest, repeatable=self.again)

    def begin(self) -> None:
        self._hash = hashlib.sha256()

    def counted(self, chunk: bytes) -> bytes:
        self._hash.update(chunk)
        return chunk

    def finish(self, body: bytes) -> ArtifactView:
        view = msgspec.json.decode(body, type=ArtifactView)
        if view.sha256 != self._hash.hexdigest():
            raise DigestMismatch(f"artifact {view.id}: the server has other bytes than were sent")
        return view

    def chunks(self) -> Iterator[bytes]:
        self.begin()
        source = self.source
        if isinstance(source, Path):
            with source.open("rb") as file:
                while chunk := file.read(CHUNK):
                    yield self.counted(chunk)
        elif isinstance(source, bytes | bytearray | memoryview):
            view = memoryview(source)
            for at in range(0, len(view), CHUNK):
                yield self.counted(bytes(view[at : at + CHUNK]))
        elif isinstance(source, Iterable):
            for chunk in source:
                yield self.counted(chunk)
        else:
            raise TypeError("an asynchronous source needs the async client")

    async def achunks(self) -> AsyncIterator[bytes]:
        if isinstance(self.source, AsyncIterable):
            self.begin()
            async for chunk in self.source:
                yield self.counted(chunk)
            return
        blocking = self.chunks()
        while (chunk := await asyncio.to_thread(next, blocking, None)) is not None:
            yield chunk


class _Download:
    """A file that grows: bytes go to a hidden neighbour of the target, which takes the target's name when the digest is right."""

    def __init__(self, view: ArtifactView, target: Path) -> None:
        self.view = view
        self.target = target
        self.offset = 0
        self._part = target.with_name(f".{target.name}.{os.getpid()}.part")
        self._hash = hashlib.sha256()
        self._file: BinaryIO = self._part.open("wb")

    def begin(self, status: int) -> None:
        """An answer begins; one that is not partial starts from the first byte."""
        if status != 206 and self.offset:
            self._file.seek(0)
            self._file.truncate()
            self.offset = 0
            self._hash = hashlib.sha256()

    def feed(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._hash.update(chunk)
        self.offset += len(chunk)

    @property
    def complete(self) -> bool:
        return self.offset >= self.view.size

    def finish(self) -> Path:
        self._file.close()
        if self._hash.hexdigest() != self.view.sha256:
            raise DigestMismatch(f"artifact {self.view.id}: the downloaded bytes do not have its digest")
        os.replace(self._part, self.target)
        return self.target

    def abandon(self) -> None:
        self._file.close()
        with suppress(FileNotFoundError):
            self._part.unlink()


def local_file(location: Location) -> Path | None:
    """Return the blob's file where this process can read it and it has the right size."""
    if location.path is None:
        return None
    path = Path(location.path)
    with suppress(OSError):
        if path.stat().st_size == location.size and os.access(path, os.R_OK):
            return path
    return None


def _copied(location: Location, target: Path) -> bool:
    """Copy the blob's file to `target` and say whether its bytes are the artifact's; otherwise there is no `target`."""
    if (source := local_file(location)) is None:
        return False
    found = hashlib.sha256()
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with source.open("rb") as blob, part.open("wb") as copy:
            while chunk := blob.read(CHUNK):
                found.update(chunk)
                copy.write(chunk)
        if found.hexdigest() != location.sha256:
            return False
        os.replace(part, target)
        return True
    finally:
        part.unlink(missing_ok=True)


class Artifacts:
    """`client.artifacts`."""

    def __init__(self, client: "Client") -> None:
        self._client = client

    def upload(self, source: Source, name: str | None = None, **options: Unpack[UploadOptions]) -> ArtifactView:
        """Store a file (Path), bytes, or the chunks of an iterable. The name is the file's by default.

        Raises:
            DigestMismatch: the server has other bytes than were sent.
            ApiProblem, Unreachable: files and bytes are sent again a few times first.
        """
        return self._upload(_Upload(source, name, options))

    def _upload(self, upload: _Upload, attempts: int | None = ATTEMPTS) -> ArtifactView:
        def once() -> ArtifactView:
            with self._client.transport.stream(upload.call, upload.chunks()) as response:
                return upload.finish(response.read())

        return self._client.transport.repeated(once, attempts if upload.again else 1)

    def download(self, artifact_id: str, target: Path) -> Path:
        """Write the bytes to the file `target` and return it. It appears whole or not at all.

        Raises:
            DigestMismatch: the bytes that came are not the artifact's.
            ApiProblem, Unreachable: a broken download is taken up a few times first.
        """
        return target if _copied(self.location(artifact_id), target) else self._fetch(artifact_id, target)

    def _fetch(self, artifact_id: str, target: Path) -> Path:
        download = _Download(self.get(artifact_id), target)

        def once() -> Path:
            with self._client.transport.stream(calls.content_call(artifact_id, download.offset)) as response:
                download.begin(response.status_code)
                for chunk in response.iter_raw():
                    download.feed(chunk)
            if not download.complete:
                raise Unreachable(f"artifact {artifact_id}: the server sends fewer bytes than it has")
            return download.finish()

        try:
            return self._client.transport.repeated(once)
        finally:
            download.abandon()

    def local(self, artifact_id: str, folder: Path) -> Path:
        """Return a file with the bytes, to be read only: the blob itself on the server's machine, else a download into `folder`."""
        return local_file(self.location(artifact_id)) or self._fetch(artifact_id, folder / artifact_id)

    def read(self, artifact_id: str) -> bytes:
        """Return the bytes of a small artifact. Raises DigestMismatch, ApiProblem, Unreachable."""
        body = self._client.transport.send(calls.content_call(artifact_id, 0)).body
        return _checked(self.get(artifact_id), body)

    def get(self, artifact_id: str) -> ArtifactView:
        """Read what is known of an artifact."""
        return self._client.do(calls.get_artifact(artifact_id))

    def location(self, artifact_id: str) -> Location:
        """Ask where the bytes are on the server's machine."""
        return self._client.do(calls.artifact_location(artifact_id))

    def iter(self, **filters: Any) -> Iterator[ArtifactView]:
        """Yield artifacts; filters are `run`, `name`, `role`."""
        return self._client.pages(lambda cursor: calls.list_artifacts(cursor=cursor, **filters))

    def delete(self, artifact_id: str) -> None:
        """Delete an artifact."""
        self._client.do(calls.delete_artifact(artifact_id))


class AsyncArtifacts:
    """`client.artifacts` of the async client; the same names. Files are read and written in threads."""

    def __init__(self, client: "AsyncClient") -> None:
        self._client = client

    async def upload(
        self, source: Source | AsyncIterable[bytes], name: str | None = None, **options: Unpack[UploadOptions]
    ) -> ArtifactView:
        """Store a file (Path), bytes, or the chunks of an iterable; see `Artifacts.upload`."""
        return await self._upload(_Upload(source, name, options))

    async def _upload(self, upload: _Upload, attempts: int | None = ATTEMPTS) -> ArtifactView:
        async def once() -> ArtifactView:
            async with self._client.transport.stream(upload.call, upload.achunks()) as response:
                return upload.finish(await response.aread())

        return await self._client.transport.repeated(once, attempts if upload.again else 1)

    async def download(self, artifact_id: str, target: Path) -> Path:
        """Write the bytes to the file `target` and return it; see `Artifacts.download`."""
        copied = await asyncio.to_thread(_copied, await self.location(artifact_id), target)
        return target if copied else await self._fetch(artifact_id, target)

    async def _fetch(self, artifact_id: str, target: Path) -> Path:
        download = _Download(await self.get(artifact_id), target)

        async def once() -> Path:
            async with self._client.transport.stream(calls.content_call(artifact_id, download.offset)) as response:
                download.begin(response.status_code)
                async for chunk in response.aiter_raw():
                    await asyncio.to_thread(download.feed, chunk)
            if not download.complete:
                raise Unreachable(f"artifact {artifact_id}: the server sends fewer bytes than it has")
            return download.finish()

        try:
            return await self._client.transport.repeated(once)
        finally:
            download.abandon()

    async def local(self, artifact_id: str, folder: Path) -> Path:
        """Return a file with the bytes, to be read only: the blob itself on the server's machine, else a download into `folder`."""
        return local_file(await self.location(artifact_id)) or await self._fetch(artifact_id, folder / artifact_id)

    async def read(self, artifact_id: str) -> bytes:
        """Return the bytes of a small artifact. Raises DigestMismatch, ApiProblem, Unreachable."""
        reply = await self._client.transport.send(calls.content_call(artifact_id, 0))
        return _checked(await self.get(artifact_id), reply.body)

    async def get(self, artifact_id: str) -> ArtifactView:
        """Read what is known of an artifact."""
        return await self._client.do(calls.get_artifact(artifact_id))

    async def location(self, artifact_id: str) -> Location:
        """Ask where the bytes are on the server's machine."""
        return await self._client.do(calls.artifact_location(artifact_id))

    def iter(self, **filters: Any) -> AsyncIterator[ArtifactView]:
        """Yield artifacts; filters are `run`, `name`, `role`."""
        return self._client.pages(lambda cursor: calls.list_artifacts(cursor=cursor, **filters))

    async def delete(self, artifact_id: str) -> None:
        """Delete an artifact."""
        await self._client.do(calls.delete_artifact(artifact_id))


def _checked(view: ArtifactView, body: bytes) -> bytes:
    if hashlib.sha256(body).hexdigest() != view.sha256:
        raise DigestMismatch(f"artifact {view.id}: the downloaded bytes do not have its digest")
    return body


class TaskArtifacts:
    """`ctx.artifacts` in threads and processes: what is uploaded belongs to the task, its stage and its run.

    Files and bytes are sent again for 30 s, so that a server that restarts does not cost the attempt.
    """

    def __init__(self, client: "Client", owner: Mapping[str, str | None]) -> None:
        self._all = client.artifacts
        self._owner = dict(owner)

    def upload(self, source: Source, name: str | None = None, **options: Unpack[UploadOptions]) -> ArtifactView:
        """Store a file (Path), bytes, or the chunks of an iterable; see `Artifacts.upload`."""
        return self._all._upload(_Upload(source, name, {**self._owner, **options}), attempts=None)

    def download(self, artifact_id: str, target: Path) -> Path:
        """Write the bytes to the file `target` and return it; see `Artifacts.download`."""
        return self._all.download(artifact_id, target)

    def local(self, artifact_id: str, folder: Path) -> Path:
        """Return a file with the bytes, to be read only; see `Artifacts.local`."""
        return self._all.local(artifact_id, folder)

    def read(self, artifact_id: str) -> bytes:
        """Return the bytes of a small artifact."""
        return self._all.read(artifact_id)

    def get(self, artifact_id: str) -> ArtifactView:
        """Read what is known of an artifact."""
        return self._all.get(artifact_id)


class AsyncTaskArtifacts:
    """`ctx.artifacts` in coroutines; see `TaskArtifacts`."""

    def __init__(self, client: "AsyncClient", owner: Mapping[str, str | None]) -> None:
        self._all = client.artifacts
        self._owner = dict(owner)

    async def upload(
        self, source: Source | AsyncIterable[bytes], name: str | None = None, **options: Unpack[UploadOptions]
    ) -> ArtifactView:
        """Store a file (Path), bytes, or the chunks of an iterable; see `Artifacts.upload`."""
        return await self._all._upload(_Upload(source, name, {**self._owner, **options}), attempts=None)

    async def download(self, artifact_id: str, target: Path) -> Path:
        """Write the bytes to the file `target` and return it; see `Artifacts.download`."""
        return await self._all.download(artifact_id, target)

    async def local(self, artifact_id: str, folder: Path) -> Path:
        """Return a file with the bytes, to be read only; see `Artifacts.local`."""
        return await self._all.local(artifact_id, folder)

    async def read(self, artifact_id: str) -> bytes:
        """Return the bytes of a small artifact."""
        return await self._all.read(artifact_id)

    async def get(self, artifact_id: str) -> ArtifactView:
        """Read what is known of an artifact."""
        return await self._all.get(artifact_id)
