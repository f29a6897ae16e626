"""Canonical conversations for tests, built from (role, text) pairs."""

import json
from itertools import pairwise
from pathlib import Path

import polars as pl

from mcp_control.techdeck.model import CONVERSATION_SCHEMA, Options, write_parquet
from mcp_control.techdeck.processing.combine import Combined, combine
from mcp_control.techdeck.processing.process import Processed, process

Turns = list[tuple[str, str]]


def quiet(done: int, total: int | None, message: str) -> None:
    """A progress callback that tells nobody."""


def frame(conversations: list[Turns], *, meta: list[dict[str, object]] | None = None, first: int = 0) -> pl.DataFrame:
    """One row per conversation; row numbers count from `first`, ids are c0, c1, ..."""
    rows = range(first, first + len(conversations))
    return pl.DataFrame(
        {
            "id": [f"c{row}" for row in rows],
            "messages": [
                [{"role": role, "content": text, "name": None, "ts": None} for role, text in turns]
                for turns in conversations
            ],
            "source": [
                {
                    "file": "a.jsonl",
                    "sha256": "0" * 64,
                    "row": row,
                    "byte_offset": row * 100,
                    "format": "chatml",
                    "encoding": "utf-8",
                    "role_confidence": 1.0,
                }
                for row in rows
            ],
            "meta": [json.dumps(value) for value in meta or [{}] * len(conversations)],
            "labels": [[] for _ in rows],
            "flags": [[] for _ in rows],
            "schema_version": [1] * len(conversations),
        },
        schema=CONVERSATION_SCHEMA,
    )


def processed(
    data: pl.DataFrame, folder: Path, cuts: list[int] | None = None, options: Options | None = None
) -> list[Processed]:
    """Stage 4 over `data` divided before the rows `cuts`."""
    bounds = [0, *(cuts or []), data.height]
    results = []
    for number, (begin, end) in enumerate(pairwise(bounds)):
        part = folder / f"in-{number}.parquet"
        folder.mkdir(parents=True, exist_ok=True)
        write_parquet(data.slice(begin, end - begin), part)
        results.append(process(part, folder / f"out-{number}", options or Options(), quiet, total_rows=data.height))
    return results


def combined(results: list[Processed], folder: Path, options: Options | None = None) -> Combined:
    """The combine step over `results`."""
    return combine(
        [result.path for result in results],
        [result.signatures for result in results],
        folder / "combined",
        options or Options(),
        quiet,
    )


def validated(data: pl.DataFrame, *, pii: int = 0, residual: int = 0) -> pl.DataFrame:
    """`data` as stage 3 would hand it on: with a `validation` struct that found nothing else."""
    pairs = pl.col("messages").list.eval(
        (pl.element().struct.field("role") == pl.element().struct.field("role").shift(1)).sum()
    )
    return data.with_columns(
        pl.struct(
            pl.lit("ok").alias("verdict"),
            pl.lit([], dtype=pl.List(pl.String)).alias("warnings"),
            pairs.list.first().cast(pl.Int32).alias("same_role_pairs"),
            (pl.col("messages").list.len().cast(pl.Int32) - 1).alias("adjacent_pairs"),
            pl.lit(value=True).alias("content_ok"),
            pl.col("messages").list.len().cast(pl.Int32).alias("language_turns"),
            pl.col("messages").list.len().cast(pl.Int32).alias("same_language_turns"),
            pl.lit(pii, dtype=pl.Int32).alias("pii_spans"),
            pl.lit(residual, dtype=pl.Int32).alias("residual_pii"),
        ).alias("validation")
    )
