"""Stages 1 and 2 run over a file, and what a test wants to know of the result."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from mcp_control.techdeck.ingestion import ingest
from mcp_control.techdeck.model import CONVERSATION_SCHEMA, Ingested, IngestOptions, Options
from mcp_control.techdeck.standardization import standardize

MISSING = "no real data here: set MCP_CONTROL_TEST_DATA to the folder that holds {}"


def quiet(done: int, total: int | None, message: str) -> None:
    """A progress callback that tells nobody."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """Both stages of one file: conversations in row order and all quarantined rows."""

    ingested: Ingested
    conversations: list[dict[str, Any]]
    quarantine: list[dict[str, Any]]
    merged: int

    @property
    def format(self) -> str:
        """The file's format."""
        return self.ingested.plan.format

    def turns(self, index: int = 0) -> list[tuple[str, str]]:
        """Roles and texts of one conversation."""
        return [(message["role"], message["content"]) for message in self.conversations[index]["messages"]]

    def codes(self, stage: str | None = None) -> dict[str, int]:
        """Quarantined rows per code."""
        rows = [item for item in self.quarantine if stage in (None, item["stage"])]
        return dict(sorted(Counter(item["code"] for item in rows).items()))

    def rejected(self, stage: str) -> dict[int, str]:
        """Code by row of one stage."""
        return {item["row"]: item["code"] for item in self.quarantine if item["stage"] == stage}


def run_path(path: Path, out: Path, options: Options | None = None) -> Outcome:
    """Run stages 1 and 2 over a file."""
    chosen = options or Options()
    ingested = ingest(path, path.name, out / "raw", chosen, quiet)
    frames = [] if ingested.quarantine is None else [pl.read_parquet(ingested.quarantine)]
    conversations: list[dict[str, Any]] = []
    merged = 0
    for number, part in enumerate(ingested.partitions):
        done = standardize(part.path, ingested.plan, out / f"part-{number}", chosen, quiet)
        assert done.rows_in == part.rows == done.rows_out + done.rejected + done.rows_merged
        merged += done.rows_merged
        if done.conversations is not None:
            frame = pl.read_parquet(done.conversations)
            assert frame.schema == CONVERSATION_SCHEMA
            conversations += frame.to_dicts()
        if done.quarantine is not None:
            frames.append(pl.read_parquet(done.quarantine))
    quarantine = [row for frame in frames for row in frame.to_dicts()]
    conversations.sort(key=lambda item: item["source"]["row"])
    return Outcome(ingested=ingested, conversations=conversations, quarantine=quarantine, merged=merged)


def run(data: bytes, tmp_path: Path, name: str = "input.jsonl", **ingest_options: Any) -> Outcome:
    """Run stages 1 and 2 over bytes, with ingest options by name."""
    path = tmp_path / name
    path.write_bytes(data)
    return run_path(path, tmp_path / "out", Options(ingest=IngestOptions(**ingest_options)))


def real_data() -> Path:
    """The folder of real data sets; it may be absent."""
    default = Path(__file__).parents[3] / "shared" / "data"
    return Path(os.environ.get("MCP_CONTROL_TEST_DATA", default))
