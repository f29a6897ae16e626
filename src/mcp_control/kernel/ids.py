"""Identifiers: a prefix that names the noun, then 48 bits of milliseconds and 128 random bits in lower-case base32.

The alphabet of RFC 4648 section 7 (base32hex) keeps byte order, so ids sort by the time they were made and land at the
end of an index; the random bits make them unguessable.
"""

import os
import re
from collections.abc import Callable
from hashlib import blake2b
from typing import Final

from mcp_control.kernel.clock import Clock

_ALPHABET: Final = "0123456789abcdefghijklmnopqrstuv"
_PAIRS: Final = tuple(a + b for a in _ALPHABET for b in _ALPHABET)
_BODY_CHARS: Final = 36
_TIME_CHARS: Final = 9  # made of the time alone, but for the last 3 bits of its milliseconds: they share the next one
_FIVE_BITS: Final = (_ALPHABET * 8).encode()  # from a byte to the character of its lower five bits
_BLOCK: Final = 4096
ID_PATTERN: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


def make_id(prefix: str, millis: int, entropy: bytes) -> str:
    """Build an id from its parts. Pure.

    Args:
        prefix: the noun, without the underscore (`task`, `run`, `agent` …).
        millis: milliseconds since the Unix epoch, below 2**48.
        entropy: exactly 16 bytes; random, or a hash for derived ids.
    """
    number = (millis << 128 | int.from_bytes(entropy)) << 4
    pairs = _PAIRS
    return f"{prefix}_" + "".join([pairs[(number >> shift) & 1023] for shift in range(170, -1, -10)])


def derived_id(prefix: str, parent: str, *parts: str | int) -> str:
    """Build the id that a parent and some parts always lead to, so that creating it twice creates it once.

    It carries the parent's milliseconds and a 128-bit hash of parent and parts.
    """
    text = "\x1f".join((parent, *map(str, parts)))
    return make_id(prefix, id_millis(parent), blake2b(text.encode(), digest_size=16).digest())


def id_millis(identifier: str) -> int:
    """Return the milliseconds an id carries. Raises ValueError where the text is no id of ours."""
    body = identifier.rpartition("_")[2]
    if len(body) != _BODY_CHARS:
        raise ValueError("not an id")
    return int(body, 32) >> 132


def is_id(text: str) -> bool:
    """Say whether the text could be an id: `[A-Za-z0-9_-]{1,64}`."""
    return ID_PATTERN.fullmatch(text) is not None


class IdSource:
    """Makes ids from a clock and a source of random bytes; reads the source in blocks, since a system call costs more than an id."""

    __slots__ = ("_at", "_clock", "_head", "_head_of", "_pool", "_random")

    def __init__(self, clock: Clock, random: Callable[[int], bytes] = os.urandom) -> None:
        self._clock = clock
        self._random = random
        self._pool = b""
        self._at = 0
        self._head_of = -1
        self._head = ""

    def new(self, prefix: str) -> str:
        """Return a fresh id for the noun `prefix`; what `make_id` makes of random bytes, in less than half of its time."""
        millis = self._clock.now()
        if millis >> 3 != self._head_of:
            self._head_of = millis >> 3
            self._head = make_id("", millis, bytes(16))[1 : 1 + _TIME_CHARS]
        drawn = self._draw(26)
        ends = drawn[25]  # of the 128 bits the first two and the last one
        first, last = _ALPHABET[(millis & 7) << 2 | ends & 3], "0g"[ends >> 7]
        return f"{prefix}_{self._head}{first}{drawn[:25].translate(_FIVE_BITS).decode()}{last}"

    def bytes16(self) -> bytes:
        """Return 16 fresh random bytes."""
        return self._draw(16)

    def secret(self) -> str:
        """Return 256 random bits as 64 hexadecimal digits, for tokens."""
        return self._draw(32).hex()

    def _draw(self, count: int) -> bytes:
        at = self._at
        if at + count > len(self._pool):
            self._pool = self._random(_BLOCK)
            at = 0
        self._at = at + count
        return self._pool[at : at + count]
