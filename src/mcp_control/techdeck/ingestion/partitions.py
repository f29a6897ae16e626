"""Raw partitions: cut by the amount of text alone, so that the cut never depends on who does the work."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import orjson
import polars as pl

from mcp_control.techdeck.formats.table import conversation_of
from mcp_control.techdeck.ingestion.records import Row
from mcp_control.techdeck.model import RAW_SCHEMA, TEXT_LIST, Part, series_of, write_parquet


class PartitionWriter:
    """Collects rows and writes a partition whenever `limit` characters of records are together."""

    def __init__(self, out: Path, limit: int) -> None:
        self._out = out
        self._limit = limit
        self._rows: list[Row] = []
        self._size = 0
        self._repeated: dict[int, list[str]] = {}
        self._ids: set[int] = set()
        self.parts: list[Part] = []

    def add(self, row: Row) -> None:
        """Take one row. An identifier seen before earns its row the flag W_DUPLICATE_ID."""
        if row.source_id is not None:
            mark = int.from_bytes(hashlib.blake2b(row.source_id.encode(), digest_size=8).digest())
            if mark in self._ids:
                row = row._replace(flags=[*row.flags, "W_DUPLICATE_ID"])
            self._ids.add(mark)
        self._rows.append(row)
        self._size += len(row.text)
        if self._size >= self._limit:
            self.flush()

    def flush(self) -> None:
        """Write what is held, if anything."""
        if not self._rows:
            return
        rows, offsets, encodings, keys, flags, texts, _ = zip(*self._rows, strict=True)
        frame = pl.DataFrame(
            {
                "row": rows,
                "byte_offset": offsets,
                "encoding": encodings,
                "key": keys,
                "flags": series_of("flags", flags, TEXT_LIST),
                "record": texts,
            },
            schema=RAW_SCHEMA,
        )
        path = self._out / f"raw-{len(self.parts):05d}.parquet"
        write_parquet(frame, path)
        self.parts.append(Part(path=path, rows=len(rows)))
        self._rows, self._size = [], 0


def regroup(parts: list[Part], mapping: Mapping[str, str]) -> list[Part]:
    """Partitions of a long table cut anew so that no conversation is in two: by a hash of its name, rows in order."""
    if len(parts) < 2:
        return parts
    pieces: list[list[Path]] = [[] for _ in parts]
    for part in parts:
        frame = pl.read_parquet(part.path)
        buckets = [_bucket(text, mapping, len(parts)) for text in frame["record"]]
        split = frame.with_columns(bucket=pl.Series(buckets, dtype=pl.Int64())).partition_by("bucket", as_dict=True)
        for (bucket,), piece in split.items():
            path = part.path.with_suffix(f".{bucket}")
            write_parquet(piece.drop("bucket"), path)
            pieces[bucket].append(path)
    done: list[Part] = []
    for part, paths in zip(parts, pieces, strict=True):
        part.path.unlink()
        if not paths:
            continue
        frame = pl.concat([pl.read_parquet(path) for path in paths]).sort("row")
        write_parquet(frame, part.path)
        done.append(Part(path=part.path, rows=frame.height))
        for path in paths:
            path.unlink()
    return done


def _bucket(text: str, mapping: Mapping[str, str], count: int) -> int:
    name = conversation_of(orjson.loads(text), mapping) or ""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) % count
