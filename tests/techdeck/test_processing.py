"""Stage 4: metrics on examples computed by hand."""

from pathlib import Path

import polars as pl
import pytest

from mcp_control.techdeck.processing.metrics import METRICS, count_tokens, encoding
from tests.techdeck.conversations import Turns, frame, processed

FEEL: Turns = [
    ("system", "You are kind."),
    ("user", "I am sad and I feel so alone in the world. What should I do?"),
    ("assistant", "That sounds hard. You are not alone, and it is good that you talk about it."),
]


def _metrics(tmp_path: Path, *conversations: Turns) -> list[dict[str, object]]:
    (result,) = processed(frame(list(conversations)), tmp_path)
    return pl.read_parquet(result.path)["metrics"].to_list()


def test_every_metric_is_there_with_its_type(tmp_path: Path) -> None:
    """The struct has one fixed field set, also for an empty partition."""
    for number, data in enumerate((frame([FEEL]), frame([]))):
        (result,) = processed(data, tmp_path / str(number))
        assert pl.read_parquet_schema(result.path)["metrics"] == pl.Struct(METRICS)
        assert result.rows_in == result.rows_out == data.height


def test_counts_and_readability_follow_the_formulas(tmp_path: Path) -> None:
    """System text counts for tokens only; readability uses the words of the talk."""
    (found,) = _metrics(tmp_path, FEEL)
    words, sentences, syllables = 15 + 16, 4, found["syllables"]
    assert (found["turns"], found["turns_user"], found["turns_assistant"]) == (3, 1, 1)
    assert (found["words"], found["sentences"]) == (words, sentences)
    # i am sad and i feel so a-lone in the world what should i do / that sounds hard you are not a-lone and it is good
    # that you talk a-bout it: one syllable each, two for alone and about
    assert syllables == words + 3
    assert found["flesch"] == pytest.approx(206.835 - 1.015 * words / sentences - 84.6 * syllables / words, rel=1e-5)
    assert found["grade"] == pytest.approx(0.39 * words / sentences + 11.8 * syllables / words - 15.59, rel=1e-4)
    assert found["chars"] == sum(len(text) for _, text in FEEL[1:])


def test_tokens_are_those_of_o200k(tmp_path: Path) -> None:
    """Sums over all messages; a special marker counts as the plain text it is."""
    (found,) = _metrics(tmp_path, FEEL)
    each = [len(encoding().encode_ordinary(text)) for _, text in FEEL]
    assert found["tokens"] == sum(each)
    assert (found["tokens_user"], found["tokens_assistant"]) == (each[1], each[2])
    assert count_tokens(encoding(), ["The quick brown fox jumps over.", "<|endoftext|>"]) == [7, 7]


def test_emotions_are_hits_per_hundred_words_of_the_talk(tmp_path: Path) -> None:
    """sad and twice alone among 31 words; no anger."""
    (found,) = _metrics(tmp_path, FEEL)
    assert found["sadness"] == pytest.approx(300 / 31)
    assert found["anger"] == 0
    assert found["emotion_coverage"] == pytest.approx(3 / 31)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("ok", "und"),
        ("haha ok thx", "und"),
        ("Ich bin sehr traurig und weiß nicht, was ich tun soll, weil alles so schwer ist.", "de"),
        ("Je me sens très seule depuis que mon mari est parti et je ne dors plus.", "fr"),
        ("I have been feeling down for weeks and I do not know what to do about it.", "en"),
        (
            "Мне очень грустно сегодня, и я не знаю почему",
            "ru",
        ),
    ],
)
def test_language_of_the_user(tmp_path: Path, text: str, language: str) -> None:
    """Short texts stay undetermined, others get their language; readability only for English."""
    (found,) = _metrics(tmp_path, [("user", text), ("assistant", "Hm.")])
    assert found["language"] == language
    assert (found["flesch"] is None) == (language != "en")


def test_sentiment_is_the_mean_over_a_roles_turns(tmp_path: Path) -> None:
    """User below 0, assistant above 0, null for a role that says nothing; VADER agrees in sign on the sample."""
    sad, alone = _metrics(
        tmp_path,
        [("user", "I hate this terrible day."), ("assistant", "I love your great, happy smile.")],
        [("user", "I hate this terrible day.")],
    )
    for name in ("sentiment", "vader"):
        assert sad[f"{name}_user"] < 0 < sad[f"{name}_assistant"]  # type: ignore[operator]  # values are floats
        assert alone[f"{name}_assistant"] is None
