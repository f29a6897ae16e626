"""The word index that all counting rests on."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_control.techdeck.processing.repetition import repetition
from mcp_control.techdeck.processing.words import Words, WordTable, index_words


def _index(*texts: str) -> Words:
    return index_words(pl.Series(texts, dtype=pl.String))


def _lengths(*texts: str) -> "np.typing.NDArray[np.int64]":
    return np.array([len(text.encode()) for text in texts], dtype=np.int64)


def test_words_sentences_and_syllables_of_a_plain_text() -> None:
    """Six words, two sentences, seven syllables."""
    words = _index("The cat sat. It was happy!")
    assert len(words) == 6
    assert words.sentences.tolist() == [2]
    assert words.syllables.tolist() == [1, 1, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("word", "syllables"),
    [("cat", 1), ("table", 1), ("make", 1), ("tree", 1), ("the", 1), ("beautiful", 3), ("rhythm", 1), ("hmm", 1)],
)
def test_syllables_are_vowel_groups_without_a_silent_final_e(word: str, syllables: int) -> None:
    """Vowel groups, at least one, minus one final e that stands alone."""
    assert _index(word).syllables.tolist() == [syllables]


def test_typographic_punctuation_does_not_change_words() -> None:
    """Curly quotes and dashes read as their ASCII forms."""
    assert _index("don\u2019t \u201cstop\u201d\u2014now").hash.tolist() == _index('Don\'t "stop" now').hash.tolist()


def test_a_decimal_point_ends_no_sentence_and_an_empty_text_has_none() -> None:
    """3.5 is one number's worth of text; without words there is no sentence."""
    words = _index("It is 3.5 now", "", "...", "no end")
    assert words.sentences.tolist() == [1, 0, 0, 1]
    assert words.first.tolist() == [0, 5, 5, 5, 7]


@given(st.lists(st.text(max_size=60), max_size=6), st.text(max_size=60))
def test_a_text_has_the_same_words_wherever_it_stands(before: list[str], text: str) -> None:
    """Hashes, syllables and sentences do not depend on the texts around."""
    alone, among = _index(text), _index(*before, text)
    first = int(among.first[len(before)])
    assert among.hash[first:].tolist() == alone.hash.tolist()
    assert among.syllables[first:].tolist() == alone.syllables.tolist()
    assert among.sentences[len(before) :].tolist() == alone.sentences.tolist()


def test_a_word_table_knows_its_words_and_no_others() -> None:
    """Codes of known words, -1 for the rest, also on an empty text."""
    table = WordTable({"sad": 1, "don't": 2})
    assert table.lookup(_index("Sad? don\u2019t know").hash).tolist() == [1, 2, -1]
    assert table.lookup(_index("").hash).tolist() == []


def test_repetition_is_the_share_of_the_most_frequent_ngram() -> None:
    """50 words: "a b" ten times between distinct words covers 30 of the bytes; nothing longer repeats."""
    text = " ".join(f"a b x{number:02d}" for number in range(16)) + " y z"
    shares = repetition(_index(text), _lengths(text))
    assert shares[2].tolist() == [pytest.approx(16 * 3 / len(text))]
    assert shares[3].tolist() == [0.0]
    assert shares[4].tolist() == [0.0]


def test_repetition_needs_fifty_words_and_is_at_most_one() -> None:
    """Below 50 words it is not assessed; overlapping repeats are capped."""
    short, same = "go on " * 10, "ha " * 60
    shares = repetition(_index(short, same), _lengths(short, same))
    assert np.isnan(shares[2][0])
    assert shares[2][1] == 1.0
    assert shares[4][1] == 1.0


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=50, max_size=70), st.integers(0, 2))
def test_repetition_agrees_with_counting_one_by_one(picked: list[str], before: int) -> None:
    """The share equals a plain count of n-grams, with other texts before."""
    text = " ".join(picked)
    texts = ["some other words here"] * before + [text]
    shares = repetition(_index(*texts), _lengths(*texts))
    for size in (2, 3, 4):
        grams = [tuple(picked[at : at + size]) for at in range(len(picked) - size + 1)]
        most = max(grams.count(gram) for gram in set(grams))
        expected = 0.0 if most < 2 else min(most * (2 * size - 1) / len(text), 1.0)
        assert shares[size][before] == pytest.approx(expected)
