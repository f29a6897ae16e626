"""What the input is, by its bytes and never by its name. Source: design of techdeck, section 2 (container precedence)."""

import json
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import msgspec
import orjson

from mcp_control.techdeck.formats.names import LABELS
from mcp_control.techdeck.formats.recognise import recognise, role_key
from mcp_control.techdeck.formats.text import is_chatml
from mcp_control.techdeck.ingestion.encoding import mark_of
from mcp_control.techdeck.ingestion.jsonstream import Splitter, outline
from mcp_control.techdeck.ingestion.streams import GZIP_MAGIC, ZSTD_MAGIC, Oversize
from mcp_control.techdeck.ingestion.tabular import sniff
from mcp_control.techdeck.model import DataError

Container = Literal["jsonl", "json_array", "json_object", "json_wrapper", "json_concatenated", "csv", "parquet", "text"]

PARQUET_MAGIC = b"PAR1"
_PROBE = 64 * 1024
_NUL_SHARE = 0.001
_LINES = 1000
_ITEMS = 100
_LABEL = 40
_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"%PDF-": "PDF",
    b"PK\x03\x04": "ZIP",
    b"PK\x05\x06": "ZIP",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "RAR",
    b"SQLite format 3\x00": "SQLite",
    b"\x7fELF": "ELF",
    b"ARROW1": "Arrow",
    b"FEA1": "Feather",
    b"Obj\x01": "Avro",
    b"ORC": "ORC",
    b"\x89HDF": "HDF5",
    b"\xd0\xcf\x11\xe0": "OLE",
    b"\x80\x04\x95": "pickle",
    GZIP_MAGIC: "gzip within compression",
    ZSTD_MAGIC: "zstd within compression",
}


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """The container of a text, and the delimiter if it is a table."""

    container: Container
    delimiter: str = ","


def refuse_binary(head: bytes, name: str) -> None:
    """Raise DataError E_BINARY when the head is a known binary format or has too many NUL bytes for text."""
    kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    if kind is None and mark_of(head) is None:
        probe = head[:_PROBE]
        if probe.count(0) > _NUL_SHARE * len(probe):
            kind = "binary data"
    if kind is not None:
        extension = Path(name).suffix.lstrip(".")
        expected = extension if extension.isalnum() and len(extension) <= 12 else "text"
        raise DataError("E_BINARY", f"content looks like {kind}, not {expected}")


def shape_of(head: bytes, *, whole: bool, limit: int, named: bool = False) -> Shape:
    """The container of a text in UTF-8 (or a superset of ASCII) from its head; `whole` if the head is all of it.

    `named` says that the caller mapped columns, so that a list of objects is enough to see records.
    """
    text = head.lstrip()
    if not text:
        raise DataError("E_EMPTY", "file is empty (only white space)")
    if text[:1] in b"{[":
        return Shape(container=_json_shape(text, whole=whole, limit=limit, named=named))
    readable = head.decode("utf-8", "replace")
    if _starts_with_label(readable) or is_chatml(readable.lstrip()[:_LABEL]):
        return Shape(container="text")
    if text[:1] == b'"' and _parse(text.split(b"\n", 1)[0]) is not None:
        return Shape(container="jsonl")
    delimiter = sniff(readable, whole=whole) or sniff(readable, whole=whole, loose=True)
    return Shape(container="text") if delimiter is None else Shape(container="csv", delimiter=delimiter)


def _json_shape(text: bytes, *, whole: bool, limit: int, named: bool) -> Container:
    found = [line for line in text.split(b"\n")[: _LINES + 1] if line.strip()]
    if not whole and len(found) > 1 and len(found) <= _LINES:
        found.pop()  # may be cut
    alone = [_parse(line) is not None for line in found]
    if len(found) >= 2 and (alone[0] or sum(alone) > len(alone) / 2):
        return "jsonl"
    end = _first_value_end(text)
    if end is not None:
        rest = text[end:].lstrip()
        if rest[:1] in (b"{", b"["):
            return "json_concatenated"
        if not rest or not any(alone):
            return _single(text[:end], whole=True, limit=limit, named=named)
    # An array or object over several lines has at most its last record alone on a line.
    if (text[:1] == b"{" or alone[0]) and sum(alone) > len(alone) / 5:
        return "jsonl"
    if len(found) == 1 and whole and text[:1] == b"{":
        return "jsonl"  # one broken record: the reader names the place
    return _single(text, whole=False, limit=limit, named=named)


def _single(text: bytes, *, whole: bool, limit: int, named: bool) -> Container:
    if text[:1] == b"[":
        return "json_array" if named or _holds_records(text, limit) else "json_object"
    value = _parse(text) if whole else None
    seen = outline(text, limit)
    sketch = value if value is not None else {key: [first] for key, first in seen.firsts.items()}
    if recognise(sketch) is not None:
        return "json_object"
    records = seen.firsts.values()
    if any(recognise(first) is not None for first in records):
        return "json_wrapper"
    return "json_wrapper" if named and any(isinstance(first, dict) for first in records) else "json_object"


def _holds_records(text: bytes, limit: int) -> bool:
    """False for an array that is itself one conversation: its items are turns and none is a record."""
    items: list[Any] = []
    for raw in islice(Splitter("array", limit).split([text]), _ITEMS):
        value = None if isinstance(raw, Oversize) else _parse(raw[2])
        if value is None or recognise(value) is not None or (isinstance(value, dict) and role_key(value) is None):
            return True
        items.append(value)
    return recognise(items) is None


def _parse(data: bytes) -> object | None:
    """The JSON list, object or text in `data`, read leniently: a bad byte or NaN is a fault of the row, not its shape."""
    try:
        value: object = orjson.loads(data)
    except orjson.JSONDecodeError:
        try:
            value = json.loads(data.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict | list | str) else None


def _first_value_end(text: bytes) -> int | None:
    """Where the first JSON value ends, in bytes, or None when it is cut or broken."""
    readable = text.decode("utf-8", "surrogateescape")
    try:
        _, end = json.JSONDecoder(strict=False).raw_decode(readable)
    except (ValueError, RecursionError):
        return None
    return len(readable[:end].encode("utf-8", "surrogateescape"))


def _starts_with_label(text: str) -> bool:
    first = text.lstrip().partition("\n")[0]
    label, colon, _ = first.partition(":")
    return bool(colon) and label.strip().casefold() in LABELS
