"""Fair shares: who gets the next free slots, and that nobody is starved or owed more than a quantum."""

from hypothesis import given
from hypothesis import strategies as st

from mcp_control.tasks.fairness import GRADES, MEDIUM, Line, Shares, allot, grade_of, patience_seconds

POINT_MS = 6000
WEIGHTS = st.sampled_from([0.1, 0.5, 1.0, 3.0, 10.0, 100.0])


def _lines(shares: Shares, *weights: float, grade: int = MEDIUM, now: float = 0.0) -> list[Line]:
    lines = []
    for number, weight in enumerate(weights):
        line = shares.line("tenant", f"key{number}", grade)
        line.share.asked = weight
        shares.begin(line, now)
        lines.append(line)
    return lines


def _serve(shares: Shares, waiting: list[tuple[Line, int]], room: int, now: float) -> list[int]:
    counts = allot(waiting, room, now, POINT_MS)
    for (line, _), count in zip(waiting, counts, strict=True):
        shares.served(line, count, now)
    return counts


@given(weights=st.lists(WEIGHTS, min_size=2, max_size=8), rooms=st.lists(st.integers(1, 64), min_size=1, max_size=60))
def test_shares_that_all_wait_get_their_weights_within_a_quantum(weights: list[float], rooms: list[int]) -> None:
    """However many slots become free at once, what each was served by its weight differs by at most one task each."""
    shares = Shares()
    lines = _lines(shares, *weights)
    served = [0] * len(lines)
    for room in rooms:
        counts = _serve(shares, [(line, 10_000) for line in lines], room, 0.0)
        assert sum(counts) == room
        served = [before + count for before, count in zip(served, counts, strict=True)]
    # SFQ, theorem 1: |W_f / w_f - W_g / w_g| <= 1 / w_f + 1 / w_g.
    for one, first in zip(served, weights, strict=True):
        for two, second in zip(served, weights, strict=True):
            assert abs(one / first - two / second) <= 1 / first + 1 / second + 1e-6


@given(
    waiting=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    grades=st.lists(st.integers(0, GRADES - 1), min_size=6, max_size=6),
    room=st.integers(0, 100),
)
def test_no_slot_stays_free_while_something_waits(waiting: list[int], grades: list[int], room: int) -> None:
    """All free slots are given out as long as there is anything, nobody gets more than waits, and higher classes come first."""
    shares = Shares()
    lines = [shares.line("tenant", f"key{n}", grades[n]) for n in range(len(waiting))]
    counts = allot(list(zip(lines, waiting, strict=True)), room, 0.0, POINT_MS)
    assert sum(counts) == min(room, sum(waiting))
    assert all(0 <= count <= there for count, there in zip(counts, waiting, strict=True))
    for line, count in zip(lines, counts, strict=True):
        if count:
            assert all(
                other == there
                for above, other, there in zip(lines, counts, waiting, strict=True)
                if above.grade > line.grade
            )


@given(weight=WEIGHTS, others=st.lists(WEIGHTS, min_size=1, max_size=5), rounds=st.integers(1, 400))
def test_a_share_that_was_away_neither_saves_up_nor_waits(weight: float, others: list[float], rounds: int) -> None:
    """After any time of absence a share is served within one task of each other share, and from then on gets its weight and no more."""
    shares = Shares()
    *busy, late = _lines(shares, *others, weight)
    for _ in range(rounds):
        _serve(shares, [(line, 100) for line in busy], 1, 0.0)
    shares.begin(late, 0.0)
    counts = [0] * (len(busy) + 1)
    for step in range(200):
        found = _serve(shares, [(line, 100) for line in (*busy, late)], 1, 0.0)
        counts = [before + one for before, one in zip(counts, found, strict=True)]
        assert counts[-1] or step < len(busy)
    for count, other in zip(counts[:-1], others, strict=True):
        assert counts[-1] / weight - count / other <= 2 / weight + 2 / other + 1e-6


def test_one_task_of_a_share_is_next_whatever_another_has_waiting() -> None:
    """A thousand tasks of a share that was always served do not hold up the one of a share that has just come."""
    shares = Shares()
    big, small = _lines(shares, 1.0, 1.0)
    for _ in range(500):
        _serve(shares, [(big, 1000)], 2, 0.0)
    shares.begin(small, 0.0)
    assert _serve(shares, [(big, 1000), (small, 1)], 2, 0.0) == [1, 1]


def test_a_lower_class_gets_a_task_when_it_waited_long_enough() -> None:
    """Constant work of a higher class holds a lower one up for so long, and not for longer; after one task it waits as long again."""
    shares = Shares()
    (low,) = _lines(shares, 1.0, grade=0)
    critical = shares.line("tenant", "urgent", GRADES - 1)
    patience = patience_seconds(0, POINT_MS)
    assert patience == 360
    waiting = [(critical, 100), (low, 100)]
    assert _serve(shares, waiting, 10, patience) == [10, 0]
    assert _serve(shares, waiting, 10, patience + 1) == [9, 1]
    assert _serve(shares, waiting, 10, patience + 2) == [10, 0]
    assert _serve(shares, waiting, 10, 2 * patience + 2) == [9, 1]


def test_what_a_share_is_owed_is_bounded() -> None:
    """A share that nobody could serve for long does not hold the others up for as long afterwards."""
    shares = Shares()
    stuck, other = _lines(shares, 2.0, 1.0)
    for _ in range(1000):
        _serve(shares, [(other, 100)], 1, 0.0)
    shares.catch_up(stuck)
    counts = _serve(shares, [(stuck, 1000), (other, 1000)], 100, 0.0)
    assert counts[1] >= 25


def test_an_operator_s_weight_wins_over_that_of_the_tasks() -> None:
    """A weight that was ordered counts at once, also for a share that is not there yet, until it is withdrawn."""
    shares = Shares()
    shares.order("tenant", "key0", 5.0)
    first, second = _lines(shares, 1.0, 1.0)
    assert (first.share.weight, second.share.weight) == (5.0, 1.0)
    shares.order("tenant", "key0", None)
    shares.order("tenant", "key1", 2.0)
    assert (first.share.weight, second.share.weight) == (1.0, 2.0)


def test_a_share_that_waits_is_not_forgotten() -> None:
    """Forgetting what is idle keeps the time of what waits, and only keyed shares make sharing necessary."""
    shares = Shares()
    own = shares.line("tenant", "", MEDIUM)
    assert not shares.keyed
    keyed = shares.line("tenant", "a", MEDIUM)
    shares.served(keyed, 7, 0.0)
    shares.forget({own, keyed})
    assert shares.keyed
    assert shares.line("tenant", "a", MEDIUM) is keyed
    shares.forget({own})
    assert not shares.keyed
    assert shares.line("tenant", "", MEDIUM) is own


@given(st.integers(0, 100))
def test_the_named_priorities_are_in_different_classes(priority: int) -> None:
    """Low, medium, high and critical are four classes, and a higher priority is never in a lower class."""
    assert [grade_of(named) for named in (30, 50, 70, 90)] == [0, 1, 2, 3]
    assert grade_of(priority) <= grade_of(min(100, priority + 1))
