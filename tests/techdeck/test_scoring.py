"""The quality score: its parts, the gate at the threshold, what is not assessed."""

from fractions import Fraction

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_control.techdeck.model import QualityOptions
from mcp_control.techdeck.quality.scoring import (
    READ_REPORT,
    WEIGHTS,
    Count,
    Facts,
    assess,
    duplication,
    evenness,
    gate,
    mean,
    overall,
    score_parts,
    source_balance,
)

GOOD = Facts(
    rows=10,
    fields={"id": 10, "user": 10, "assistant": 10},
    structure_valid=1.0,
    alternation=Count(hits=20, total=20),
    same_language=Count(hits=10, total=10),
    confident_roles=Count(hits=10, total=10),
    content_ok=Count(hits=10, total=10),
    distinct_2=Count(hits=80, total=100),
    openings=[1] * 10,
    sources=[10],
    bias=1.0,
    exact_duplicates=0,
    near_duplicates=0,
    residual_pii=0,
    leaks=0,
    rejected=Count(hits=0, total=10),
)


def _parts(*values: float | None) -> dict[str, float | None]:
    return dict(zip(WEIGHTS, values, strict=True))


def test_parts_below_the_threshold_fail_the_gate() -> None:
    """1, 1, .2, .2, .8 give .69."""
    result = gate(_parts(1, 1, 0.2, 0.2, 0.8), 0.70)
    assert result.value == 0.69
    assert result.passed is False


@pytest.mark.parametrize("parts", [(1, 1, 0.25, 0.2, 0.8), (0.7, 0.7, 0.7, 0.7, 0.7), (0.9, 0.9, 0.5, 0.6, 0.4)])
def test_exactly_the_threshold_passes(parts: tuple[float, ...]) -> None:
    """.7000 is enough, however the parts add up in binary; a hair less is not."""
    assert gate(_parts(*parts), 0.70).passed is True
    assert gate(_parts(parts[0] - 1e-9, *parts[1:]), 0.70).passed is False


def test_two_equal_rows_of_three_give_two_thirds() -> None:
    """Duplication is 1 - 1/3 for rows A, A, B; None without rows."""
    facts = msgspec.structs.replace(GOOD, rows=3, exact_duplicates=1)
    assert round(duplication(facts) or 0, 4) == 0.6667
    assert duplication(msgspec.structs.replace(GOOD, rows=0)) is None


def test_parts_that_are_not_assessed_leave_their_weight_to_the_others() -> None:
    """Without bias the other weights count relative to .85; with nothing there is no score and no pass."""
    assert overall(_parts(1, 1, 0.5, None, 1)) == Fraction(75, 85)
    assert overall(_parts(None, None, None, None, None)) is None
    assert gate(_parts(None, None, None, None, None), 0.0).passed is False


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=5, max_size=5))
def test_the_score_lies_between_its_worst_and_best_part(values: list[float | None]) -> None:
    """A weighted mean, null exactly when all parts are."""
    known = [value for value in values if value is not None]
    total = overall(_parts(*values))
    assert (total is None) == (not known)
    if total is not None:
        assert min(known) - 1e-12 <= total <= max(known) + 1e-12


def test_parts_are_the_means_of_what_they_are_made_of() -> None:
    """Each by hand: fields 1, 1, .5; consistency 1, .9, .8, None; diversity .8 and evenness 1 without sources."""
    facts = msgspec.structs.replace(
        GOOD,
        fields={"id": 10, "user": 10, "assistant": 5},
        alternation=Count(hits=18, total=20),
        same_language=Count(hits=8, total=10),
        confident_roles=Count(),
        near_duplicates=1,
    )
    scores = {part.name: part.score for part in score_parts(facts)}
    assert scores["completeness"] == pytest.approx(2.5 / 3)
    assert scores["consistency"] == pytest.approx(2.7 / 3)
    assert scores["diversity"] == pytest.approx(0.9)
    assert scores["bias"] == 1.0
    assert scores["duplication"] == 0.9


def test_evenness_and_source_balance() -> None:
    """H / ln k; one kind of many rows is 0, one row says nothing, one source says nothing."""
    assert evenness([5, 5]) == pytest.approx(1.0)
    assert evenness([9]) == 0.0
    assert evenness([1]) is None
    assert evenness([3, 1]) == pytest.approx(0.8112781)
    assert source_balance([10]) is None
    assert source_balance([6, 3, 1]) == pytest.approx(0.4)
    assert mean([None, None]) is None


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({"structure_valid": 0.94}, "structure_valid"),
        ({"residual_pii": 1}, "residual_pii"),
        ({"leaks": 1}, "split_leak"),
        ({"rejected": Count(hits=21, total=100)}, "rejected"),
    ],
)
def test_a_hard_gate_fails_a_run_whose_average_is_good(change: dict[str, object], failed: str) -> None:
    """The average passes, the run does not, and the gate says why."""
    assert assess(GOOD, QualityOptions()).passed
    result = assess(msgspec.structs.replace(GOOD, **change), QualityOptions())
    assert not result.passed
    assert [item.name for item in result.gates if item.passed is False] == [failed]


def test_limits_of_the_hard_gates_are_inclusive() -> None:
    """structure_valid of .95 and a fifth of rejected rows pass; what was not assessed does not fail."""
    edge = msgspec.structs.replace(GOOD, structure_valid=0.95, rejected=Count(hits=20, total=100))
    assert assess(edge, QualityOptions()).passed
    unknown = msgspec.structs.replace(GOOD, structure_valid=None)
    assert assess(unknown, QualityOptions()).passed


def test_a_recommendation_names_metric_value_rows_and_command() -> None:
    """Three copies among ten rows; a good set has nothing to recommend."""
    assert assess(GOOD, QualityOptions()).recommendations == []
    facts = msgspec.structs.replace(GOOD, exact_duplicates=2, near_duplicates=1)
    (advice,) = assess(facts, QualityOptions()).recommendations
    assert (advice.metric, advice.rows) == ("duplication", 3)
    assert advice.value == pytest.approx(0.7)
    assert advice.command == "mcpctl runs artifacts RUN --output DIR"


def test_advice_names_a_command_only_where_one_helps() -> None:
    """To read what was found is a command; to pass over it, or to write easier texts, is none."""
    facts = msgspec.structs.replace(GOOD, bias=0.5, repetitive=9, hard_to_read=9)
    commands = {advice.code: advice.command for advice in assess(facts, QualityOptions()).recommendations}
    assert commands == {"R_BIAS": READ_REPORT, "R_REPETITION": READ_REPORT, "R_READABILITY": None}
