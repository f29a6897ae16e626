"""Write the kept conversations, split by split, with `manifest.json` and `README.md`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import polars as pl
from msgspec import Struct, to_builtins

from mcp_control.techdeck.export.card import card
from mcp_control.techdeck.export.formats import convert
from mcp_control.techdeck.export.writers import Files, sha256
from mcp_control.techdeck.model import CONVERSATION_SCHEMA, VERSION, Options, Plan, Progress
from mcp_control.techdeck.processing.groups import SPLITS
from mcp_control.techdeck.processing.metrics import ENCODING, METRICS
from mcp_control.techdeck.quality.report import StageCount

SLICE_ROWS = 10_000


class ExportedFile(Struct, frozen=True, kw_only=True):
    """A data file: `name` is relative to the export folder, `rows` conversations."""

    name: str
    split: str
    path: Path
    sha256: str
    bytes: int
    rows: int


class Exported(Struct, frozen=True, kw_only=True):
    """Result of stage 6. rows_in = rows_out + duplicates + rejected (what the format cannot express)."""

    files: list[ExportedFile]
    manifest: Path
    card: Path
    rows_in: int
    rows_out: int
    duplicates: int
    rejected: int
    trimmed: int


def export(
    parts: Sequence[Path],
    assignments: Path,
    quality: dict[str, Any],
    stages: Sequence[StageCount],
    plan: Plan,
    out: Path,
    options: Options,
    progress: Progress,
    *,
    rerun_of: str = "",
) -> Exported:
    """Write train, validation and test files, `manifest.json` and `README.md` to the folder `out`.

    `parts` are the processed partitions in any order, `quality` has keys score and gate. Rows whose `duplicate_of` is
    set are left out and counted. Rows are in the order of the input. `rerun_of` is the run that set the rows
    aside, where this one is about them alone; the manifest names it.
    """
    out.mkdir(parents=True, exist_ok=True)
    table = pl.read_parquet(assignments, columns=["row", "duplicate_of", "split"])
    languages: dict[str, int] = {}
    read = dropped = trimmed = duplicates = 0
    with Files(out, options.export.container, SPLITS) as files:
        nothing = convert(
            pl.DataFrame(schema={**CONVERSATION_SCHEMA, "metrics": pl.Struct(METRICS)}), options.export.format
        )
        for split in SPLITS:
            files.write(split, nothing.frame)  # a file without rows still has its header or schema
        for part in _in_order(parts):
            frame = pl.read_parquet(part, columns=["id", "messages", "source", "meta", "labels", "metrics"])
            for offset in range(0, frame.height, SLICE_ROWS):
                rows = frame.slice(offset, SLICE_ROWS).with_columns(pl.col("source").struct.field("row"))
                kept = rows.join(table, on="row", how="left", maintain_order="left").filter(
                    pl.col("duplicate_of").is_null()
                )
                duplicates += rows.height - kept.height
                for split in SPLITS:
                    done = convert(kept.filter(pl.col("split") == split), options.export.format)
                    files.write(split, done.frame)
                    dropped, trimmed = dropped + done.dropped, trimmed + done.trimmed
                    for name, count in done.frame["language"].value_counts().iter_rows():
                        languages[name] = languages.get(name, 0) + count
                read += rows.height
                progress(read, table.height, "exported")
        counts = {split: files.rows(split) for split in SPLITS}
    written = [
        ExportedFile(
            name=path.name,
            split=split,
            path=path,
            sha256=sha256(path),
            bytes=path.stat().st_size,
            rows=counts[split],
        )
        for split, path in files.paths.items()
    ]
    total = sum(counts.values())
    manifest = {
        "techdeck": VERSION,
        "dataset": {"file": plan.file, "sha256": plan.sha256, "format": plan.format},
        "format": options.export.format,
        "container": options.export.container,
        "tokenizer": ENCODING,
        "options": to_builtins(options),
        "files": [
            {"name": file.name, "split": file.split, "sha256": file.sha256, "bytes": file.bytes, "rows": file.rows}
            for file in written
        ],
        "stages": [
            *to_builtins(list(stages)),
            {"name": "export", "rows_in": read, "rows_out": total, "rejected": dropped, "rejected_by_code": {}},
        ],
        "counts": {"rows": total, "duplicates": duplicates, "not_representable": dropped, "trimmed": trimmed},
        "languages": [
            {"name": name, "rows": count}
            for name, count in sorted(languages.items(), key=lambda item: (-item[1], item[0]))
        ],
        "quality": quality,
        **({"rerun_of": rerun_of} if rerun_of else {}),
    }
    (out / "manifest.json").write_bytes(orjson.dumps(manifest, option=orjson.OPT_INDENT_2) + b"\n")
    (out / "README.md").write_text(card(manifest), encoding="utf-8")
    return Exported(
        files=written,
        manifest=out / "manifest.json",
        card=out / "README.md",
        rows_in=read,
        rows_out=total,
        duplicates=duplicates,
        rejected=dropped,
        trimmed=trimmed,
    )


def _in_order(parts: Sequence[Path]) -> list[Path]:
    """Partitions by their first row."""
    row = pl.col("source").struct.field("row").min()
    first = {part: pl.scan_parquet(part).select(row).collect().item() for part in parts}
    return sorted(parts, key=lambda part: first[part] or 0)
