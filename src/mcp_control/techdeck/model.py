"""Shapes shared by the six techdeck stages: options, frame schemas, results and the one Parquet writer.

Nothing here depends on time, on the machine or on a run: the same input, options and `VERSION` give the same bytes.
Source: design of techdeck, section 2 (canonical schema and detection).
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import orjson
import polars as pl
import pyarrow as pa

VERSION = "1"
SCHEMA_VERSION = 1
MIB = 1024 * 1024
RAW_LIMIT = 4096
"""Bytes of a rejected record that its quarantine row keeps."""

Progress = Callable[[int, int | None, str], None]
"""Called with rows done, rows in total (None while unknown) and a short message."""


class DataError(Exception):
    """The whole file is unusable, for good: `code` is stable (`E_...`), `detail` never quotes raw content."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


class IngestOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the input is read.

    `format` names a conversation format instead of detecting one; "mixed" maps every record by its own rule.
    `mapping` names columns for canonical fields: keys among id, system, user, assistant, messages, text, conversation,
    turn, role, content; values are the input's column names. Sizes are bytes.
    """

    format: str | None = None
    encoding: str | None = None
    strict_encoding: bool = False
    mapping: dict[str, str] = {}
    max_record_bytes: int = 64 * MIB
    max_ratio: int = 200
    nan_as_null: bool = False
    partition_bytes: int = 6 * MIB


class ValidateOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How conversations are checked. An empty `languages` accepts all; regions are ISO 3166 codes."""

    redact: bool = True
    max_turn_chars: int = 32_768
    languages: list[str] = []
    phone_regions: list[str] = msgspec.field(default_factory=lambda: ["US", "GB"])


class ProcessOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How conversations are enriched. `split` holds the shares of train, validation and test."""

    seed: int = 1
    split: list[float] = msgspec.field(default_factory=lambda: [0.8, 0.1, 0.1])
    vader_sample: int = 2000


class QualityOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When the run passes: overall score >= `threshold` and rejected share <= `max_rejected`, both 0..1."""

    gate: Literal["enforce", "warn", "off"] = "enforce"
    threshold: float = 0.7
    max_rejected: float = 0.2


class ExportOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is written at the end."""

    format: Literal["chatml", "alpaca", "sharegpt"] = "chatml"
    container: Literal["jsonl", "csv", "parquet"] = "jsonl"


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of a run, one group per stage; `quality.gate` and the like name a field from outside."""

    ingest: IngestOptions = IngestOptions()
    validate: ValidateOptions = ValidateOptions()
    process: ProcessOptions = ProcessOptions()
    quality: QualityOptions = QualityOptions()
    export: ExportOptions = ExportOptions()


RAW_SCHEMA = pl.Schema(
    {
        "row": pl.Int64(),
        "byte_offset": pl.Int64(),
        "encoding": pl.String(),
        "key": pl.String(),
        "flags": pl.List(pl.String()),
        "record": pl.String(),
    }
)
"""One record as JSON text. `row` is 0-based in the file; `byte_offset` counts decompressed bytes and is null for Parquet
input; `key` is the top-level list of a JSON wrapper that held the record; `flags` are warnings of the row."""

MESSAGE = pl.Struct({"role": pl.String(), "content": pl.String(), "name": pl.String(), "ts": pl.String()})
SOURCE = pl.Struct(
    {
        "file": pl.String(),
        "sha256": pl.String(),
        "row": pl.Int64(),
        "byte_offset": pl.Int64(),
        "format": pl.String(),
        "encoding": pl.String(),
        "role_confidence": pl.Float32(),
    }
)
CONVERSATION_SCHEMA = pl.Schema(
    {
        "id": pl.String(),
        "messages": pl.List(MESSAGE),
        "source": SOURCE,
        "meta": pl.String(),
        "labels": pl.List(pl.Struct({"key": pl.String(), "value": pl.String()})),
        "flags": pl.List(pl.String()),
        "schema_version": pl.Int32(),
    }
)
"""The canonical conversation: roles are system, user, assistant or tool; content is NFC with LF line ends; `meta` is
canonical JSON of every field that no rule mapped."""

QUARANTINE_SCHEMA = pl.Schema(
    {
        "file": pl.String(),
        "row": pl.Int64(),
        "byte_offset": pl.Int64(),
        "stage": pl.String(),
        "code": pl.String(),
        "message": pl.String(),
        "raw": pl.String(),
        "sha256": pl.String(),
    }
)
"""A row set aside: `raw` is its first 4 KiB and must be redacted before anybody sees it; `sha256` is of the whole raw
record."""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One partition of a stage's output: a Parquet file and its number of rows."""

    path: Path
    rows: int


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What the input was found to be; every partition is standardized by the same plan.

    `format` is a name of the format table; `subformat` is "vicuna" where ids prove it. `mapping` is the column mapping
    in force, `columns` the keys seen in the first 1,000 records, `warnings` stable codes (`W_...`) of the whole file.
    """

    format: str
    subformat: str | None = None
    container: str
    compression: str = "none"
    encoding: str = "utf-8"
    file: str
    sha256: str
    columns: list[str] = []
    mapping: dict[str, str] = {}
    warnings: list[str] = []


class FileError(msgspec.Struct, frozen=True, kw_only=True):
    """A fault of the whole file that still left readable rows: the run ends failed, the rows are kept."""

    code: str
    detail: str


class Ingested(msgspec.Struct, frozen=True, kw_only=True):
    """Result of stage 1. `sha256` and `bytes` are those of the input file as given (compressed if it is)."""

    partitions: list[Part]
    quarantine: Path | None
    plan: Plan
    rows_in: int
    rows_out: int
    rejected: int
    rejected_by_code: dict[str, int]
    sha256: str
    bytes: int
    errors: list[FileError] = []


class Standardized(msgspec.Struct, frozen=True, kw_only=True):
    """Result of stage 2 for one partition. Rows in are raw records; for a long table many make one conversation, and
    `rows_merged` counts those that joined another row's conversation: rows_in = rows_out + rejected + rows_merged.
    """

    conversations: Path | None
    quarantine: Path | None
    rows_in: int
    rows_out: int
    rejected: int
    rows_merged: int = 0
    rejected_by_code: dict[str, int] = {}
    by_format: dict[str, int] = {}
    warnings_by_code: dict[str, int] = {}


class Reject(msgspec.Struct, frozen=True, kw_only=True):
    """A row on its way to quarantine: `message` never quotes raw content, `raw` holds at most `RAW_LIMIT` bytes of it."""

    row: int
    byte_offset: int | None
    code: str
    message: str
    raw: bytes
    sha256: str


def reject(row: int, byte_offset: int | None, code: str, message: str, raw: bytes, sha256: str | None = None) -> Reject:
    """Set a row aside. `raw` is the whole record, or its head when `sha256` of the whole is given."""
    digest = sha256 or hashlib.sha256(raw).hexdigest()
    return Reject(row=row, byte_offset=byte_offset, code=code, message=message, raw=raw[:RAW_LIMIT], sha256=digest)


def canonical_json(value: Any) -> str:
    """`value` as JSON with sorted keys and no spaces: equal values give equal text."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS).decode()


def quarantine_frame(file: str, stage: str, rejects: list[Reject]) -> pl.DataFrame:
    """Rejected rows as a frame of `QUARANTINE_SCHEMA`, in the order given."""
    return pl.DataFrame(
        {
            "file": [file] * len(rejects),
            "row": [item.row for item in rejects],
            "byte_offset": [item.byte_offset for item in rejects],
            "stage": [stage] * len(rejects),
            "code": [item.code for item in rejects],
            "message": [item.message for item in rejects],
            "raw": [item.raw.decode("utf-8", "replace") for item in rejects],
            "sha256": [item.sha256 for item in rejects],
        },
        schema=QUARANTINE_SCHEMA,
    )


def series_of(name: str, values: Any, kind: pa.DataType) -> pl.Series:
    """A column from Python values through Arrow: for nested types many times faster than through polars."""
    return arrow_series(name, pa.array(values, kind))


def arrow_series(name: str, array: pa.Array) -> pl.Series:
    """An Arrow array as a column."""
    series = pl.from_arrow(array)
    if not isinstance(series, pl.Series):
        raise TypeError("an Arrow array gives a series")
    return series.rename(name)


TEXT_LIST = pa.large_list(pa.large_string())


def write_parquet(frame: pl.DataFrame, path: Path) -> None:
    """Write `frame` with the fixed settings that make equal frames equal bytes."""
    frame.write_parquet(path, compression="zstd", compression_level=3, row_group_size=10_000, statistics=False)
