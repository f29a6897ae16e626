"""One raw record: from bytes to checked JSON text, or aside with the reason."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import msgspec
import orjson

from mcp_control.techdeck.formats.names import type_name
from mcp_control.techdeck.ingestion.encoding import Encoding, decode
from mcp_control.techdeck.ingestion.streams import Oversize, lines
from mcp_control.techdeck.model import DataError, Reject, reject

NO_FLAGS: list[str] = []
ID_FIELDS = (
    "id",
    "conversation_id",
    "conversationId",
    "conv_id",
    "dialog_id",
    "dialogue_id",
    "session_id",
    "uuid",
    "questionID",
    "question_id",
)
"""Fields that may name a conversation, in order of preference. A question's id may repeat: it stays in the metadata."""


class Row(NamedTuple):
    """A readable record: its place, the encoding and warnings it was read with, and its JSON text."""

    row: int
    offset: int | None
    encoding: str
    key: str | None
    flags: list[str]
    text: str
    source_id: str | None


Item = Row | Reject
Raw = tuple[str | None, int, bytes] | Oversize
"""A record's bytes before parsing: wrapper key, byte offset, bytes."""


def _whole() -> bool:
    return False


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What reading needs of the options; `cut` tells, at the end of the stream, that it broke off."""

    encoding: Encoding
    max_record_bytes: int
    nan_as_null: bool = False
    id_column: str | None = None
    cut: Callable[[], bool] = _whole


def source_id(record: Any, column: str | None = None) -> str | None:
    """The identifier a record brings, in `column` if that is given; None when it has none or only a blank one."""
    found = named_id(record, column)
    return None if found is None else found[1]


def named_id(record: Any, column: str | None = None) -> tuple[str, str] | None:
    """Like `source_id`, with the field that holds it first."""
    if not isinstance(record, dict):
        return None
    for field in ID_FIELDS if column is None else (column,):
        value = record.get(field)
        if value is not None and isinstance(value, str | int):
            text = str(value).strip()
            if text:
                return field, text
    return None


def too_large(row: int, item: Oversize, limit: int) -> Reject:
    """Aside, for its size; only its head was kept."""
    message = f"row {row}: over the limit of {limit} bytes"
    return reject(row, item.offset, "E_ROW_TOO_LARGE", message, item.head, item.sha256)


def read_jsonl(source: Iterable[bytes], limits: Limits) -> Iterator[Item]:
    """One record per line; blank lines do not count."""
    limit = limits.max_record_bytes
    found = lines(source, limit, limits.encoding.mark, limits.cut)
    yield from parse_all((item if isinstance(item, Oversize) else (None, *item) for item in found), limits)


def parse_all(raws: Iterable[Raw], limits: Limits) -> Iterator[Item]:
    """Number and parse records. One that holds several JSON values in a row gives as many rows."""
    row = 0
    encoding = limits.encoding.name if limits.encoding.transcode else "utf-8"
    for raw in raws:
        if isinstance(raw, Oversize):
            yield too_large(row, raw, limits.max_record_bytes)
            row += 1
            continue
        key, offset, data = raw
        try:
            record = orjson.loads(data)
            text = data.decode()
        except (orjson.JSONDecodeError, UnicodeDecodeError):
            if not data.strip():
                continue
            for item in _parse_slowly(row, offset, key, data, limits):
                yield item
                row += 1
            continue
        yield _row((row, offset, encoding, key, NO_FLAGS, text), record, limits)
        row += 1


def _row(fields: tuple[int, int, str, str | None, list[str], str], record: Any, limits: Limits) -> Item:
    if isinstance(record, dict | list | str):
        return Row(*fields, source_id(record, limits.id_column))
    row, offset = fields[:2]
    message = f"row {row}, column 1: a {type_name(record)}, expected an object"
    return reject(row, offset, "E_JSON", message, fields[5].encode())


def _parse_slowly(row: int, offset: int, key: str | None, data: bytes, limits: Limits) -> Iterator[Item]:
    """The record is not plain UTF-8 JSON: find the text, then as many values as it holds, then the reason."""
    lead = len(data) - len(data.lstrip(b"\xef\xbb\xbf \t\r\n"))
    try:
        text, encoding, departs = decode(data[lead:], limits.encoding)
    except UnicodeDecodeError as error:
        yield encoding_reject(row, offset + lead, data, error)
        return
    flags = ["W_ENCODING_MIXED"] if departs and limits.encoding.mixed else NO_FLAGS
    try:
        yield _row((row, offset, encoding, key, flags, text), orjson.loads(text), limits)
        return
    except orjson.JSONDecodeError as error:
        reason, column = _reason(error), error.colno
    values = split_values(text, limits.nan_as_null)
    if values is None:
        yield reject(row, offset, "E_JSON", f"row {row}, column {column}: {reason}", data)
        return
    if len(values) > 1:
        flags = [*flags, "W_CONCATENATED"]
    for number, (start, value) in enumerate(values):
        place = offset + lead + len(text[:start].encode(encoding, "replace"))
        yield _row((row + number, place, encoding, key, flags, value), orjson.loads(value), limits)


def encoding_reject(row: int, offset: int, data: bytes, error: UnicodeDecodeError) -> Reject:
    """Aside, for a byte that its encoding does not know."""
    place = offset + error.start
    message = f"row {row}: byte 0x{error.object[error.start]:02x} at offset {place} is not {error.encoding}"
    return reject(row, offset, "E_ENCODING", message, data)


def split_values(text: str, nan_as_null: bool) -> list[tuple[int, str]] | None:
    """Start and text of each JSON value in `text`, or None when any part of it is not valid JSON.

    With `nan_as_null`, NaN and the infinities are read as null.
    """
    decoder = json.JSONDecoder(parse_constant=lambda _: None) if nan_as_null else json.JSONDecoder()
    values: list[tuple[int, str]] = []
    place = 0
    while place < len(text):
        try:
            value, end = decoder.raw_decode(text, place)
            piece = orjson.dumps(value).decode() if nan_as_null else text[place:end]
            orjson.loads(piece)
        except (ValueError, TypeError, RecursionError):
            return None
        values.append((place, piece))
        place = end
        while place < len(text) and text[place] in " \t\r\n":
            place += 1
    return values or None


def _reason(error: orjson.JSONDecodeError) -> str:
    return error.msg.split(":", 1)[0]


def require_rows(first: Reject | None, rows: int) -> None:
    """Raise the DataError of a file in which nothing could be read: E_EMPTY, or the code of its first bad row."""
    if rows:
        return
    if first is None:
        raise DataError("E_EMPTY", "file holds no records")
    raise DataError(first.code, first.message)
