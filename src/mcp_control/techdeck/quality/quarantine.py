"""All rows that any stage set aside, as one file for people: JSON lines with the reason, personal data redacted."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from mcp_control.techdeck.model import QUARANTINE_SCHEMA
from mcp_control.techdeck.validation.privacy import redact_quarantine

LIMIT = 10_000
"""Rows shown: the report has the full counts by code, this file is for reading."""


def write_quarantine(parts: Sequence[Path], out: Path, regions: Sequence[str]) -> int:
    """Write the first `LIMIT` rows of `parts`, ordered by row, to the file `out`; return how many were written."""
    kept = pl.DataFrame(schema=QUARANTINE_SCHEMA)
    for part in parts:
        kept = pl.concat([kept, pl.read_parquet(part)]).sort("row", "stage", "code", "sha256").head(LIMIT)
    with out.open("wb") as file:
        if kept.height:
            redact_quarantine(kept, tuple(regions)).write_ndjson(file)
    return kept.height
