"""Blobs that nothing names: a server died between the bytes and their artifact, or could not learn whether its commit was done."""

from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from mcp_control.artifacts.model import ARTIFACT_KIND, Artifact
from mcp_control.kernel.changes import Query, Where
from mcp_control.storage.ports import Blobs, Store

ORPHAN_MS: Final = 3_600_000
_PASS_MS: Final = 3_600_000
_BROKEN_OFF_MS: Final = 86_400_000

_decode: Final = msgspec.msgpack.Decoder(Artifact).decode


class OrphanPass:
    """Looks through all blobs, a bounded way in each call; a new pass begins an hour after the end of the last.

    Args:
        store: holds the artifacts.
        blobs: the blobs.
        remove: removes a blob (its name; a moment, those put since then stay) if nothing refers to it, and says whether it is gone.
        page: blobs looked at together.
        pages: pages in one call.
    """

    def __init__(
        self,
        store: Store,
        blobs: Blobs,
        remove: Callable[[str, int], Awaitable[bool]],
        *,
        page: int = 500,
        pages: int = 10,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._remove = remove
        self._page = page
        self._pages = pages
        self._after = ""
        self._next_pass = 0

    async def once(self, now: int) -> int:
        """Go on with the pass; returns how many blobs were removed."""
        removed = 0
        for _ in range(self._pages if now >= self._next_pass else 0):
            page = await self._blobs.names(self._after, self._page)
            old = [blob.sha256 for blob in page if blob.stored_at < now - ORPHAN_MS]
            known = await self._named(old)
            for sha256 in old:
                if sha256 not in known:
                    removed += await self._remove(sha256, now - ORPHAN_MS)
            self._after = page[-1].sha256 if page else ""
            if len(page) < self._page:
                await self._blobs.sweep(now - _BROKEN_OFF_MS)
                self._after, self._next_pass = "", now + _PASS_MS
                break
        return removed

    async def _named(self, digests: list[str]) -> set[str]:
        """Return most of those that artifacts name; `remove` looks again at the rest."""
        wanted = Query(where=(Where("sha256", "in", digests),), order="sha256", limit=2 * self._page)
        return {_decode(entity.hot).sha256 for entity in await self._store.find(ARTIFACT_KIND.name, wanted)}
