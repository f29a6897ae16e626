"""Blobs in MongoDB, in the layout of GridFS: a document per blob in `blobs.files`, its pieces in `blobs.chunks`.

A blob is its files document: that comes last and goes first, so no name ever stands for half a blob. Until then the pieces of an upload
lie under an id of its own, so uploads of equal content do not meet, and a deleted blob never takes pieces of one that came anew along.
`blobs.uploads` notes what may leave pieces behind when a server dies; `sweep` acts on it.

The driver's bucket is not used: it holds up to 48 MB of each upload in memory, wants the name before the content, and leaves the pieces
of a dead process for ever.
"""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from bson import ObjectId
from pymongo import ReturnDocument
from pymongo.errors import DuplicateKeyError, PyMongoError

from mcp_control.kernel.errors import NotFound, PayloadTooLarge, StoreUnavailable
from mcp_control.storage.mongo.client import Database, Document, unavailable
from mcp_control.storage.ports import BlobInfo, StoredBlob

_PIECE: Final = 1 << 20
_AT_ONCE: Final = 4  # pieces in one message
_SWEPT: Final = 100
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


class _Upload:
    """Bytes on their way, cut into pieces. What is not sent yet is at most one message and one chunk."""

    def __init__(self) -> None:
        self.id = ObjectId()
        self.size = 0
        self.sent = 0
        self._hash = hashlib.sha256()
        self._buffer = bytearray()

    def add(self, chunk: bytes) -> None:
        self._hash.update(chunk)
        self._buffer += chunk
        self.size += len(chunk)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    @property
    def full(self) -> bool:
        return len(self._buffer) >= _PIECE * _AT_ONCE

    def take(self) -> list[Document]:
        """Take the documents of the next message; empty when nothing waits."""
        found: list[Document] = []
        while self._buffer and len(found) < _AT_ONCE:
            found.append({"files_id": self.id, "n": self.sent, "data": bytes(self._buffer[:_PIECE])})
            del self._buffer[:_PIECE]
            self.sent += 1
        return found


class GridFsBlobs:
    """A `Blobs` in a database of a replica set. Writes are acknowledged by a majority.

    Args:
        database: as `client.database_of` returns it.
    """

    def __init__(self, database: Database) -> None:
        self._client = database.client
        self._files = database["blobs.files"]
        self._chunks = database["blobs.chunks"]
        self._uploads = database["blobs.uploads"]
        self._indexed = False

    async def put(self, chunks: AsyncIterator[bytes], limit: int) -> BlobInfo:
        """See `Blobs.put`."""
        upload = _Upload()
        try:
            async for chunk in chunks:
                upload.add(chunk)
                if upload.size > limit:
                    raise PayloadTooLarge(f"more than {limit} bytes", limit=limit)
                while upload.full:
                    await self._send(upload)
            if upload.sent or not await self._touched(upload.sha256):
                await self._finish(upload)
        except PyMongoError as error:
            await self._abandon(upload)
            raise unavailable(error) from error
        except BaseException:
            await self._abandon(upload)
            raise
        return BlobInfo(upload.sha256, upload.size)

    async def _send(self, upload: _Upload) -> None:
        if not upload.sent:
            await self._index()
            await self._uploads.update_one({"_id": upload.id}, {"$currentDate": {"at": True}}, upsert=True)
        if pieces := upload.take():
            await self._chunks.insert_many(pieces)

    async def _touched(self, sha256: str) -> bool:
        """Store anew what is there already."""
        return (
            await self._files.update_one({"filename": sha256}, {"$currentDate": {"uploadDate": True}})
        ).matched_count == 1

    async def _finish(self, upload: _Upload) -> None:
        """Send the rest and give the blob its name, or leave it to the one that came first."""
        await self._send(upload)
        # `sweep` gives up what was silent for very long; from here on this upload is not, or it is too late.
        alive = {"_id": upload.id, "dead": {"$exists": False}}
        if not (await self._uploads.update_one(alive, {"$currentDate": {"at": True}})).matched_count:
            raise StoreUnavailable("the upload took so long that it was given up; repeat it", retry_after=1)
        there = await self._named(upload)
        if there != upload.id:
            await self._chunks.delete_many({"files_id": upload.id})
        await self._uploads.delete_one({"_id": upload.id})

    async def _named(self, upload: _Upload) -> ObjectId:
        """Make the files document, or touch the one of equal content; returns its id."""
        fresh = {"_id": upload.id, "length": upload.size, "chunkSize": _PIECE}
        update = {"$setOnInsert": fresh, "$currentDate": {"uploadDate": True}}
        while True:
            try:
                document = await self._files.find_one_and_update(
                    {"filename": upload.sha256}, update, {"_id": 1}, upsert=True, return_document=ReturnDocument.AFTER
                )
            except DuplicateKeyError:  # another one came at the same moment; the next try finds it
                continue
            assert document is not None  # it is made where there is none
            found: ObjectId = document["_id"]
            return found

    async def _abandon(self, upload: _Upload) -> None:
        """Leave nothing of an upload that failed; what cannot be removed now is left to `sweep`."""
        if upload.sent:
            cleaning = asyncio.ensure_future(self._clean(upload.id))
            try:
                await asyncio.shield(cleaning)
            except asyncio.CancelledError:
                await asyncio.wait([cleaning])
                raise
            except PyMongoError:
                pass

    async def read(self, sha256: str, start: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
        """See `Blobs.read`. A blob that is deleted meanwhile ends in NotFound."""
        try:
            # In one session no read sees less than the one before: after a change of the primary it could, and pieces would seem gone.
            async with self._client.start_session(causal_consistency=True) as session:
                find = self._files.find_one
                file = await find({"filename": sha256}, session=session) if _DIGEST.fullmatch(sha256) else None
                if file is None:
                    raise NotFound("there is no such blob")
                end = file["length"] if length is None else min(start + length, file["length"])
                while start < end:
                    first = start // _PIECE
                    wanted = {
                        "files_id": file["_id"],
                        "n": {"$gte": first, "$lt": first + _AT_ONCE, "$lte": (end - 1) // _PIECE},
                    }
                    pieces = await self._chunks.find(wanted, session=session).sort("n").to_list()
                    if not pieces:
                        raise NotFound("the blob was deleted while it was read")
                    for piece in pieces:
                        at = piece["n"] * _PIECE
                        if not at <= start < at + len(piece["data"]):
                            raise NotFound("the blob was deleted while it was read")
                        data = piece["data"][start - at : end - at]
                        start += len(data)
                        yield data
        except PyMongoError as error:
            raise unavailable(error) from error

    async def stat(self, sha256: str) -> BlobInfo | None:
        """See `Blobs.stat`."""
        if not _DIGEST.fullmatch(sha256):
            return None
        try:
            file = await self._files.find_one({"filename": sha256}, {"length": 1})
        except PyMongoError as error:
            raise unavailable(error) from error
        return None if file is None else BlobInfo(sha256, file["length"])

    async def delete(self, sha256: str, before: int | None = None) -> bool:
        """See `Blobs.delete`."""
        if not _DIGEST.fullmatch(sha256):
            return True
        try:
            file = await self._files.find_one({"filename": sha256}, {"_id": 1, "uploadDate": 1})
            if file is None:
                return True
            if before is not None and _milliseconds(file["uploadDate"]) >= before:
                return False
            # From here on a crash leaves a note for `sweep`.
            await self._uploads.update_one({"_id": file["_id"]}, {"$currentDate": {"at": True}}, upsert=True)
            doomed: Document = {"_id": file["_id"]}
            if before is not None:
                doomed["uploadDate"] = {"$lt": datetime.fromtimestamp(before / 1000, UTC)}
            await self._files.delete_one(doomed)
            return await self._clean(file["_id"])
        except PyMongoError as error:
            raise unavailable(error) from error

    async def _clean(self, id: ObjectId) -> bool:
        """Remove pieces that no files document names, and the note of them; returns whether none did."""
        gone = await self._files.find_one({"_id": id}, {"_id": 1}) is None
        if gone:
            await self._chunks.delete_many({"files_id": id})
        await self._uploads.delete_one({"_id": id})
        return gone

    async def names(self, after: str, limit: int) -> list[StoredBlob]:
        """See `Blobs.names`."""
        try:
            files = await self._files.find({"filename": {"$gt": after}}).sort("filename").limit(limit).to_list()
        except PyMongoError as error:
            raise unavailable(error) from error
        return [StoredBlob(each["filename"], each["length"], _milliseconds(each["uploadDate"])) for each in files]

    async def sweep(self, before: int) -> None:
        """See `Blobs.sweep`."""
        moment = datetime.fromtimestamp(before / 1000, UTC)
        try:
            for note in await self._uploads.find({"at": {"$lt": moment}}).limit(_SWEPT).to_list():
                last = await self._chunks.find_one({"files_id": note["_id"]}, {"_id": 1}, sort=[("n", -1)])
                if last is not None and last["_id"].generation_time >= moment:
                    continue  # a long upload that goes on
                # Compare and set: one that finishes at this very moment has moved `at`.
                mine = {"_id": note["_id"], "at": note["at"]}
                if (await self._uploads.update_one(mine, {"$set": {"dead": True}})).matched_count:
                    await self._clean(note["_id"])
        except PyMongoError as error:
            raise unavailable(error) from error

    def local_path(self, sha256: str) -> Path | None:
        """There is no such file."""
        return None

    async def _index(self) -> None:
        """Make the indexes, once per process; a second maker finds them there."""
        if not self._indexed:
            await self._files.create_index("filename", unique=True)
            await self._chunks.create_index([("files_id", 1), ("n", 1)], unique=True)
            await self._uploads.create_index("at")
            self._indexed = True


def _milliseconds(moment: datetime) -> int:
    """The driver returns UTC without saying so."""
    return round(moment.replace(tzinfo=UTC).timestamp() * 1000)
