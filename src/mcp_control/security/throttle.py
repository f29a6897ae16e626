"""Backoff for logins: guesses slow down, and nobody is locked out for good (OWASP ASVS 5.0, 6.1.1 and 6.3.1).

Three counters per attempt: account with address (tight), account, and address. After some free failures each further one doubles the
wait. The tight counter is what a person meets who forgot the password; the wide ones stop guessing from many places or at many
accounts. They are loose, so that an outsider cannot keep the owner out with a handful of requests.
"""

from typing import Final

import msgspec

from mcp_control.kernel.errors import RateLimited

_FORGET_MS: Final = 3_600_000


class Allowance(msgspec.Struct, frozen=True):
    """How many failures are free, and the longest wait after them, in milliseconds."""

    free: int
    longest_ms: int


class _Count(msgspec.Struct):
    failures: int
    last: int
    until: int


DEFAULT: Final = (Allowance(5, 300_000), Allowance(50, 60_000), Allowance(100, 60_000))


class LoginThrottle:
    """Counts failures in memory.

    Args:
        allowances: for account with address, account, address.
        size: counters kept; the one that was used longest ago goes first.
    """

    def __init__(self, allowances: tuple[Allowance, Allowance, Allowance] = DEFAULT, size: int = 50_000) -> None:
        self._allowances = allowances
        self._size = size
        self._counts: dict[tuple[str, str], _Count] = {}

    def attempt(self, account: str, address: str, now: int) -> None:
        """Note an attempt as failed before its outcome is known, so that many at once cannot slip through together.

        Raises:
            RateLimited: it comes too early; `retry_after` says when the next one is allowed.
        """
        keys = _keys(account, address)
        wait = max((count.until - now for key in keys if (count := self._counts.get(key))), default=0)
        if wait > 0:
            raise RateLimited("too many failed logins", retry_after=wait / 1000)
        for key, allowance in zip(keys, self._allowances, strict=True):
            count = self._counts.pop(key, None)
            if count is None or now - count.last > _FORGET_MS:
                count = _Count(0, now, now)
            count.failures += 1
            count.last = now
            over = count.failures - allowance.free
            count.until = now + min(1000 << min(over, 20), allowance.longest_ms) if over >= 0 else now
            self._counts[key] = count  # at the end: the order is that of use
        while len(self._counts) > self._size:
            del self._counts[next(iter(self._counts))]

    def succeeded(self, account: str, address: str) -> None:
        """Take the attempt back: the account's owner starts afresh, and the address is not charged for it."""
        both, of_account, of_address = _keys(account, address)
        self._counts.pop(both, None)
        self._counts.pop(of_account, None)
        count = self._counts.get(of_address)
        if count is not None:
            count.failures -= 1
            count.until = count.last


def _keys(account: str, address: str) -> tuple[tuple[str, str], tuple[str, str], tuple[str, str]]:
    return (account, address), (account, ""), ("", address)
