"""Records out of JSON that is not one per line: arrays, objects of arrays, values one after another.

The splitter finds where records begin and end from brackets and strings alone, over a sliding buffer, so a file of any
size needs the memory of one record, and a broken record does not take its neighbours with it.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec
import orjson

from mcp_control.techdeck.ingestion.records import Raw
from mcp_control.techdeck.ingestion.streams import Oversize, Skipping

Shape = Literal["array", "wrapper", "concatenated"]
_LEVEL: dict[Shape, int] = {"concatenated": 0, "array": 1, "wrapper": 2}

_STRING = rb'"(?:[^"\\]++|\\.)*+"'
# A flat object as one token saves most of the work: a message of a conversation is one.
_TOKEN = re.compile(rb'\{(?:[^{}\[\]"]++|' + _STRING + rb")*+\}|" + _STRING + rb'|["\[\]{},]', re.DOTALL)
_LONGEST_NAME = 64 * 1024
_IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)


class Splitter:
    """Cuts a byte stream into records of one `shape`; `closed` tells afterwards whether the outer value was closed."""

    def __init__(self, shape: Shape, limit: int, offset: int = 0) -> None:
        self._level = _LEVEL[shape]
        self._limit = limit
        self._base = offset
        self._buffer = b""
        self._anchor = 0  # start of the record in the buffer
        self._pos = 0
        self._depth = 0
        self._aside = 0  # depth within a value that is no list of records
        self._in_string = False
        self._name = b""
        self._key: str | None = None
        self._skipped: Skipping | None = None
        self.closed = shape == "concatenated"

    def split(self, source: Iterable[bytes]) -> Iterator[Raw]:
        """Each record with its wrapper key and byte offset."""
        for chunk in source:
            self._refill(chunk)
            yield from self._scan()
        yield from self._emit(len(self._buffer))

    def _refill(self, chunk: bytes) -> None:
        inside = self._depth >= self._level
        keep = self._anchor if inside else self._pos
        if inside and self._skipped is None and self._pos - keep > self._limit:
            self._skipped = Skipping(self._base + keep)
        if self._skipped is not None:
            self._skipped.feed(self._buffer[keep : self._pos])
            keep = self._pos
        self._buffer = self._buffer[keep:] + chunk
        self._base += keep
        self._pos -= keep
        self._anchor = 0

    def _emit(self, end: int) -> Iterator[Raw]:
        data = self._buffer[self._anchor : end]
        offset = self._base + self._anchor
        self._anchor = end
        if self._depth < self._level and not self._skipped:
            return
        if self._skipped is not None:
            self._skipped.feed(data)
            yield self._skipped.done()
            self._skipped = None
            return
        trimmed = data.lstrip()
        offset += len(data) - len(trimmed)
        trimmed = trimmed.rstrip()
        if len(trimmed) > self._limit:
            skipping = Skipping(offset)
            skipping.feed(trimmed)
            yield skipping.done()
        elif trimmed:
            yield self._key, offset, trimmed

    def _scan(self) -> Iterator[Raw]:
        buffer, level = self._buffer, self._level
        if self._in_string and not self._leave_string():
            return
        while (match := _TOKEN.search(buffer, self._pos)) is not None:
            token = match[0]
            self._pos = match.end()
            if token == b'"':
                if self._level == 2 and self._depth == 1 and len(buffer) - match.start() < _LONGEST_NAME:
                    self._pos = match.start()  # maybe the name of a list: look again with more bytes
                    return
                self._in_string = True
                if not self._leave_string():
                    return
            elif len(token) > 1:
                if self._depth == 1 and level == 2 and token[:1] == b'"':
                    self._name = token
                elif self._depth == 0 == level and token[:1] == b"{":
                    yield from self._emit(self._pos)
            elif token == b",":
                if self._depth == level and level:
                    yield from self._emit(match.start())
                    self._anchor = self._pos
            elif token in b"[{":
                self._open(token)
            else:
                yield from self._close(match.start())
        self._pos = len(buffer)

    def _leave_string(self) -> bool:
        """Move behind the string's end; False when the buffer ends first."""
        match = _IN_STRING.match(self._buffer, self._pos)
        self._pos = match.end() if match else self._pos
        if self._buffer[self._pos : self._pos + 1] != b'"':
            return False
        self._pos += 1
        self._in_string = False
        return True

    def _open(self, token: bytes) -> None:
        if self._aside or (self._level == 2 and self._depth == 1 and token == b"{"):
            self._aside += 1
            return
        self._depth += 1
        if self._depth == self._level:
            self._anchor = self._pos
            self._key = _text(self._name) if self._level == 2 else None

    def _close(self, start: int) -> Iterator[Raw]:
        if self._aside:
            self._aside -= 1
            return
        if self._level == 0:
            self._depth = max(0, self._depth - 1)
            if self._depth == 0:
                yield from self._emit(self._pos)
            return
        if self._depth == self._level:
            yield from self._emit(start)
        self._depth = max(0, self._depth - 1)
        self.closed = self.closed or self._depth == 0


def _text(name: bytes) -> str:
    try:
        value = orjson.loads(name)
    except orjson.JSONDecodeError:
        return name.decode("utf-8", "replace")
    return str(value)


class Outline(msgspec.Struct, frozen=True, kw_only=True):
    """What the head of a JSON object shows: the first record of each of its lists."""

    firsts: dict[str, object]


def outline(head: bytes, limit: int) -> Outline:
    """Read the lists of an object as far as `head` goes."""
    firsts: dict[str, object] = {}
    for raw in Splitter("wrapper", limit).split([head]):
        if isinstance(raw, Oversize) or raw[0] is None or raw[0] in firsts:
            continue
        try:
            firsts[raw[0]] = orjson.loads(raw[2])
        except orjson.JSONDecodeError:
            continue
    return Outline(firsts=firsts)
