"""Sentiment of short texts: a lexicon sum in polars for every row, the full VADER rules for a sample.

Interface::

    turn_valence(frame, text="content") -> frame + `valence` (Float64) + `valence_hits` (Int32), same rows, same order
    vader_compound(texts) -> list of compounds, one per text, by the complete VADER rules (about 0.2 ms per turn)
    in_sample(frame, keys, share) -> Boolean series: a fixed hash sample, the same for any partitioning

`valence` lies in [-1, 1]: the sum s of the VADER lexicon's values, a word within three words after a negation counted
as -0.74 of its value, normalised as s / sqrt(s*s + 15) and rounded to 4 places. It is null for null text and 0 where no
lexicon word occurs; `valence_hits` counts lexicon words. Not in it: boosters, capitals, "but", punctuation, idioms.
Sums are integers inside, so the order of rows never changes a result.
Source: C. Hutto and E. Gilbert, VADER, ICWSM 2014 (lexicon, negation scalar, normalisation).
"""

from functools import cache
from hashlib import blake2b
from importlib.resources import files

import polars as pl
from vaderSentiment.vaderSentiment import (
    NEGATE,
    SentimentIntensityAnalyzer,
)

NEGATION_WINDOW = 3
NEGATED_PERCENT = -74  # VADER's N_SCALAR
NORMALISER = 15.0  # VADER's alpha
SCALE = 1000  # lexicon values have one decimal, negated ones three: exact as integers
_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~‘’“”…"


@cache
def _lexicon() -> pl.DataFrame:
    """Word, its value in thousandths (null for a pure negation), and whether it negates."""
    text = files("vaderSentiment").joinpath("vader_lexicon.txt").read_text(encoding="utf-8")
    values: dict[str, int | None] = {}
    for line in text.splitlines():
        word, value, *_ = line.split("\t")
        values[word] = round(float(value) * SCALE)
    negations = set(NEGATE)
    for word in negations:
        values.setdefault(word, None)
    return pl.DataFrame(
        {"_word": list(values), "_value": list(values.values()), "_negates": [word in negations for word in values]},
        schema={"_word": pl.String, "_value": pl.Int64, "_negates": pl.Boolean},
    )


def turn_valence(frame: pl.DataFrame, text: str = "content") -> pl.DataFrame:
    """Add `valence` and `valence_hits` (see the module) for the String column `text`; other columns stay as they are."""
    words = (
        frame.select(
            pl.col(text)
            .str.to_lowercase()
            .str.replace_many(["\n", "\t", "\r", "\u00a0", "’"], [" ", " ", " ", " ", "'"])
            .str.split(" ")
            .alias("_word")
        )
        .with_row_index("_text")
        .explode("_word")
        .with_row_index("_at")
        # As VADER does: outer punctuation goes, unless what is left is so short that it may be an emoticon.
        .with_columns(pl.col("_word").str.strip_chars(_PUNCTUATION).alias("_bare"))
        .select(
            pl.col("_text", "_at"),
            pl.when(pl.col("_bare").str.len_bytes() > 2).then("_bare").otherwise("_word").alias("_word"),
        )
    )
    hits = words.join(_lexicon(), on="_word", how="inner").sort("_at")
    last = pl.when(pl.col("_negates")).then(pl.col("_at")).forward_fill().shift(1)
    last_text = pl.when(pl.col("_negates")).then(pl.col("_text")).forward_fill().shift(1)
    negated = (last_text == pl.col("_text")) & (pl.col("_at") - last <= NEGATION_WINDOW)
    sums = (
        hits.with_columns(negated.fill_null(value=False).alias("_negated"))
        .filter(pl.col("_value").is_not_null())
        .group_by("_text")
        .agg(
            # x * -74 // 100 is exact: values are multiples of 100 thousandths.
            pl.when("_negated").then(pl.col("_value") * NEGATED_PERCENT // 100).otherwise("_value").sum().alias("_sum"),
            pl.len().cast(pl.Int32).alias("_hits"),
        )
    )
    score = pl.col("_sum").fill_null(0) / SCALE
    return (
        frame.with_row_index("_text")
        .join(sums, on="_text", how="left", maintain_order="left")
        .with_columns(
            pl.when(pl.col(text).is_not_null())
            .then((score / (score * score + NORMALISER).sqrt()).round(4))
            .alias("valence"),
            pl.col("_hits").fill_null(0).alias("valence_hits"),
        )
        .drop("_text", "_sum", "_hits")
    )


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def vader_compound(texts: list[str]) -> list[float]:
    """The compound score in [-1, 1] of each text by VADER's complete rules."""
    analyzer = _analyzer()
    return [float(analyzer.polarity_scores(text)["compound"]) for text in texts]


def in_sample(frame: pl.DataFrame, keys: list[str], share: float) -> pl.Series:
    """Say of each row whether it is in the hash sample of about `share` (0..1) of all rows.

    Depends on the values of `keys` alone (BLAKE2b of their text), so it is the same for every partitioning.
    """
    limit = round(min(max(share, 0.0), 1.0) * 2**32)
    text = frame.select(pl.concat_str(pl.col(keys).cast(pl.String), separator="\x1f", ignore_nulls=True)).to_series()
    picked = [int.from_bytes(blake2b(value.encode(), digest_size=4).digest()) < limit for value in text]
    return pl.Series("in_sample", picked, dtype=pl.Boolean)
