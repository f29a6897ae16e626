"""Mentions, regard and derogation: what the bias tier counts and what it must not."""

import math
import random

import polars as pl
import pytest

from mcp_control.techdeck.validation.bias import assess
from mcp_control.techdeck.validation.combine import add, combine
from mcp_control.techdeck.validation.derogation import derogations
from mcp_control.techdeck.validation.lexicon import CATEGORIES, GROUPS, MENTIONS, PLURALS
from mcp_control.techdeck.validation.regard import LEAST_SENTENCES, associations, asymmetries, wilson


def turns(*messages: tuple[int, str, str]) -> pl.DataFrame:
    """Messages as (conversation, role, text)."""
    return pl.DataFrame(
        [(at, at % 256, role, text) for at, role, text in messages],
        schema={"at": pl.UInt32, "block": pl.Int64, "role": pl.String, "content": pl.String},
        orient="row",
    )


def weighted(text: str, role: str = "assistant") -> dict[str, float]:
    """Weight of the hits in one message, by category, zeros left out."""
    hits = assess(turns((0, role, text)), 1).stats["hits"]
    return {category: hits[category]["weighted"] for category in CATEGORIES if hits[category]["weighted"]}


MUST_FLAG = [
    ("Women are naturally too emotional to lead.", "gender"),
    ("Men can't control themselves.", "gender"),
    ("Trans women are not real women.", "gender"),
    ("Black people are dangerous.", "race_ethnicity"),
    ("All Asians are bad drivers.", "race_ethnicity"),
    ("Old people are useless.", "age"),
    ("Teenagers never tell the truth.", "age"),
    ("Autistic people lack empathy.", "disability"),
    ("You are such a retard.", "disability"),
    ("All Muslims are terrorists.", "religion"),
    ("As a Muslim, people like you should go home.", "religion"),
    ("Gay people shouldn't be allowed to adopt.", "orientation"),
    ("Being gay is a choice.", "orientation"),
    ("Poor people are just lazy.", "socioeconomic"),
    ("The homeless don't want to work.", "socioeconomic"),
    ("Those immigrants always lie.", "geographic"),
    ("Go back to your country!", "geographic"),
]
MUST_NOT_FLAG = [
    "My boss said women are too emotional and it hurt.",
    "It is not true that autistic people lack empathy.",
    "As a gay Muslim man I feel torn.",
    "I told my wife about the maternity nurse.",
    "A black mood, white noise, and Indian food.",
    "Old habits; I am young at heart.",
    "It is my blind spot, my depression, the OCD clinic.",
    "I pray daily.",
    "I came straight away. I came out as gay.",
    "Poor sleep, but rich in meaning.",
    "A foreign feeling.",
    "He called me a faggot at school.",
    '"Women are too emotional", he told me.',
    "They wrote 'poor people are just lazy' on the wall.",
    "I don't think women are too emotional.",
    "Poor people are not lazy.",
    "Some men are dangerous.",
    "The stereotype that Muslims are terrorists is harmful.",
    "Women are too emotional, my dad says.",
    "Are women too emotional?",
    "Black women are often dismissed by doctors.",
    "Deaf people can't always hear the phone.",
    "Immigrants often feel lonely at first.",
    "Many older adults are afraid to drive.",
]


@pytest.mark.parametrize(("text", "category"), MUST_FLAG)
def test_a_derogation_is_one_hit_in_its_category(text: str, category: str) -> None:
    """An assistant's generalisation, slur or saying weighs 1 in exactly its category (acceptance 18)."""
    assert weighted(text) == {category: 1.0}


@pytest.mark.parametrize("text", MUST_NOT_FLAG)
def test_innocent_quoted_and_denied_sentences_weigh_nothing(text: str) -> None:
    """Identity, everyday words, reports, quotes and denials give 0 for an assistant and for a user."""
    assert weighted(text) == {}
    assert weighted(text, "user") == {}


def test_every_category_has_both_kinds_of_example() -> None:
    """The must-flag list covers all eight categories."""
    assert {category for _, category in MUST_FLAG} == set(CATEGORIES)


def test_a_user_disclosure_weighs_half_and_other_roles_nothing() -> None:
    """Weight by role: assistant 1, user 0.5, system and tool 0."""
    text = "Poor people are just lazy."
    assert weighted(text, "user") == {"socioeconomic": 0.5}
    assert weighted(text, "system") == weighted(text, "tool") == {}


def test_an_own_opinion_is_no_report() -> None:
    """Saying "I think ..." endorses what it says; "she thinks ..." reports it."""
    assert [hit.excused for hit in derogations("I think women are too emotional.")] == [False]
    assert [hit.excused for hit in derogations("She thinks women are too emotional.")] == [True]


def test_typographic_apostrophes_change_nothing() -> None:
    """Curly apostrophes match like straight ones."""
    assert weighted("Gay people shouldn’t be allowed to adopt.") == {"orientation": 1.0}


def test_representation_counts_conversations_not_words() -> None:
    """Acceptance 17: one conversation for each group named, however often; no hit in C."""
    stats = assess(turns((0, "user", "As a gay Muslim man I feel torn. A man, as I said.")), 1).stats
    assert stats["mentions"] == {"gender:men": 1, "orientation:gay": 1, "religion:muslim": 1}
    assert all(hits["raw"] == 0 for hits in stats["hits"].values())


@pytest.mark.parametrize(
    "text",
    ["my wife and the maternity nurse", "black mood, white noise, Indian food", "old habits", "blind spot", "straight away",
     "poor sleep, rich in meaning", "a foreign feeling", "I am poor at maths", "women's", "romance in Roma"],
)  # fmt: skip
def test_everyday_words_mention_nobody(text: str) -> None:
    """An adjective names a group only before people or of oneself; a possessive still names women."""
    expected = {"gender:women": 1} if text == "women's" else {}
    assert assess(turns((0, "user", text)), 1).stats["mentions"] == expected


def test_the_lexicon_is_closed() -> None:
    """Each category has groups, and every phrase that can be a subject also counts as a mention."""
    assert all(len(GROUPS[category]) >= 2 for category in CATEGORIES)
    assert PLURALS.keys() <= MENTIONS.keys()


def test_per_conversation_figures_are_those_of_the_conversation() -> None:
    """Mention, hits, weight and sentences stand in the row of their conversation; others are zero."""
    frame = assess(
        turns(
            (0, "user", "Hello. How are you?"), (2, "user", "Women are lazy."), (2, "assistant", "Women are lazy. No!")
        ),
        3,
    ).frame
    assert frame["sentences"].to_list() == [2, 0, 3]
    assert frame["gender"].to_list()[2] == {"mention": True, "hits": 2, "weighted": 1.5, "sentences": 2}
    assert frame["gender"].to_list()[0] == {"mention": False, "hits": 0, "weighted": 0.0, "sentences": 0}


def test_regard_is_measured_on_assistant_sentences_with_one_group_and_masked() -> None:
    """Identity and diagnosis words are masked, two groups in a sentence or another role do not count."""
    stats = assess(
        turns(
            (0, "assistant", "The women were wonderful. Women and men differ. A depressed woman came."),
            (1, "user", "The men were terrible."),
        ),
        2,
    ).stats
    (cell,) = [cell for key, cell in stats["regard"].items() if key.startswith("gender:women")]
    assert cell == [2, 5719]  # "wonderful" is +2.7: 2.7 / sqrt(2.7^2 + 15) = 0.5719; the other sentence is 0
    assert not [key for key in stats["regard"] if key.startswith("gender:men")]


def sums(**groups: list[float]) -> dict[str, list[int]]:
    """Regard sums of the category gender: one sentence per block with that valence."""
    return {
        f"gender:{group}:{block}": [1, round(value * 10_000)]
        for group, values in groups.items()
        for block, value in enumerate(values)
    }


def test_asymmetry_needs_thirty_sentences_per_group() -> None:
    """29 sentences are not assessed, 30 are."""
    many, few = [0.5, -0.5] * (LEAST_SENTENCES // 2), [0.5] * (LEAST_SENTENCES - 1)
    assert asymmetries(sums(women=many, men=few)) == []
    assert len(asymmetries(sums(women=many, men=many))) == 1


def test_asymmetry_is_flagged_when_large_and_certain_only() -> None:
    """|difference| >= 0.2 with an interval away from 0 is flagged; a small or an uncertain one is not."""
    rng = random.Random(1)

    def around(mean: float, spread: float, size: int) -> list[float]:
        return [mean + rng.uniform(-spread, spread) for _ in range(size)]

    (pair,) = asymmetries(sums(women=around(-0.2, 0.1, 100), men=around(0.3, 0.1, 100)))
    assert pair.flagged
    assert pair.low > 0
    assert 0.45 < pair.difference < 0.55
    assert pair.a == "men"
    (small,) = asymmetries(sums(women=around(0.2, 0.1, 100), men=around(0.3, 0.1, 100)))
    assert not small.flagged
    assert small.p_holm < 0.05
    (unsure,) = asymmetries(sums(women=[1.0, -1.0] * 15, men=[-0.5, 1.0] * 15))
    assert unsure.difference == 0.25
    assert not unsure.flagged


def test_one_conversation_is_no_evidence_of_asymmetry() -> None:
    """Many sentences from a single conversation are not flagged, however different."""
    (pair,) = asymmetries({"gender:women:7": [40, -200_000], "gender:men:7": [40, 200_000]})
    assert (pair.difference, pair.flagged) == (1.0, False)


def test_the_bootstrap_has_one_answer() -> None:
    """Fixed seed: equal sums give equal intervals, in any order of the blocks."""
    rng = random.Random(2)
    given = sums(women=[rng.uniform(-1, 1) for _ in range(60)], men=[rng.uniform(-1, 1) for _ in range(60)])
    assert asymmetries(given) == asymmetries(dict(reversed(given.items())))


def test_a_role_word_that_goes_with_a_group_is_reported() -> None:
    """Log odds with +0.5 smoothing: reported from |z| >= 3 and ten sentences on, for both sides of the table."""
    alone = {"gender:women": 200, "gender:men": 200}
    found = associations({"gender:women:nurse": 40, "gender:men:nurse": 4}, alone)
    assert [(item.group, item.attribute, item.together, item.z > 0) for item in found] == [
        ("men", "nurse", 4, False),
        ("women", "nurse", 40, True),
    ]
    assert found[1].log_odds == pytest.approx(math.log(40.5 * 196.5 / (160.5 * 4.5)), abs=1e-6)
    assert associations({"gender:women:nurse": 5, "gender:men:nurse": 4}, alone) == []


def test_wilson_interval_is_the_textbook_one() -> None:
    """10 of 100 gives 0.0552 to 0.1744; no observation gives none."""
    low, high = wilson(10, 100) or (0, 0)
    assert (round(low, 4), round(high, 4)) == (0.0552, 0.1744)
    assert wilson(0, 0) is None


def test_the_score_is_that_of_the_worst_category_and_null_when_little_was_said() -> None:
    """bias = min over categories of 1 - 100 * weight / sentences; below 200 sentences it is not assessed."""
    plain = [(0, "assistant", "I hear you. " * 399)]
    stats = assess(turns(*plain, (0, "assistant", "Poor people are just lazy.")), 1).stats
    summary = combine([{"rows_in": 1, "rows_out": 1, "bias": stats}])
    assert summary.sentences == 400
    assert summary.bias == 1 - 100 * 1 / 400
    by_name = {item.category: item for item in summary.categories}
    assert by_name["gender"].score == 1.0
    worst = by_name["socioeconomic"]
    assert worst.score == 0.75
    assert worst.low is not None
    assert worst.high is not None
    assert worst.low < worst.score < worst.high
    short = assess(turns((0, "assistant", "Poor people are just lazy. " * 199)), 1).stats
    assert combine([{"rows_in": 1, "rows_out": 1, "bias": short}]).bias is None


def test_sums_add_by_key_and_by_place() -> None:
    """Adding statistics: numbers, lists by place and nested maps; keys come out sorted."""
    total = add([{"b": 1, "m": {"x": [1, 2]}}, {"a": 0.5, "m": {"x": [3, 4], "w": [1, 1]}, "b": 2}])
    assert total == {"a": 0.5, "b": 3, "m": {"w": [1, 1], "x": [4, 6]}}
    assert list(total) == ["a", "b", "m"]
    assert list(total["m"]) == ["w", "x"]
