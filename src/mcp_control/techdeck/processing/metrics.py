"""The `metrics` struct of a conversation: what is measured per turn, and how turns become one value.

Texts of system messages count for tokens only: a prompt says nothing about how the two people talk.

Readability: Flesch reading ease 206.835 - 1.015 W/S - 84.6 Syl/W and Flesch-Kincaid grade .39 W/S + 11.8 Syl/W - 15.59
(Flesch 1948; Kincaid et al. 1975), null unless the conversation is English.
"""

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray

from mcp_control.techdeck.processing import emotion, language
from mcp_control.techdeck.processing.repetition import SIZES, repetition
from mcp_control.techdeck.processing.words import I64, Words

if TYPE_CHECKING:
    from bpe_openai import Encoding

ENCODING = "o200k_base"
METRICS: dict[str, pl.DataType] = {
    "turns": pl.Int32(),
    "turns_user": pl.Int32(),
    "turns_assistant": pl.Int32(),
    "chars": pl.Int32(),
    "tokens": pl.Int32(),
    "tokens_user": pl.Int32(),
    "tokens_assistant": pl.Int32(),
    "words": pl.Int32(),
    "sentences": pl.Int32(),
    "syllables": pl.Int32(),
    "language": pl.String(),
    "sentiment_user": pl.Float32(),
    "sentiment_assistant": pl.Float32(),
    "vader_user": pl.Float32(),
    "vader_assistant": pl.Float32(),
    **{name: pl.Float32() for name in emotion.EMOTIONS},
    "emotion_coverage": pl.Float32(),
    "flesch": pl.Float32(),
    "grade": pl.Float32(),
    **{f"repetition_{size}": pl.Float32() for size in SIZES},
}
"""Fields of the `metrics` struct in order. Emotions are hits per 100 words, sentiments means over a role's turns in
[-1, 1], `vader_*` hold the role's first message in sampled conversations, repetitions the greatest over turns of 50
words or more; null: not assessed."""


@cache
def encoding() -> "Encoding":
    """The BPE in use; its vocabulary comes with the package."""
    from bpe_openai import get_encoding  # takes half a second, which only this stage pays

    return get_encoding(ENCODING)


def count_tokens(bpe: "Encoding", texts: list[str]) -> list[int]:
    """Tokens of each text; markers such as <|endoftext|> count as the plain text they are."""
    return [len(bpe.encode_ordinary(text)) for text in texts]


def measure(words: Words, lengths: I64) -> dict[str, NDArray[np.generic]]:
    """Per text: words, sentences, syllables, English function words, emotion hits and repetition shares.

    `lengths` are the bytes of the texts.
    """
    texts = len(words.sentences)
    codes = emotion.lexicon().lookup(words.hash)
    felt = codes >= 0
    hits = np.bincount(words.text[felt] * len(emotion.EMOTIONS) + codes[felt], minlength=texts * len(emotion.EMOTIONS))
    english = language.function_words().lookup(words.hash) >= 0
    columns: dict[str, NDArray[np.generic]] = {
        "words": np.diff(words.first),
        "sentences": words.sentences,
        "syllables": np.bincount(words.text, weights=words.syllables, minlength=texts).astype(np.int64),
        "function_words": np.bincount(words.text[english], minlength=texts),
    }
    by_emotion = hits.reshape(texts, len(emotion.EMOTIONS))
    columns |= {name: by_emotion[:, code] for code, name in enumerate(emotion.EMOTIONS)}
    columns |= {f"repetition_{size}": share for size, share in repetition(words, lengths).items()}
    return columns


def summarise(turns: pl.DataFrame) -> pl.DataFrame:
    """One row per `conversation`, in order, with the sums and means that `finish` turns into metrics.

    `turns` has columns conversation, role, chars, tokens, valence, vader and those of `measure`.
    """
    talk = pl.col("role") != "system"
    user, assistant = pl.col("role") == "user", pl.col("role") == "assistant"
    sums = ["words", "sentences", "syllables", "chars", *emotion.EMOTIONS]
    return turns.group_by("conversation", maintain_order=True).agg(
        pl.len().alias("turns"),
        user.sum().alias("turns_user"),
        assistant.sum().alias("turns_assistant"),
        pl.col("tokens").sum(),
        pl.col("tokens").filter(user).sum().alias("tokens_user"),
        pl.col("tokens").filter(assistant).sum().alias("tokens_assistant"),
        *[pl.col(name).filter(talk).sum() for name in sums],
        pl.col("words").filter(user).sum().alias("words_user"),
        pl.col("function_words").filter(user).sum().alias("function_words_user"),
        *[
            pl.col(source).filter(who).mean().alias(f"{name}_{role}")
            for source, name in (("valence", "sentiment"), ("vader", "vader"))
            for role, who in (("user", user), ("assistant", assistant))
        ],
        *[pl.col(f"repetition_{size}").filter(talk).max() for size in SIZES],
    )


def plainly_english() -> pl.Expr:
    """Whether the user's text of a summary row is English beyond doubt, so that no model is asked."""
    share = pl.col("function_words_user") / pl.col("words_user")
    return (pl.col("words_user") >= language.MIN_WORDS) & (share >= language.MIN_SHARE)


def finish(summary: pl.DataFrame) -> pl.Series:
    """The `metrics` structs of `summary` (with `language` filled in)."""
    words, sentences, syllables = (pl.col(name).cast(pl.Float64) for name in ("words", "sentences", "syllables"))
    readable = (pl.col("words") > 0) & (pl.col("language") == "en")
    per_sentence, per_word = words / sentences, syllables / words
    some = pl.when(pl.col("words") > 0)
    derived = {
        "flesch": pl.when(readable).then(206.835 - 1.015 * per_sentence - 84.6 * per_word),
        "grade": pl.when(readable).then(0.39 * per_sentence + 11.8 * per_word - 15.59),
        "emotion_coverage": some.then(pl.sum_horizontal(*emotion.EMOTIONS) / words),
        **{name: some.then(pl.col(name) * 100.0 / words) for name in emotion.EMOTIONS},
    }
    fields = [derived.get(name, pl.col(name)).cast(kind).alias(name) for name, kind in METRICS.items()]
    return summary.select(pl.struct(fields).alias("metrics")).to_series()
