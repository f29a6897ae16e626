"""Stage 1: any supported file to raw partitions of JSON records, and the plan by which they are standardized."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import orjson

from mcp_control.techdeck.ingestion import detect, encoding, jsonstream, streams
from mcp_control.techdeck.ingestion.partitions import PartitionWriter, regroup
from mcp_control.techdeck.ingestion.plan import SAMPLE, find_format
from mcp_control.techdeck.ingestion.records import (
    NO_FLAGS,
    Item,
    Limits,
    Raw,
    Row,
    encoding_reject,
    parse_all,
    read_jsonl,
    require_rows,
)
from mcp_control.techdeck.ingestion.tabular import read_csv, read_parquet
from mcp_control.techdeck.model import (
    MIB,
    DataError,
    FileError,
    Ingested,
    Options,
    Plan,
    Progress,
    Reject,
    quarantine_frame,
    reject,
    write_parquet,
)

_HEAD = MIB
_STEP = 10_000
_KEEP_RAW = 10_000
"""Rejected rows whose raw head is kept; later ones keep place, reason and digest, so memory stays bounded."""


def ingest(source: Path, name: str, out: Path, options: Options, progress: Progress) -> Ingested:
    """Read `source` (called `name` in all output) into Parquet partitions under the folder `out`.

    Rows that cannot be read go to quarantine with their reason. A damaged compressed stream keeps the rows before the
    damage and is reported in `errors`. Raises DataError when nothing of the file can be used.
    """
    out.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = source.stat().st_size
    if size == 0:
        raise DataError("E_EMPTY", "file is empty (0 bytes)")
    reader = _Reader(source, name, out, options)
    try:
        return _Ingestion(reader, name, out, options, progress).run(digest, size)
    finally:
        reader.close()


class _Reader:
    """Detects the container on construction and then gives the rows once."""

    def __init__(self, source: Path, name: str, out: Path, options: Options) -> None:
        self._options = options.ingest
        self._path = source
        self._spool: Path | None = None
        self.damage: streams.StreamDamagedError | None = None
        self.closed = True
        first = next(streams.file_chunks(source))
        self.compression = streams.compression_of(first)
        head, whole = self._head()
        if head.startswith(detect.PARQUET_MAGIC):
            self.container: detect.Container = "parquet"
            self.encoding = encoding.Encoding()
            if self.compression != "none":
                self._spool = out / "spool"
                with self._spool.open("wb") as file:
                    for chunk in self._chunks():
                        file.write(chunk)
                self._path = self._spool
            self._require_tail()
            return
        if not head:
            raise DataError("E_TRUNCATED" if self.damaged() else "E_EMPTY", "compressed stream holds no data")
        detect.refuse_binary(head, name)
        ingest_options = options.ingest
        self.encoding = encoding.survey(self._chunks(), head, ingest_options.encoding, ingest_options.strict_encoding)
        text = b"".join(encoding.as_utf8([head], self.encoding, strict=False))
        self._old_newlines = b"\n" not in text and b"\r" in text
        shape = detect.shape_of(
            text.replace(b"\r", b"\n") if self._old_newlines else text,
            whole=whole,
            limit=ingest_options.max_record_bytes,
            named=bool(ingest_options.mapping),
        )
        self.container, self._delimiter = shape.container, shape.delimiter

    def damaged(self) -> bool:
        """True once the compressed stream was found cut or corrupt."""
        return self.damage is not None

    def _head(self) -> tuple[bytes, bool]:
        """The first MiB of decompressed bytes, and whether that is all."""
        pieces: list[bytes] = []
        size = 0
        for chunk in self._chunks():
            pieces.append(chunk)
            size += len(chunk)
            if size > _HEAD:
                return b"".join(pieces)[:_HEAD], False
        return b"".join(pieces), not self.damaged()

    def _chunks(self) -> Iterator[bytes]:
        """Decompressed bytes; damage ends them and is kept for the report."""
        try:
            yield from streams.chunks(self._path, self.compression if self._spool != self._path else "none",
                                      self._options.max_ratio)  # fmt: skip
        except streams.StreamDamagedError as damage:
            self.damage = damage

    def _require_tail(self) -> None:
        with self._path.open("rb") as file:
            file.seek(max(0, self._path.stat().st_size - 4))
            if file.read() != detect.PARQUET_MAGIC or self.damaged():
                raise DataError("E_TRUNCATED", "Parquet file without its end; no records can be read")

    def _text(self) -> Iterator[bytes]:
        stream = encoding.as_utf8(self._chunks(), self.encoding, self._options.strict_encoding)
        return (chunk.replace(b"\r", b"\n") for chunk in stream) if self._old_newlines else stream

    def rows(self) -> Iterator[Item]:
        limits = Limits(
            encoding=self.encoding,
            max_record_bytes=self._options.max_record_bytes,
            nan_as_null=self._options.nan_as_null,
            id_column=self._options.mapping.get("id"),
            cut=self.damaged,
        )
        if self.container == "parquet":
            return read_parquet(self._path, limits)
        if self.container == "csv":
            return read_csv(self._text(), self._delimiter, limits, rename=bool(self._options.mapping))
        if self.container == "jsonl":
            return read_jsonl(self._text(), limits)
        if self.container in ("json_object", "text"):
            return self._one(limits)
        shapes: dict[str, jsonstream.Shape] = {
            "json_array": "array", "json_wrapper": "wrapper", "json_concatenated": "concatenated"
        }  # fmt: skip
        splitter = jsonstream.Splitter(shapes[self.container], limits.max_record_bytes, self.encoding.mark)
        return self._split(splitter, limits)

    def _split(self, splitter: jsonstream.Splitter, limits: Limits) -> Iterator[Item]:
        def records() -> Iterator[Raw]:
            held: Raw | None = None
            for raw in splitter.split(self._text()):
                if held is not None:
                    yield held
                held = raw
            self.closed = splitter.closed
            # The last record of a damaged stream is a piece, unless the stream broke between two.
            if held is not None and not (self.damaged() and _broken(held)):
                yield held

        yield from parse_all(records(), limits)

    def _one(self, limits: Limits) -> Iterator[Item]:
        """The whole text as one record."""
        limit = limits.max_record_bytes
        held, size = [], 0
        for chunk in self._text():
            held.append(chunk)
            size += len(chunk)
            if size > limit:
                raise DataError("E_ROW_TOO_LARGE", f"row 0: over the limit of {limit} bytes")
        data = b"".join(held)
        if self.container == "json_object":
            yield from parse_all([(None, self.encoding.mark, data)], limits)
            return
        try:
            text, name, departs = encoding.decode(data, self.encoding)
        except UnicodeDecodeError as error:
            yield encoding_reject(0, self.encoding.mark, data, error)
            return
        flags = ["W_ENCODING_MIXED"] if departs and self.encoding.mixed else NO_FLAGS
        yield Row(0, self.encoding.mark, name, None, flags, orjson.dumps({"text": text}).decode(), None)

    def close(self) -> None:
        if self._spool is not None:
            self._spool.unlink(missing_ok=True)


def _broken(raw: Raw) -> bool:
    if isinstance(raw, streams.Oversize):
        return True
    try:
        orjson.loads(raw[2])
    except orjson.JSONDecodeError:
        return True
    return False


class _Ingestion:
    """One run of the stage: sorts rows into partitions and quarantine."""

    def __init__(self, reader: _Reader, name: str, out: Path, options: Options, progress: Progress) -> None:
        self._reader = reader
        self._name = name
        self._out = out
        self._options = options
        self._progress = progress
        self._writer = PartitionWriter(out, options.ingest.partition_bytes)
        self._rejects: list[Reject] = []
        self._warnings: Counter[str] = Counter()
        self._sample: list[str] = []

    def run(self, digest: str, size: int) -> Ingested:
        rows = accepted = 0
        for item in self._reader.rows():
            rows += 1
            if isinstance(item, Row):
                accepted += 1
                if len(self._sample) < SAMPLE:
                    self._sample.append(item.text)
                self._warnings.update(item.flags)
                self._writer.add(item)
            else:
                keep = item.raw if len(self._rejects) < _KEEP_RAW else b""
                self._rejects.append(reject(item.row, item.byte_offset, item.code, item.message, keep, item.sha256))
            if rows % _STEP == 0:
                self._progress(rows, None, "reading")
        self._writer.flush()
        errors = self._errors(accepted)
        if not accepted and errors:
            raise DataError(errors[0].code, errors[0].detail)
        require_rows(self._rejects[0] if self._rejects else None, accepted)
        plan = self._plan(digest)
        parts = self._writer.parts
        if plan.format == "long_table":
            parts = regroup(parts, plan.mapping)
        self._progress(rows, rows, "read")
        return Ingested(
            partitions=parts,
            quarantine=self._quarantine(),
            plan=plan,
            rows_in=rows,
            rows_out=accepted,
            rejected=len(self._rejects),
            rejected_by_code=dict(sorted(Counter(item.code for item in self._rejects).items())),
            sha256=digest,
            bytes=size,
            errors=errors,
        )

    def _errors(self, kept: int) -> list[FileError]:
        damage = self._reader.damage
        if damage is None:
            return []
        how = "ended" if damage.code == "E_TRUNCATED" else "is damaged"
        detail = f"compressed stream {how} after {damage.size} bytes; {kept} complete records kept"
        return [FileError(code=damage.code, detail=detail)]

    def _plan(self, digest: str) -> Plan:
        options = self._options.ingest
        found = find_format(self._sample, options)
        warnings = set(self._warnings)
        if found.format == "long_table":
            warnings.discard("W_DUPLICATE_ID")  # every turn names its conversation
        if self._reader.container == "json_concatenated":
            warnings.add("W_CONCATENATED")
        if not self._reader.closed and self._reader.damage is None:
            warnings.add("W_UNCLOSED")
        return Plan(
            format=found.format,
            subformat=found.subformat,
            container=self._reader.container,
            compression=self._reader.compression,
            encoding=self._reader.encoding.name,
            file=self._name,
            sha256=digest,
            columns=found.columns,
            mapping=options.mapping,
            warnings=sorted(warnings),
        )

    def _quarantine(self) -> Path | None:
        if not self._rejects:
            return None
        path = self._out / "quarantine.parquet"
        write_parquet(quarantine_frame(self._name, "ingestion", self._rejects), path)
        return path
