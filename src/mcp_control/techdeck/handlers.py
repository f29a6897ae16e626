"""The tasks of a techdeck run: fetch artifacts, call the stage's plain function over local files, store what it wrote.

A stage raises `DataError` when the whole input is unusable; that is permanent, with its code.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import orjson

from mcp_control.artifacts.model import ArtifactView, Role
from mcp_control.sdk.artifacts import UploadOptions
from mcp_control.sdk.context import SyncContext
from mcp_control.sdk.errors import Permanent
from mcp_control.techdeck.export.export import export as write_export
from mcp_control.techdeck.ingestion import ingest, only_rejected
from mcp_control.techdeck.model import DataError, Options, Plan, Progress
from mcp_control.techdeck.payloads import (
    CombineIn,
    ExportedRef,
    ExportIn,
    ExportOut,
    FileFault,
    IngestionIn,
    IngestionOut,
    PartIn,
    PartOut,
    PartRef,
    ProcessingOut,
    QualityIn,
    QualityOut,
    StageOut,
    StageRows,
)
from mcp_control.techdeck.processing.combine import Combined
from mcp_control.techdeck.processing.combine import combine as combine_processing
from mcp_control.techdeck.processing.process import process
from mcp_control.techdeck.quality.quarantine import write_quarantine
from mcp_control.techdeck.quality.report import StageCount, assess_quality
from mcp_control.techdeck.standardization import standardize
from mcp_control.techdeck.validation.combine import ValidationSummary
from mcp_control.techdeck.validation.combine import combine as combine_validation
from mcp_control.techdeck.validation.stage import validate

PARQUET = "application/vnd.apache.parquet"
JSON = "application/json"
MEDIA_TYPES = {
    ".parquet": PARQUET,
    ".json": JSON,
    ".jsonl": "application/x-ndjson",
    ".csv": "text/csv",
    ".md": "text/markdown",
    ".html": "text/html",
}


@contextmanager
def _attempt() -> Iterator[Path]:
    """A folder for one attempt; a file that cannot be used fails the task for good."""
    with TemporaryDirectory(prefix="techdeck-") as name:
        try:
            yield Path(name)
        except DataError as error:
            raise Permanent(f"{error.code}: {error.detail}", code=error.code) from error


def _options(tree: dict[str, Any]) -> Options:
    """Options from the tree of a payload. What the options do not know is a permanent error that names it."""
    try:
        return msgspec.convert(tree, Options)
    except msgspec.ValidationError as error:
        raise Permanent(f"options: {error}", code="invalid-options") from error


def _progress(ctx: SyncContext) -> Progress:
    """Progress that stops the work when the attempt must."""

    def told(done: int, total: int | None, message: str) -> None:
        ctx.check()
        count = f"{done:,} of {total:,} rows" if total else f"{done:,} rows"
        ctx.progress(done / total if total else 0.0, f"{count}, {message}")

    return told


def _store(ctx: SyncContext, path: Path, name: str, rows: int | None = None, *, role: Role = "intermediate") -> str:
    return _upload(ctx, path, name, rows, role).id


def _upload(ctx: SyncContext, path: Path, name: str, rows: int | None, role: Role) -> ArtifactView:
    options = UploadOptions(media_type=MEDIA_TYPES[path.suffix], role=role)
    if rows is not None:
        options["rows"] = rows
    return ctx.artifacts.upload(path, name, **options)


def _part(ctx: SyncContext, path: Path | None, rows: int, kind: str) -> PartRef | None:
    if path is None:
        return None
    return PartRef(artifact=_store(ctx, path, f"{kind}-{_place(ctx)}.parquet", rows), rows=rows)


def _aside(ctx: SyncContext, path: Path | None, rows: int, kind: str) -> str | None:
    return None if path is None else _store(ctx, path, f"{kind}-quarantine-{_place(ctx)}.parquet", rows)


def _place(ctx: SyncContext) -> str:
    return f"{ctx.item or 0:05d}"


def _added(counters: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return dict(sorted(total.items()))


def _counts(rows_in: int, rows_out: int, rejected: int) -> dict[str, int]:
    return {"rows_in": rows_in, "rows_out": rows_out, "rejected": rejected}


def ingestion(payload: IngestionIn, ctx: SyncContext) -> IngestionOut:
    """Stage 1: read the input into raw partitions."""
    options = _options(payload.options)
    with _attempt() as folder:
        name = ctx.artifacts.get(payload.input).name
        source = ctx.artifacts.local(payload.input, folder)
        found = ingest(source, name, folder / "out", options, _progress(ctx))
        if payload.rejected.run and payload.rejected.fixed is None:
            aside = _files(ctx, folder, [artifact for part in payload.rejected.parts for artifact in part])
            found = only_rejected(found, aside)
        partitions = [
            PartRef(artifact=_store(ctx, part.path, f"raw-{place:05d}.parquet", part.rows), rows=part.rows)
            for place, part in enumerate(found.partitions)
        ]
        quarantine = _aside(ctx, found.quarantine, found.rejected, "raw")
    return IngestionOut(
        partitions=partitions,
        quarantine=[quarantine] if quarantine else [],
        plan=msgspec.to_builtins(found.plan),
        counts=_counts(found.rows_in, found.rows_out, found.rejected),
        rejected_by_code=found.rejected_by_code,
        errors=[FileFault(code=error.code, detail=error.detail) for error in found.errors],
    )


def standardization(payload: PartIn, ctx: SyncContext) -> PartOut:
    """Stage 2 for one partition: one schema for every conversation format."""
    with _attempt() as folder:
        plan = msgspec.convert(payload.plan, Plan)
        part = ctx.artifacts.local(payload.part.artifact, folder)
        done = standardize(part, plan, folder / "out", _options(payload.options), _progress(ctx))
        return PartOut(
            partition=_part(ctx, done.conversations, done.rows_out, "standardized"),
            quarantine=_aside(ctx, done.quarantine, done.rejected, "standardized"),
            counts={**_counts(done.rows_in, done.rows_out, done.rejected), "rows_merged": done.rows_merged},
            rejected_by_code=done.rejected_by_code,
            by_format=done.by_format,
            warnings_by_code=done.warnings_by_code,
        )


def validation(payload: PartIn, ctx: SyncContext) -> PartOut:
    """Stage 3 for one partition: structure, content, privacy, bias."""
    with _attempt() as folder:
        part = ctx.artifacts.local(payload.part.artifact, folder)
        done = validate(part, folder / "out", _options(payload.options), _progress(ctx))
        stats = folder / "stats.json"
        stats.write_bytes(orjson.dumps(done.stats, option=orjson.OPT_SORT_KEYS))
        return PartOut(
            partition=_part(ctx, done.conversations, done.rows_out, "validated"),
            quarantine=_aside(ctx, done.quarantine, done.rejected, "validated"),
            counts=_counts(done.rows_in, done.rows_out, done.rejected),
            rejected_by_code=done.rejected_by_code,
            stats=_store(ctx, stats, f"validation-{_place(ctx)}.json"),
        )


def gather(payload: CombineIn, ctx: SyncContext) -> StageOut:
    """The end of stages 2 and 3: partitions in order, counts added up, and validation's summary over all of them."""
    items = payload.items
    stats = [orjson.loads(ctx.artifacts.read(item.stats)) for item in items if item.stats]
    summary = None
    if ctx.stage == "validation":
        with _attempt() as folder:
            path = folder / "validation.json"
            path.write_bytes(msgspec.json.encode(combine_validation(stats)))
            summary = _store(ctx, path, "validation.json")
    return StageOut(
        partitions=[item.partition for item in items if item.partition],
        quarantine=[item.quarantine for item in items if item.quarantine],
        counts={**_counts(0, 0, 0), **_added(item.counts for item in items)},
        rejected_by_code=_added(item.rejected_by_code for item in items),
        by_format=_added(item.by_format for item in items),
        warnings_by_code=_added(item.warnings_by_code for item in items),
        validation=summary,
    )


def processing(payload: PartIn, ctx: SyncContext) -> PartOut:
    """Stage 4 for one partition: metrics and signatures."""
    with _attempt() as folder:
        part = ctx.artifacts.local(payload.part.artifact, folder)
        done = process(part, folder / "out", _options(payload.options), _progress(ctx), total_rows=payload.total_rows)
        return PartOut(
            partition=_part(ctx, done.path, done.rows_out, "processed"),
            counts=_counts(done.rows_in, done.rows_out, done.rejected),
            signatures=_store(ctx, done.signatures, f"signatures-{_place(ctx)}.parquet", done.rows_out),
        )


def processing_combine(payload: CombineIn, ctx: SyncContext) -> ProcessingOut:
    """The end of stage 4: duplicates, clusters and splits over all partitions."""
    items = [item for item in payload.items if item.partition and item.signatures]
    with _attempt() as folder:
        parts = _files(ctx, folder, [item.partition.artifact for item in items if item.partition])
        signatures = _files(ctx, folder, [item.signatures for item in items if item.signatures])
        done = combine_processing(parts, signatures, folder / "out", _options(payload.options), _progress(ctx))
        assignments = _store(ctx, done.assignments, "assignments.parquet", done.rows)
    return ProcessingOut(
        partitions=[item.partition for item in items if item.partition],
        signatures=[item.signatures for item in items if item.signatures],
        assignments=assignments,
        counts={**_counts(0, 0, 0), **_added(item.counts for item in payload.items)},
        exact=done.exact,
        near=done.near,
        clusters=done.clusters,
        leaks=done.leaks,
        splits=done.splits,
        kept=done.kept,
    )


def quality_assessment(payload: QualityIn, ctx: SyncContext) -> QualityOut:
    """Stage 5: scores, gate and report."""
    options = _options(payload.options)
    with _attempt() as folder:
        combined = _combined(ctx, folder, payload.processing)
        done = assess_quality(
            _files(ctx, folder, [part.artifact for part in payload.processing.partitions]),
            _files(ctx, folder, payload.processing.signatures),
            combined,
            msgspec.json.decode(ctx.artifacts.read(payload.validation), type=ValidationSummary),
            _stages(payload.stages),
            msgspec.convert(payload.plan, Plan),
            folder / "out",
            options,
            _progress(ctx),
        )
        aside = _files(ctx, folder, [artifact for artifacts in payload.quarantine for artifact in artifacts])
        rejected = write_quarantine(aside, folder / "quarantine.jsonl", options.validate.phone_regions)
        return QualityOut(
            score=done.score,
            gate=done.gate,
            failed=done.failed,
            report=_store(ctx, done.report, "report.json", role="report"),
            page=_store(ctx, done.page, "report.html", role="report"),
            quarantine=_store(ctx, folder / "quarantine.jsonl", "quarantine.jsonl", rejected, role="report"),
            counts=_counts(done.rows, done.rows, 0),
            summary={"quality": {"score": done.score, "gate": done.gate, "failed": done.failed}},
        )


def export(payload: ExportIn, ctx: SyncContext) -> ExportOut:
    """Stage 6: the files to use, with manifest and data card."""
    with _attempt() as folder:
        assignments = ctx.artifacts.local(payload.processing.assignments, folder)
        done = write_export(
            _files(ctx, folder, [part.artifact for part in payload.processing.partitions]),
            assignments,
            {"score": payload.score, "gate": payload.gate},
            _stages(payload.stages),
            msgspec.convert(payload.plan, Plan),
            folder / "out",
            _options(payload.options),
            _progress(ctx),
            rerun_of=payload.rejected.run,
        )
        names: list[tuple[Path, int | None]] = [(file.path, file.rows) for file in done.files]
        files = [_exported(ctx, path, rows) for path, rows in [*names, (done.manifest, None), (done.card, None)]]
    return ExportOut(
        files=files,
        counts=_counts(done.rows_in, done.rows_out, done.rejected),
        duplicates=done.duplicates,
        errors=payload.errors,
        summary={"export": {"rows": done.rows_out, "duplicates": done.duplicates}},
    )


def _exported(ctx: SyncContext, path: Path, rows: int | None) -> ExportedRef:
    view = _upload(ctx, path, path.name, rows, "output")
    return ExportedRef(name=view.name, artifact=view.id, sha256=view.sha256, rows=rows)


def _files(ctx: SyncContext, folder: Path, artifacts: list[str]) -> list[Path]:
    """Local files of artifacts, in order."""
    found = []
    for artifact in artifacts:
        ctx.check()
        found.append(ctx.artifacts.local(artifact, folder))
    return found


def _stages(stages: list[StageRows]) -> list[StageCount]:
    return [
        StageCount(
            name=stage.name,
            rows_in=stage.counts["rows_in"],
            rows_out=stage.counts["rows_out"],
            rejected=stage.counts["rejected"],
            rejected_by_code=stage.rejected_by_code,
        )
        for stage in stages
    ]


def _combined(ctx: SyncContext, folder: Path, done: ProcessingOut) -> Combined:
    return Combined(
        assignments=ctx.artifacts.local(done.assignments, folder),
        rows=done.counts["rows_out"],
        exact=done.exact,
        near=done.near,
        clusters=done.clusters,
        leaks=done.leaks,
        splits=done.splits,
        kept=done.kept,
    )
