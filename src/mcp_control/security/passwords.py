"""Passwords: which are accepted, and how they are kept (NIST SP 800-63B-4; OWASP ASVS 5.0 sections 6.2 and 11.4).

A password is brought to Unicode form NFC when it is set and when it is checked, because keyboards differ in how they compose
letters; otherwise it is taken exactly as received, and any composition is accepted.
"""

import asyncio
import base64
import secrets
import unicodedata
from collections.abc import Callable
from typing import Final, TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from mcp_control.kernel.errors import Invalid, Overloaded, field_error

T = TypeVar("T")
MIN_CHARS: Final = 15
MAX_BYTES: Final = 1024
_MIN_DISTINCT: Final = 5
_MIN_OWN: Final = 8
_LONG: Final = 64  # from here on no guesser tries patterns one by one
# Words an attacker of this product tries first; what is left of a password without them must carry it.
_CONTEXT: Final = (
    "mcp-control-panel",
    "mcp-control",
    "mcp_control",
    "mcpcontrol",
    "mcpctl",
    "controlpanel",
    "administrator",
    "admin",
    "password",
    "changeme",
    "letmein",
    "welcome",
)
_ROWS: Final = (
    "abcdefghijklmnopqrstuvwxyz",
    "01234567890",
    "qwertyuiop",
    "asdfghjkl",
    "zxcvbnm",
    "qwertzuiop",
    "yxcvbnm",
)
_RUN: Final = 4


def normalise(password: str) -> str:
    """Return the form that is hashed."""
    return unicodedata.normalize("NFC", password)


def check_strength(password: str, username: str, pointer: str = "#/new_password") -> None:
    """Say whether this may become a password. Pure.

    Raises:
        Invalid: with code `weak-password` and the reason; never with the password itself.
    """
    text = normalise(password)
    if len(text) < MIN_CHARS:
        raise _weak(pointer, f"a password has at least {MIN_CHARS} characters")
    if _size(text) > MAX_BYTES:
        raise _weak(pointer, f"a password has at most {MAX_BYTES} bytes")
    if len(text) >= _LONG:
        return
    folded = text.casefold()
    if len(set(folded)) < _MIN_DISTINCT:
        raise _weak(pointer, "the password repeats too few characters")
    if _own_part(folded, username.casefold()) < _MIN_OWN:
        raise _weak(pointer, "the password is made of well-known words, the user name or rows of keys")


def _own_part(folded: str, username: str) -> int:
    """Return how many characters are left when well-known words, rows of keys and repetitions are taken away."""
    unit = _unit(folded)
    for word in (username, *_CONTEXT):
        if len(word) >= _RUN:
            unit = unit.replace(word, "")
    left, at = 0, 0
    while at < len(unit):
        run = _run_length(unit, at)
        left += 0 if run >= _RUN else 1
        at += run if run >= _RUN else 1
    return left


def _unit(text: str) -> str:
    """Return the shortest text that repeated gives this one."""
    return text[: (text + text).index(text, 1)]


def _run_length(text: str, at: int) -> int:
    best = 1
    for row in _ROWS:
        for keys in (row, row[::-1]):
            length = 1
            while at + length < len(text) and text[at : at + length + 1] in keys:
                length += 1
            best = max(best, length)
    return best


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _weak(pointer: str, detail: str) -> Invalid:
    return field_error(pointer, "weak-password", detail)


def one_time_password() -> str:
    """Return 100 random bits in four groups a person can type."""
    letters = base64.b32encode(secrets.token_bytes(15)).decode().lower()[:20]
    return "-".join(letters[at : at + 5] for at in range(0, 20, 5))


class Passwords:
    """Hashes and verifies with argon2id, away from the event loop.

    Args:
        memory_kib, time_cost, lanes: argon2id parameters; the defaults are those of ASVS 5.0 appendix C.
        parallel: hashes computed at once. Each takes `memory_kib` and one core for some 30 ms, so a flood of logins must not take all.
        waiting: callers that may wait for their turn before `Overloaded`.
    """

    def __init__(
        self, *, memory_kib: int = 46 * 1024, time_cost: int = 1, lanes: int = 1, parallel: int = 1, waiting: int = 32
    ) -> None:
        self._hasher = PasswordHasher(time_cost=time_cost, memory_cost=memory_kib, parallelism=lanes)
        self._turn = asyncio.Semaphore(parallel)
        self._limit = parallel + waiting
        self._pending = 0
        # Of no password: it costs as much to refuse an unknown user as a wrong password, so the time tells nobody who exists.
        salt = base64.b64encode(bytes(16)).decode().rstrip("=")
        nothing = base64.b64encode(bytes(32)).decode().rstrip("=")
        self._nobody = f"$argon2id$v=19$m={memory_kib},t={time_cost},p={lanes}${salt}${nothing}"

    async def hash(self, password: str) -> str:
        """Return what to store for a password. Raises Overloaded when too many wait."""
        return await self._in_turn(lambda: self._hasher.hash(_bytes(password)))

    async def verify(self, stored: str | None, password: str) -> bool:
        """Say whether the password is the stored one; None (no such user) takes as long. Raises Overloaded when too many wait."""
        expected = stored or self._nobody

        def check() -> bool:
            try:
                return self._hasher.verify(expected, _bytes(password))
            except (VerificationError, InvalidHashError):
                return False

        return await self._in_turn(check) and stored is not None

    async def _in_turn(self, work: Callable[[], T]) -> T:
        if self._pending >= self._limit:
            raise Overloaded("too many logins at once", retry_after=2)
        self._pending += 1
        try:
            async with self._turn:
                return await asyncio.to_thread(work)
        finally:
            self._pending -= 1


def _bytes(password: str) -> bytes:
    """Return the bytes to hash; over the limit they are cut, since such a password was never accepted and must not cost more."""
    return normalise(password).encode("utf-8", "surrogatepass")[: MAX_BYTES + 1]
