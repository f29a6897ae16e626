"""Backoff for logins: guesses slow down, and nobody is locked out for good (OWASP ASVS 5.0, 6.1.1 and 6.3.1).

Three counters per attempt: account with address (tight), account, and address. After some free failures each further one doubles the
wait. The tight counter is what a person meets who forgot the password; the wide ones stop guessing from many places or at many
accounts. They are loose, so that an outsider cannot keep the owner out with a handful of requests.

The counters are in the store, so that guesses count on all servers alike and a restart forgets none. Without the store nobody logs in.
"""

import asyncio
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

import msgspec

from mcp_control.kernel.changes import Change, Key, Query, Where
from mcp_control.kernel.errors import Conflict, Overloaded, RateLimited
from mcp_control.security.records import LOGIN_FAILURES_KIND, LoginFailures, to_entity, to_login_failures
from mcp_control.storage.ports import Store

_FORGET_MS: Final = 3_600_000
_TRIES: Final = 20
_PAGE: Final = 500
_PAGES: Final = 20


class Allowance(msgspec.Struct, frozen=True):
    """How many failures are free, and the longest wait after them, in milliseconds."""

    free: int
    longest_ms: int


DEFAULT: Final = (Allowance(5, 300_000), Allowance(50, 60_000), Allowance(100, 60_000))


def wait_of(count: LoginFailures, allowance: Allowance, now: int) -> int:
    """Return for how many milliseconds from `now` a counter allows no attempt; bounded, whatever the clocks of servers do. Pure."""
    return min(count.until - now, allowance.longest_ms)


def one_more(count: LoginFailures | None, id: str, allowance: Allowance, now: int) -> LoginFailures:
    """Return a counter with one more failure at `now`; None is one that was never there. Pure."""
    forgotten = count is None or now - count.last > _FORGET_MS
    failures = 1 if count is None or forgotten else count.failures + 1
    over = failures - allowance.free
    return LoginFailures(
        id=id,
        version=1 if count is None else count.version + 1,
        failures=failures,
        last=now,
        until=now + min(1000 << min(over, 20), allowance.longest_ms) if over >= 0 else now,
        expires_at=now + _FORGET_MS,
    )


def one_less(count: LoginFailures) -> LoginFailures:
    """Return a counter that takes the failure back that was counted last. Pure."""
    fewer = max(0, count.failures - 1)
    return msgspec.structs.replace(count, version=count.version + 1, failures=fewer, until=count.last)


class LoginThrottle:
    """Counts failures, for all servers of a store.

    Args:
        allowances: for account with address, account, address.
    """

    def __init__(self, store: Store, allowances: tuple[Allowance, Allowance, Allowance] = DEFAULT) -> None:
        self._store = store
        self._allowances = allowances
        # Attempts of one address write the same counter: in a row they need no second try.
        self._in_a_row = asyncio.Lock()

    async def attempt(self, account: str, address: str, now: int) -> None:
        """Note an attempt as failed before its outcome is known, so that many at once cannot slip through together.

        Raises:
            RateLimited: it comes too early; `retry_after` says when the next one is allowed.
            StoreUnavailable, OutcomeUnknown, StorageFull, Overloaded: it cannot be noted, so it may not be made.
        """
        ids = _ids(account, address)
        self._check(await self._read(ids), now)  # guesses that come too early wait for nobody
        async with self._in_a_row:
            for _ in range(_TRIES):
                counts = await self._read(ids)
                self._check(counts, now)
                noted = map(one_more, counts, ids, self._allowances, [now] * len(ids))
                if await self._commit(Change(writes=[to_entity(count) for count in noted])):
                    return
        raise Overloaded("too many logins at once", retry_after=1)

    async def succeeded(self, account: str, address: str) -> None:
        """Take the attempt back: the account's owner starts afresh, and the address is not charged for it."""
        both, of_account, of_address = _ids(account, address)
        fresh = [Key(LOGIN_FAILURES_KIND.name, both), Key(LOGIN_FAILURES_KIND.name, of_account)]
        async with self._in_a_row:
            for _ in range(_TRIES):
                (count,) = await self._read([of_address])
                writes = [] if count is None else [to_entity(one_less(count))]
                if await self._commit(Change(writes=writes, deletes=fresh)):
                    return
        # The right password was given. That its address stays charged with one failure for an hour harms nobody.

    async def once(self, now: int) -> int:
        """Remove counters that are forgotten; returns how many."""
        removed = 0
        for _ in range(_PAGES):
            ended = Query(where=(Where("expires", "lt", now),), order="expires", limit=_PAGE)
            found = await self._store.find(LOGIN_FAILURES_KIND.name, ended)
            outcomes = await self._store.commit(
                [Change(deletes=(Key(LOGIN_FAILURES_KIND.name, entity.id, entity.version),)) for entity in found]
            )
            removed += sum(problem is None for problem in outcomes)
            if len(found) < _PAGE:
                break
        return removed

    def _check(self, counts: Sequence[LoginFailures | None], now: int) -> None:
        waits = [
            wait_of(count, allowance, now)
            for count, allowance in zip(counts, self._allowances, strict=True)
            if count is not None
        ]
        wait = max(waits, default=0)
        if wait > 0:
            raise RateLimited("too many failed logins", retry_after=wait / 1000)

    async def _read(self, ids: Sequence[str]) -> list[LoginFailures | None]:
        found = await self._store.get(LOGIN_FAILURES_KIND.name, ids)
        return [None if entity is None else to_login_failures(entity) for entity in found]

    async def _commit(self, change: Change) -> bool:
        """Say whether the change was made; not where another server was faster."""
        (problem,) = await self._store.commit([change])
        if problem is not None and not isinstance(problem, Conflict):
            raise problem
        return problem is None


def _ids(account: str, address: str) -> tuple[str, str, str]:
    """Return the ids of the three counters: hashes, since names may be long and hold anything."""
    both, of_account, of_address = (
        "failures_" + blake2b("\x1f".join(place).encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()
        for place in (("both", account, address), ("account", account), ("address", address))
    )
    return both, of_account, of_address
