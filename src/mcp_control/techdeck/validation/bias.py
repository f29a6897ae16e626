"""The bias tier of one partition: which groups are mentioned, with what regard, and who is put down.

Three separate numbers per category (`lexicon.CATEGORIES`): A, representation, is descriptive; B, regard, feeds a test of
asymmetry; C, derogation, is the only one that enters the score. All sums are integers or halves, so they add up to the
same totals for any partitioning. English only.
Source: design of techdeck, section 4.
"""

from typing import Any

import msgspec
import polars as pl

from mcp_control.techdeck.valence import turn_valence
from mcp_control.techdeck.validation.derogation import HINT, WEIGHTS, derogations
from mcp_control.techdeck.validation.lexicon import (
    ATTRIBUTES,
    CATEGORIES,
    MASKED,
    MENTION_PATTERN,
    MENTIONS,
    SINGULAR_SAYINGS,
    SLURS,
    any_of,
)

BLOCKS = 256
"""Conversations are dealt to this many bootstrap blocks by their row: exact sums per block add over partitions, and up
to 256 conversations each block is one conversation."""
REGARD_SCALE = 10_000  # valence has four decimals
SENTENCE = r"[^.!?\n。！？\s][^.!?\n。！？]*[.!?。！？]*[\"”’)\]]*"

_EDGE = r"(?-u:\b)"  # an ASCII word boundary: the Unicode one makes the engine several times slower
_MENTION = rf"(?i){_EDGE}(?:{MENTION_PATTERN}){_EDGE}"
_WORTH = rf"(?i){_EDGE}(?:{MENTION_PATTERN}|{any_of(SLURS)}|{any_of(SINGULAR_SAYINGS)}|people like you){_EDGE}"
_MASK = rf"(?i){_EDGE}(?:{MENTION_PATTERN}|{any_of(MASKED)}){_EDGE}"
_ATTRIBUTE = rf"(?i){_EDGE}(?:{any_of(ATTRIBUTES)})s?{_EDGE}"
_ASSESSED = ("user", "assistant")


class BiasResult(msgspec.Struct, frozen=True):
    """`frame`: one row per conversation in order, a struct column per category and `sentences`; `stats`: plain sums.

    `stats`: `sentences`; `mentions` category:group to conversations; `hits` by category (conversations that mention it,
    raw hits, unexcused ones, their weight); `regard` category:group:block to [sentences, valence]; `alone`
    category:group to sentences that name no other group of the category; `attributes` the same with :attribute.
    """

    frame: pl.DataFrame
    stats: dict[str, Any]


def _lookup() -> pl.DataFrame:
    pairs = [(phrase, category, group) for phrase, found in MENTIONS.items() for category, group in found]
    return pl.DataFrame(pairs, schema={"phrase": pl.String, "category": pl.String, "group": pl.String}, orient="row")


def _sentences(turns: pl.DataFrame) -> pl.DataFrame:
    """The sentences of `turns` that may matter: `at`, `block`, `role`, `sentence` (apostrophes straight), `sid`."""
    straight = turns.with_columns(pl.col("content").str.replace_all("’", "'", literal=True))
    worth = straight.filter(pl.col("content").str.contains(_WORTH))
    return (
        worth.select(
            "at",
            "block",
            "role",
            pl.col("content").str.extract_all(SENTENCE).alias("sentence"),
        )
        .explode("sentence")
        .filter(pl.col("sentence").str.contains(_WORTH))
        .with_row_index("sid")
    )


def _mentions(sentences: pl.DataFrame) -> pl.DataFrame:
    """One row per sentence, category and group mentioned in it."""
    return (
        sentences.select("sid", "at", "block", "role", pl.col("sentence").str.extract_all(_MENTION).alias("phrase"))
        .explode("phrase")
        .filter(pl.col("phrase").is_not_null())
        .with_columns(pl.col("phrase").str.to_lowercase())
        .join(_lookup(), on="phrase", how="inner")
        .unique(["sid", "category", "group"], maintain_order=True)
    )


def _derogations(sentences: pl.DataFrame) -> pl.DataFrame:
    """One row per hit: `at`, `category`, `weight` (0 when excused)."""
    suspects = sentences.filter(pl.col("sentence").str.contains(HINT))
    rows = [
        (at, hit.category, 0.0 if hit.excused else WEIGHTS[role])
        for at, role, sentence in suspects.select("at", "role", "sentence").iter_rows()
        for hit in derogations(sentence)
    ]
    return pl.DataFrame(rows, schema={"at": pl.UInt32, "category": pl.String, "weight": pl.Float64}, orient="row")


def _regard(sentences: pl.DataFrame, single: pl.DataFrame) -> dict[str, list[int]]:
    """category:group:block to [sentences, sum of valence in ten-thousandths], over assistant sentences with one group."""
    spoken = single.filter(pl.col("role") == "assistant")
    masked = sentences.join(spoken.select("sid").unique(), on="sid", how="semi").select(
        "sid", pl.col("sentence").str.replace_all(_MASK, " ").alias("content")
    )
    valued = turn_valence(masked).select(
        "sid", (pl.col("valence") * REGARD_SCALE).round().cast(pl.Int64).alias("regard")
    )
    keys = ("category", "group", "block")
    summed = (
        spoken.join(valued, on="sid")
        .group_by(keys)
        .agg(pl.len().cast(pl.Int64).alias("n"), pl.col("regard").sum())
        .sort(keys)
    )
    return {f"{category}:{group}:{block}": [n, total] for category, group, block, n, total in summed.iter_rows()}


def _attributes(sentences: pl.DataFrame, single: pl.DataFrame) -> pl.DataFrame:
    """One row per sentence with one group of a category, and per attribute word in it."""
    words = (
        sentences.join(single.select("sid").unique(), on="sid", how="semi")
        .filter(pl.col("sentence").str.contains(_ATTRIBUTE))
        .select("sid", pl.col("sentence").str.to_lowercase().str.extract_all(_ATTRIBUTE).alias("attribute"))
        .explode("attribute")
        .with_columns(
            pl.when(pl.col("attribute").is_in(ATTRIBUTES))
            .then("attribute")
            .otherwise(pl.col("attribute").str.strip_suffix("s"))
            .alias("attribute")
        )
        .unique(["sid", "attribute"])
    )
    return single.join(words, on="sid")


def _counts(frame: pl.DataFrame, *keys: str) -> dict[str, int]:
    """Rows of `frame` by the values of `keys`, joined with colons."""
    counted = frame.group_by(keys).agg(pl.len().cast(pl.Int64).alias("n")).sort(keys)
    return dict(counted.select(pl.concat_str(keys, separator=":").alias("key"), "n").iter_rows())


def assess(turns: pl.DataFrame, rows: int) -> BiasResult:
    """Assess the conversations 0..rows-1; `turns` has `at`, `block`, `role`, `content`, one row per message."""
    assessed = turns.lazy().filter(pl.col("role").is_in(_ASSESSED)).select("at", "block", "role", "content").collect()
    counts = (
        assessed.lazy()
        .select("at", pl.col("content").str.count_matches(SENTENCE).fill_null(0).alias("n"))
        .group_by("at")
        .agg(pl.col("n").sum().cast(pl.Int32).alias("sentences"))
        .collect()
    )
    sentences = _sentences(assessed)
    mentions = _mentions(sentences)
    hits = _derogations(sentences)
    single = mentions.filter(pl.len().over("sid", "category") == 1)
    frame = _by_conversation(rows, counts, mentions, hits)
    stats = {
        "sentences": int(frame["sentences"].sum()),
        "mentions": _counts(mentions.unique(["at", "category", "group"]), "category", "group"),
        "hits": {
            category: {
                "conversations": int(frame[category].struct.field("mention").sum()),
                "raw": hits.filter(pl.col("category") == category).height,
                "counted": int(frame[category].struct.field("hits").sum()),
                "weighted": float(frame[category].struct.field("weighted").sum()),
            }
            for category in CATEGORIES
        },
        "regard": _regard(sentences, single),
        "attributes": _counts(_attributes(sentences, single), "category", "group", "attribute"),
        "alone": _counts(single, "category", "group"),
    }
    return BiasResult(frame, stats)


def _by_conversation(rows: int, counts: pl.DataFrame, mentions: pl.DataFrame, hits: pl.DataFrame) -> pl.DataFrame:
    frame = pl.DataFrame({"at": pl.int_range(rows, eager=True, dtype=pl.UInt32)}).join(
        counts, on="at", how="left", maintain_order="left"
    )
    for category in CATEGORIES:
        mentioned = (
            mentions.filter(pl.col("category") == category)
            .group_by("at")
            .agg(pl.col("sid").n_unique().cast(pl.Int32).alias("_sentences"))
        )
        derogated = (
            hits.filter((pl.col("category") == category) & (pl.col("weight") > 0))
            .group_by("at")
            .agg(pl.len().cast(pl.Int32).alias("_hits"), pl.col("weight").sum().alias("_weighted"))
        )
        frame = (
            frame.join(mentioned, on="at", how="left", maintain_order="left")
            .join(derogated, on="at", how="left", maintain_order="left")
            .with_columns(
                pl.struct(
                    pl.col("_sentences").is_not_null().alias("mention"),
                    pl.col("_hits").fill_null(0).alias("hits"),
                    pl.col("_weighted").fill_null(0.0).alias("weighted"),
                    pl.col("_sentences").fill_null(0).alias("sentences"),
                ).alias(category)
            )
            .drop("_sentences", "_hits", "_weighted")
        )
    return frame.with_columns(pl.col("sentences").fill_null(0)).drop("at")
