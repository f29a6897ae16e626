"""Counts over all partitions: one partition in memory at a time, only the columns that are counted.

Means are sums of integers (millionths), so that neither the order nor the number of partitions changes a digit.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import polars as pl
from msgspec import Struct, field
from numpy.typing import NDArray

from mcp_control.techdeck.model import MESSAGE
from mcp_control.techdeck.processing.emotion import EMOTIONS
from mcp_control.techdeck.processing.neardup import read_all
from mcp_control.techdeck.processing.repetition import LIMITS
from mcp_control.techdeck.processing.turns import turns_of
from mcp_control.techdeck.processing.words import index_words, ngrams
from mcp_control.techdeck.quality.scoring import READABILITY_LIMIT, Count

CONFIDENT = 0.9
WORST = 20
BIGRAMS = 50_000
"""Size of the sample for distinct-2, fixed because the figure falls as a text grows."""
_MILLION = 1_000_000

HISTOGRAMS = {
    "turns": [1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100],
    "tokens": [0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192],
    "chars": [0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768],
}
"""Lower bounds of the bins; the last one is open."""
SENTIMENT_BINS = [-1.0, -0.8, -0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6, 0.8]
MEANS = (
    "sentiment_user", "sentiment_assistant", "vader_user", "vader_assistant", *EMOTIONS, "emotion_coverage", "flesch",
    "grade",
)  # fmt: skip


class Worst(Struct, frozen=True, kw_only=True):
    """A conversation with the share of row checks it passes and the names of those it does not."""

    id: str
    row: int
    score: float
    reasons: list[str]


class Totals(Struct, kw_only=True):
    """Everything counted. `sums` holds plain counts, `means` pairs (sum in millionths, number) and `bins` histograms."""

    sums: Counter[str] = field(default_factory=Counter)
    means: dict[str, tuple[int, int]] = {}
    bins: dict[str, list[int]] = {}
    languages: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    openings: list[int] = []
    distinct_2: Count = Count()
    worst: list[Worst] = []

    def mean(self, name: str) -> float | None:
        total, number = self.means.get(name, (0, 0))
        return total / number / _MILLION if number else None

    def number(self, name: str) -> int:
        return self.means.get(name, (0, 0))[1]


def aggregate(parts: list[Path], signatures: list[Path], assignments: Path) -> Totals:
    """Count everything the report shows. The order of `parts` and `signatures` does not matter."""
    totals = Totals()
    table = pl.read_parquet(assignments, columns=["row", "duplicate_of", "duplicate_kind"])
    for part in parts:
        frame = _load(part).join(table, on="row", how="left", maintain_order="left")
        _count(frame, totals)
        totals.worst = _worst([*totals.worst, *_worst_rows(frame)])
    totals.openings = _openings(signatures)
    totals.distinct_2 = _distinct_bigrams(parts, signatures, table)
    return totals


def _load(part: Path) -> pl.DataFrame:
    """A partition's countable columns, flat: no message text."""
    source, check = pl.col("source").struct, pl.col("validation").struct
    return (
        pl.scan_parquet(part)
        .select(
            "id",
            source.field("row", "file", "format", "role_confidence"),
            "flags",
            check.field(
                "verdict",
                "warnings",
                "same_role_pairs",
                "adjacent_pairs",
                "content_ok",
                "language_turns",
                "same_language_turns",
                "pii_spans",
                "residual_pii",
            ),
            pl.col("metrics").struct.unnest(),
        )
        .with_columns(
            (pl.col("role_confidence") >= CONFIDENT).fill_null(value=False).alias("confident"),
            pl.any_horizontal(
                (pl.col(f"repetition_{size}") > limit).fill_null(value=False) for size, limit in LIMITS.items()
            ).alias("repetitive"),
        )
        .collect()
    )


def _count(frame: pl.DataFrame, totals: Totals) -> None:
    counted = {
        "rows": pl.len(),
        "id": (pl.col("id").str.strip_chars() != "").sum(),
        "user": (pl.col("turns_user") > 0).sum(),
        "assistant": (pl.col("turns_assistant") > 0).sum(),
        "source": (pl.col("file").is_not_null() & pl.col("row").is_not_null()).sum(),
        "adjacent": pl.col("adjacent_pairs").sum(),
        "same_role": pl.col("same_role_pairs").sum(),
        "language_turns": pl.col("language_turns").sum(),
        "same_language_turns": pl.col("same_language_turns").sum(),
        "confident": pl.col("confident").sum(),
        "content_ok": pl.col("content_ok").sum(),
        "warned": (pl.col("verdict") == "warn").sum(),
        "pii_rows": (pl.col("pii_spans") > 0).sum(),
        "pii_spans": pl.col("pii_spans").sum(),
        "residual_rows": (pl.col("residual_pii") > 0).sum(),
        "repetitive": pl.col("repetitive").sum(),
        "hard_to_read": (pl.col("flesch") < READABILITY_LIMIT).sum(),
        **{name: pl.col(name).cast(pl.Int64).sum() for name in ("turns", "tokens", "words")},
    }
    row = frame.select(expression.cast(pl.Int64).alias(name) for name, expression in counted.items()).row(0, named=True)
    totals.sums.update({name: value or 0 for name, value in row.items()})
    for name in MEANS:
        known = frame[name].drop_nulls()
        whole = (known.cast(pl.Float64) * _MILLION).round().cast(pl.Int64)
        total, number = totals.means.get(name, (0, 0))
        totals.means[name] = (total + int(whole.sum()), number + len(known))
    for name, bounds in HISTOGRAMS.items():
        _bin(totals, name, frame[name].to_numpy(), bounds)
    for role in ("user", "assistant"):
        name = f"sentiment_{role}"
        _bin(totals, name, frame[name].drop_nulls().to_numpy(), SENTIMENT_BINS)
    totals.languages.update(frame["language"].to_list())
    totals.formats.update(frame["format"].to_list())
    totals.sources.update(frame["file"].to_list())
    totals.flags.update(frame["flags"].explode(empty_as_null=False).drop_nulls().to_list())


def _bin(totals: Totals, name: str, values: NDArray[np.generic], bounds: list[float] | list[int]) -> None:
    place = np.clip(np.searchsorted(np.asarray(bounds), values, side="right") - 1, 0, None)
    counted = np.bincount(place, minlength=len(bounds)).tolist()
    before = totals.bins.get(name, [0] * len(bounds))
    totals.bins[name] = [old + new for old, new in zip(before, counted, strict=True)]


def _worst_rows(frame: pl.DataFrame) -> list[Worst]:
    checks = {
        "duplicate": pl.col("duplicate_of").is_null(),
        "roles repeat": pl.col("same_role_pairs") == 0,
        "broken text": pl.col("content_ok"),
        "roles guessed": pl.col("confident"),
        "languages differ": pl.col("same_language_turns") == pl.col("language_turns"),
        "derogation": ~pl.col("warnings").list.contains("W_DEROGATION"),
        "too long": ~pl.col("warnings").list.contains("W_TOO_LONG"),
        "personal data left": pl.col("residual_pii") == 0,
        "personal data": pl.col("pii_spans") == 0,
        "repetitive": ~pl.col("repetitive"),
    }
    names = list(checks)
    failed = (
        frame.select(
            "id", "row", *[expression.fill_null(value=True).alias(name) for name, expression in checks.items()]
        )
        .with_columns(pl.sum_horizontal(pl.col(name).cast(pl.Int32) for name in names).alias("_passed"))
        .filter(pl.col("_passed") < len(names))
        .sort("_passed", "row")
        .head(WORST)
    )
    return [
        Worst(
            id=row["id"],
            row=row["row"],
            score=row["_passed"] / len(names),
            reasons=[name for name in names if not row[name]],
        )
        for row in failed.iter_rows(named=True)
    ]


def _worst(candidates: Iterable[Worst]) -> list[Worst]:
    return sorted(candidates, key=lambda item: (item.score, item.row))[:WORST]


def _openings(signatures: list[Path]) -> list[int]:
    """How many conversations open with each three words, most frequent first."""
    column = read_all(signatures, ["opening"])["opening"].drop_nulls()
    return sorted(column.value_counts()["count"].to_list(), reverse=True)


def _distinct_bigrams(parts: list[Path], signatures: list[Path], table: pl.DataFrame) -> Count:
    """Distinct of the first `BIGRAMS` word bigrams of kept conversations, in the order of their content's hash."""
    kept = table.filter(pl.col("duplicate_of").is_null()).select("row")
    order = read_all(signatures, ["row", "exact", "words"]).join(kept, on="row", how="semi").sort("exact", "row")
    # Enough conversations even if every message wasted a word; the exact cut is made below.
    reached = order.filter(pl.col("words").cum_sum().shift(1, fill_value=0) < BIGRAMS * 2)
    wanted = reached["row"]
    row = pl.col("source").struct.field("row")
    texts = pl.DataFrame(schema={"row": pl.Int64(), "messages": pl.List(MESSAGE)})
    for part in parts:
        texts.extend(
            pl.scan_parquet(part).select(row, "messages").filter(pl.col("row").is_in(wanted.implode())).collect()
        )
    sample = reached.select("row").join(texts, on="row", how="left", maintain_order="left")
    turns = turns_of(sample).filter(pl.col("role") != "system")
    words = index_words(turns["content"])
    grams = ngrams(words, 2)
    grams = grams[words.text[: len(grams)] == words.text[1 : len(grams) + 1]][:BIGRAMS]
    return Count(hits=len(np.unique(grams)), total=len(grams))
