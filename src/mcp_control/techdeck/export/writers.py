"""Writers that take one partition after the other and give the same bytes however the rows were divided."""

import hashlib
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from mcp_control.techdeck.export.formats import json_text

ROW_GROUP = 10_000


class Writer(Protocol):
    """Takes frames of one schema; `close` finishes the file. `rows` counts what was written."""

    rows: int

    def write(self, frame: pl.DataFrame) -> None: ...

    def close(self) -> None: ...


class LinesWriter:
    """JSON lines, UTF-8, fields in the order of the frame; an empty data set is an empty file."""

    def __init__(self, path: Path) -> None:
        self.rows = 0
        self._file = path.open("wb")

    def write(self, frame: pl.DataFrame) -> None:
        if frame.height:
            frame.write_ndjson(self._file)
        self.rows += frame.height

    def close(self) -> None:
        self._file.close()


class CsvWriter:
    """RFC 4180 with a header and line feeds; list columns are JSON text."""

    def __init__(self, path: Path) -> None:
        self.rows = 0
        self._begun = False
        self._file = path.open("wb")

    def write(self, frame: pl.DataFrame) -> None:
        nested = [name for name, kind in frame.schema.items() if isinstance(kind, pl.List)]
        buffer = BytesIO()
        frame.with_columns(json_text(name) for name in nested).write_csv(
            buffer, include_header=not self._begun, quote_style="non_numeric"
        )
        self._begun = True
        self._file.write(buffer.getvalue())
        self.rows += frame.height

    def close(self) -> None:
        self._file.close()


class ParquetWriter:
    """Parquet in row groups of exactly `ROW_GROUP` rows, whatever the sizes of the frames given."""

    def __init__(self, path: Path) -> None:
        self.rows = 0
        self._path = path
        self._held: list[pa.Table] = []
        self._file: pq.ParquetWriter | None = None

    def write(self, frame: pl.DataFrame) -> None:
        self._held.append(frame.to_arrow())
        self.rows += frame.height
        while sum(table.num_rows for table in self._held) >= ROW_GROUP:
            table = pa.concat_tables(self._held)
            self._put(table.slice(0, ROW_GROUP))
            self._held = [table.slice(ROW_GROUP)]

    def _put(self, table: pa.Table) -> None:
        if self._file is None:
            self._file = pq.ParquetWriter(
                self._path, table.schema, compression="zstd", compression_level=3, write_statistics=False
            )
        if table.num_rows:
            self._file.write_table(table.combine_chunks(), row_group_size=ROW_GROUP)

    def close(self) -> None:
        if self._held:
            self._put(pa.concat_tables(self._held))
        if self._file is not None:
            self._file.close()


WRITERS: dict[str, type[LinesWriter | CsvWriter | ParquetWriter]] = {
    "jsonl": LinesWriter,
    "csv": CsvWriter,
    "parquet": ParquetWriter,
}


class Files:
    """One writer per split in a folder, closed together."""

    def __init__(self, folder: Path, container: str, splits: tuple[str, ...]) -> None:
        self.paths = {split: folder / f"{split}.{container}" for split in splits}
        self._writers: dict[str, Writer] = {split: WRITERS[container](path) for split, path in self.paths.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.close()

    def write(self, split: str, frame: pl.DataFrame) -> None:
        self._writers[split].write(frame)

    def rows(self, split: str) -> int:
        return self._writers[split].rows


def sha256(path: Path) -> str:
    """Digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
