"""Valence of a turn by lexicon: exact values, negation, and independence of the rows around it."""

import math

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcp_control.techdeck.valence import in_sample, turn_valence, vader_compound

WORDS = st.sampled_from(
    ["love", "hate", "not", "good,", "bad.", "never", "happy!", "I", "the", ":)", "sad", "without", "isn't"]
)
TEXTS = st.lists(WORDS, max_size=12).map(" ".join)


def valence(text: str | None) -> tuple[float | None, int]:
    """Valence and lexicon words of one text."""
    row = turn_valence(pl.DataFrame({"content": [text]}, schema={"content": pl.String})).row(0, named=True)
    return row["valence"], row["valence_hits"]


def normal(total: float) -> float:
    """VADER's normalisation of a sum."""
    return round(total / math.sqrt(total * total + 15), 4)


@pytest.mark.parametrize(
    ("text", "total", "hits"),
    [
        ("I love it.", 3.2, 1),
        ("LOVE!", 3.2, 1),
        ("I do not love it", -0.74 * 3.2, 1),
        ("I don’t really love it", -0.74 * 3.2, 1),
        ("not one two three love", 3.2, 1),
        ("good :)", 1.9 + 2.0, 2),
        ("I am a gay man", 0.0, 0),
        ("", 0.0, 0),
    ],
)
def test_valence_is_the_normalised_sum_of_the_lexicon(text: str, total: float, hits: int) -> None:
    """Words count by the lexicon, negated within three words at -0.74, outer punctuation and case aside."""
    assert valence(text) == (normal(total), hits)


def test_null_text_has_no_valence() -> None:
    """No text is not assessed; a text without lexicon words is 0."""
    assert valence(None) == (None, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, max_size=6))
def test_a_text_is_valued_by_itself(texts: list[str]) -> None:
    """A negation never reaches into the next row: a frame gives what its rows give alone, in order, others kept."""
    data = pl.DataFrame(
        {"key": list(range(len(texts))), "content": texts}, schema={"key": pl.Int64, "content": pl.String}
    )
    done = turn_valence(data)
    assert done.columns == ["key", "content", "valence", "valence_hits"]
    assert done["key"].to_list() == list(range(len(texts)))
    assert list(zip(done["valence"], done["valence_hits"], strict=True)) == [valence(text) for text in texts]


def test_the_full_rules_are_those_of_vader() -> None:
    """Identity words are neutral, boosters and emphasis count."""
    plain, loud, identity = vader_compound(["It is good", "It is VERY good!!!", "I am a gay man"])
    assert plain == pytest.approx(0.4404)
    assert loud > plain
    assert identity == 0.0


def test_the_sample_depends_on_the_keys_alone() -> None:
    """Any slice of the rows gets the same choice, shares are about right and nested."""
    data = pl.DataFrame({"id": [f"c{number}" for number in range(5_000)], "turn": [0] * 5_000})
    tenth = in_sample(data, ["id", "turn"], 0.1)
    assert tenth.slice(1_000, 500).to_list() == in_sample(data.slice(1_000, 500), ["id", "turn"], 0.1).to_list()
    assert 400 < int(tenth.sum()) < 600
    assert not (tenth & ~in_sample(data, ["id", "turn"], 0.2)).any()
    assert in_sample(data, ["id"], 1.0).all()
    assert not in_sample(data, ["id"], 0.0).any()
