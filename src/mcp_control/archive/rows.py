"""Entities and facts as bytes that are the same whichever store they come from, and digests over them."""

from collections.abc import Sequence
from hashlib import sha256
from typing import Final

import msgspec

from mcp_control.archive.model import FactRange, KindCount
from mcp_control.kernel.changes import Entity, Fact, StoredFact


class _Row(msgspec.Struct, frozen=True, array_like=True, gc=False):
    id: str
    version: int
    index: dict[str, str | int]
    hot: bytes
    cold: dict[str, bytes]


class _Facts(msgspec.Struct, frozen=True, array_like=True, gc=False):
    first: int
    facts: list[Fact]


_encode: Final = msgspec.msgpack.Encoder(order="deterministic").encode
_row: Final = msgspec.msgpack.Decoder(_Row).decode
_rows: Final = msgspec.msgpack.Decoder(list[bytes]).decode
_facts: Final = msgspec.msgpack.Decoder(_Facts).decode


def pack_entity(entity: Entity) -> bytes:
    """Return an entity as bytes.

    Index fields that are null are left out: stores differ in whether they name them. Integers may be of a driver's own class.
    """
    index = {
        name: int(value) if isinstance(value, int) else value
        for name, value in entity.index.items()
        if value is not None
    }
    return _encode(_Row(entity.id, int(entity.version), index, entity.hot, dict(entity.cold)))


def pack_page(rows: Sequence[bytes]) -> bytes:
    """Return packed entities as the bytes of a page."""
    return _encode(rows)


def unpack_page(kind: str, data: bytes) -> list[tuple[Entity, bytes]]:
    """Return the entities of a page, each with its packed bytes. Raises msgspec.DecodeError or ValidationError."""
    found = []
    for packed in _rows(data):
        row = _row(packed)
        found.append((Entity(kind, row.id, row.version, row.index, row.hot, row.cold), packed))
    return found


def pack_facts(facts: Sequence[StoredFact]) -> bytes:
    """Return facts that follow on each other as the bytes of a page."""
    return _encode(_Facts(facts[0].seq, [stored.fact for stored in facts]))


def unpack_facts(data: bytes) -> list[StoredFact]:
    """Return the facts of a page. Raises msgspec.DecodeError or ValidationError."""
    page = _facts(data)
    return [StoredFact(seq, fact) for seq, fact in enumerate(page.facts, page.first)]


class KindDigest:
    """Counts entities of a kind that come in the order of their ids, and takes their digest."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._count = 0
        self._digest = sha256()

    def add(self, packed: bytes) -> None:
        """Take in one packed entity."""
        self._count += 1
        self._digest.update(packed)

    @property
    def total(self) -> KindCount:
        """What came so far."""
        return KindCount(name=self._name, count=self._count, sha256=self._digest.hexdigest())


class FactDigest:
    """Counts facts that come in order, and takes their digest."""

    def __init__(self) -> None:
        self._first = self._last = self._count = 0
        self._digest = sha256()

    def add(self, facts: Sequence[StoredFact]) -> None:
        """Take in facts. Raises ValueError where one is missing."""
        for stored in facts:
            if self._count and stored.seq != self._last + 1:
                raise ValueError(f"event {self._last + 1} is missing")
            self._first = self._first or stored.seq
            self._last = stored.seq
            self._count += 1
            self._digest.update(_encode(stored.fact))

    @property
    def total(self) -> FactRange:
        """What came so far."""
        return FactRange(first=self._first, last=self._last, count=self._count, sha256=self._digest.hexdigest())
