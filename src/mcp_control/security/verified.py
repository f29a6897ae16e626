"""Credentials that were verified a moment ago, so that a request does not pay for a signature or a read each time."""

from hashlib import sha256

import msgspec

from mcp_control.security.model import Actor


class _Entry(msgspec.Struct, frozen=True):
    actor: Actor
    until: int


class VerifiedCache:
    """Remembers verified credentials for a short time, by a hash of what was presented: a dump of it holds no secret.

    Args:
        recheck_ms: how long an answer holds; after it the credential is looked up again, so a revocation by another server takes
            effect within this time. One by this server takes effect at once (`forget`).
        size: entries kept; the oldest goes first.
    """

    def __init__(self, recheck_ms: int = 4_000, size: int = 10_000) -> None:
        self._recheck_ms = recheck_ms
        self._size = size
        self._entries: dict[bytes, _Entry] = {}

    def get(self, header: str, now: int) -> Actor | None:
        """Return the actor of this Authorization header if it was verified a moment ago."""
        entry = self._entries.get(sha256(header.encode("utf-8", "surrogatepass")).digest())
        # A clock that was set back must not make an answer hold longer.
        if entry is not None and now < entry.until <= now + self._recheck_ms:
            return entry.actor
        return None

    def put(self, header: str, actor: Actor, now: int) -> None:
        """Remember that this header stands for the actor."""
        key = sha256(header.encode("utf-8", "surrogatepass")).digest()
        until = now + self._recheck_ms
        self._entries.pop(key, None)
        self._entries[key] = _Entry(actor, until if actor.expires_at is None else min(until, actor.expires_at))
        if len(self._entries) > self._size:
            del self._entries[next(iter(self._entries))]

    def forget(self, id: str) -> None:
        """Forget what was verified for a credential, user or agent. Rare, so it looks through all."""
        self._entries = {
            key: entry for key, entry in self._entries.items() if id not in (entry.actor.id, entry.actor.credential)
        }
