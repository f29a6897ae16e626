"""Rows of CSV and Parquet as JSON records."""

import csv
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from mcp_control.techdeck.formats.names import shown
from mcp_control.techdeck.ingestion.encoding import decode
from mcp_control.techdeck.ingestion.records import (
    NO_FLAGS,
    Item,
    Limits,
    Row,
    encoding_reject,
    source_id,
    too_large,
)
from mcp_control.techdeck.ingestion.streams import Oversize, lines
from mcp_control.techdeck.model import DataError, reject

DELIMITERS = (",", ";", "\t", "|")
_BATCH = 1024
_SNIFFED = 64 * 1024
_SINGLE = {"text", "transcript", "conversation", "dialog", "dialogue", "chat", "content"}
"""A table of one column is believed only under one of these names."""


def sniff(head: str, *, whole: bool, loose: bool = False) -> str | None:
    """The delimiter of a table, or None when `head` is no table.

    A table has a modal field count of at least 2 in 90 % of its records; `loose` accepts half, if the header agrees.
    """
    sample = head[:_SNIFFED]
    whole = whole and len(head) <= _SNIFFED
    best: tuple[float, int, str] | None = None
    for delimiter in DELIMITERS:
        counts = _field_counts(sample, delimiter, whole)
        if not counts:
            continue
        common, times = Counter(counts).most_common(1)[0]
        if loose and counts[0] >= 2:
            common, times = counts[0], counts.count(counts[0])
        share = times / len(counts)
        if common >= 2 and share >= (0.5 if loose else 0.9) and (best is None or (share, common) > best[:2]):
            best = (share, common, delimiter)
    if best is None:
        first, _, rest = sample.partition("\n")
        return "," if first.strip().strip('"').casefold() in _SINGLE and rest.strip() else None
    return best[2]


def _field_counts(sample: str, delimiter: str, whole: bool) -> list[int]:
    csv.field_size_limit(sys.maxsize)
    try:
        counts = [
            len(row) for row in csv.reader([line + "\n" for line in sample.split("\n")], delimiter=delimiter) if row
        ]
    except csv.Error:
        return []
    return counts if whole or len(counts) < 2 else counts[:-1]  # the last record may be cut


class _TooLongError(Exception):
    """The record being read is over the limit: most likely a quote is never closed."""


class _Feed:
    """Gives the CSV reader one physical line at a time and remembers those of the current record."""

    def __init__(self, found: Iterator[tuple[int, bytes] | Oversize], limits: Limits) -> None:
        self._found = found
        self._limits = limits
        self._again: deque[tuple[int, bytes] | Oversize] = deque()
        self.taken: list[tuple[int, bytes]] = []
        self.size = 0
        self.departs = False
        self.encoding = "utf-8"
        self.ended = False
        self.oversize: Oversize | None = None

    def begin(self) -> None:
        self.taken, self.size, self.departs, self.encoding = [], 0, False, "utf-8"

    def give_back(self, keep: int) -> None:
        """Read all but the first `keep` lines of this record again."""
        self._again.extendleft(reversed(self.taken[keep:]))
        if self.oversize is not None:
            self._again.insert(len(self.taken) - keep, self.oversize)
        self.taken, self.ended, self.oversize = self.taken[:keep], False, None

    def __iter__(self) -> "_Feed":
        return self

    def __next__(self) -> str:
        item = self._again.popleft() if self._again else next(self._found, None)
        if item is None:
            self.ended = True
            raise StopIteration
        if isinstance(item, Oversize):
            self.oversize = item
            raise _TooLongError
        self.taken.append(item)
        self.size += len(item[1]) + 1
        if self.size > self._limits.max_record_bytes:
            raise _TooLongError
        text, encoding, departs = decode(item[1], self._limits.encoding)
        if departs:
            self.encoding, self.departs = encoding, self._limits.encoding.mixed
        elif not self.departs:
            self.encoding = encoding
        return text + "\n"


def read_csv(source: Iterable[bytes], delimiter: str, limits: Limits, *, rename: bool) -> Iterator[Item]:
    """Each data row as a JSON object under the header's names; a row is never cut or padded.

    Raises DataError E_DUP_HEADER for a repeated column, unless `rename` (a mapping was given): then copies get a
    number. A record whose quote is never closed loses only its first line.
    """
    csv.field_size_limit(sys.maxsize)  # the feed bounds records by bytes instead
    feed = _Feed(lines(source, limits.max_record_bytes, limits.encoding.mark, limits.cut), limits)
    reader = csv.reader(feed, delimiter=delimiter)
    header: list[str] | None = None
    row = 0
    while True:
        feed.begin()
        fault: Item | None = None
        fields: list[str] = []
        try:
            fields = next(reader)
        except StopIteration:
            return
        except _TooLongError:
            fault = _long(row, feed, limits)
        except UnicodeDecodeError as error:
            offset, data = feed.taken[-1]
            fault = encoding_reject(row, offset, data, error)
        except csv.Error:
            fault = reject(row, feed.taken[0][0], "E_CSV", f"row {row}: not readable as CSV", _raw(feed))
        else:
            if feed.ended and limits.cut():
                return
            if feed.ended:
                feed.give_back(1)
                message = f"row {row}: a quote is never closed"
                fault = reject(row, feed.taken[0][0], "E_RAGGED", message, _raw(feed))
        if fault is not None:
            reader = csv.reader(feed, delimiter=delimiter)
            yield fault
            row += 1
            continue
        if not fields:
            continue
        if header is None:
            header = _header(fields, rename)
            continue
        offset = feed.taken[0][0]
        if len(fields) != len(header):
            message = f"row {row}: {len(fields)} fields, header has {len(header)}"
            yield reject(row, offset, "E_RAGGED", message, _raw(feed))
        else:
            record = dict(zip(header, fields, strict=True))
            flags = ["W_ENCODING_MIXED"] if feed.departs else NO_FLAGS
            text = orjson.dumps(record).decode()
            yield Row(row, offset, feed.encoding, None, flags, text, source_id(record, limits.id_column))
        row += 1


def _long(row: int, feed: _Feed, limits: Limits) -> Item:
    if not feed.taken and feed.oversize is not None:
        item, feed.oversize = feed.oversize, None
        return too_large(row, item, limits.max_record_bytes)
    feed.give_back(1)
    return reject(row, feed.taken[0][0], "E_RAGGED", f"row {row}: a quote is never closed", _raw(feed))


def _raw(feed: _Feed) -> bytes:
    return b"\n".join(data for _, data in feed.taken)


def _header(fields: list[str], rename: bool) -> list[str]:
    names = [field.strip() for field in fields]
    blank = names.count("")
    if blank > 1:
        names = [name or f"column_{number}" for number, name in enumerate(names)]
    for name, times in Counter(names).items():
        if times > 1 and not rename:
            raise DataError("E_DUP_HEADER", f"column {shown(name)} appears {times} times")
    seen: Counter[str] = Counter()
    unique: list[str] = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return unique


def read_parquet(path: Path, limits: Limits) -> Iterator[Item]:
    """Each row as a JSON object. Raises DataError E_PARQUET when the file is not readable as Parquet."""
    row = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                for item in _batch_rows(batch, row, limits):
                    yield item
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError("E_PARQUET", f"not readable as Parquet after row {row}: {type(error).__name__}") from error


def _batch_rows(batch: pa.RecordBatch, first: int, limits: Limits) -> Iterator[Item]:
    try:
        records: list[dict[str, Any]] = batch.to_pylist()
    except (ValueError, OverflowError):  # one bad value: look at the rows one by one
        if batch.num_rows == 1:
            yield reject(first, None, "E_ENCODING", f"row {first}: holds text or times that cannot be decoded", b"")
            return
        for number in range(batch.num_rows):
            yield from _batch_rows(batch.slice(number, 1), first + number, limits)
        return
    for number, record in enumerate(records, first):
        yield _parquet_row(number, record, limits)


def _parquet_row(row: int, record: dict[str, Any], limits: Limits) -> Item:
    data = orjson.dumps(record, default=_plain, option=orjson.OPT_NON_STR_KEYS)
    if len(data) > limits.max_record_bytes:
        message = f"row {row}: over the limit of {limits.max_record_bytes} bytes"
        return reject(row, None, "E_ROW_TOO_LARGE", message, data)
    return Row(row, None, "utf-8", None, NO_FLAGS, data.decode(), source_id(record, limits.id_column))


def _plain(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
