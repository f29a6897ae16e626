"""When a waiting task may begin."""

from hypothesis import given
from hypothesis import strategies as st

from mcp_control.tasks.outlook import expected_start, left_ms, turns_before
from mcp_control.tasks.statistics import Times

NOW = 1_800_000_000_000
TIMES = {"quick": Times(count=9, p50=1.0, p90=2.0, p99=4.0), "slow": Times(count=9, p50=60.0, p90=90.0, p99=200.0)}
TYPES = st.sampled_from(sorted(TIMES))
RUNNING = st.lists(st.tuples(TYPES, st.integers(NOW - 300_000, NOW)), max_size=6)
AHEAD = st.lists(st.tuples(TYPES, st.integers(0, 40)), max_size=4)


def test_a_task_begins_when_those_before_it_have_had_their_turn() -> None:
    """Two slots, three tasks of a second ahead: the first slot is free again after one second, and then one more."""
    assert expected_start(NOW, 2, [], [("quick", 3)], TIMES) == NOW + 1000
    assert expected_start(NOW, 0, [("quick", NOW - 400)], [("quick", 1)], TIMES) == NOW + 1600
    assert expected_start(NOW, 1, [("slow", NOW)], [], TIMES) == NOW


def test_what_is_not_known_is_not_guessed() -> None:
    """Without a slot, or with a type ahead that has no history, nothing is said."""
    assert expected_start(NOW, 0, [], [], TIMES) is None
    assert expected_start(NOW, 1, [], [("new", 1)], TIMES) is None
    assert expected_start(NOW, 0, [("new", NOW)], [], TIMES) is None


def test_an_attempt_that_takes_long_is_expected_to_take_longer() -> None:
    """What is left is until the next quantile, and once all are passed the median again."""
    assert [left_ms(TIMES["quick"], elapsed) for elapsed in (0, 999, 1500, 3000, 9000)] == [1000, 1, 500, 1000, 1000]


@given(free=st.integers(0, 4), running=RUNNING, ahead=AHEAD)
def test_more_ahead_never_means_earlier_and_more_slots_never_later(
    free: int, running: list[tuple[str, int]], ahead: list[tuple[str, int]]
) -> None:
    """The forecast is never in the past, grows with what is ahead, and shrinks with slots."""
    found = expected_start(NOW, free, running, ahead, TIMES)
    if found is None:
        assert not free + len(running)
        return
    assert found >= NOW
    more = expected_start(NOW, free, running, [*ahead, ("slow", 1)], TIMES)
    wider = expected_start(NOW, free + 1, running, ahead, TIMES)
    assert more is not None
    assert wider is not None
    assert wider <= found <= more


@given(ahead=st.lists(st.integers(0, 30_000), min_size=1, max_size=3), free=st.integers(1, 50))
def test_a_long_line_is_reckoned_with_in_one_step(ahead: list[int], free: int) -> None:
    """However many are ahead, the forecast is that of all slots working without a pause."""
    found = expected_start(NOW, free, [], [("quick", count) for count in ahead], TIMES)
    assert found is not None
    assert abs((found - NOW) - sum(ahead) * 1000 / free) <= 1000


def test_other_shares_have_their_turns_by_weight() -> None:
    """Behind three of its own, with twice the weight of one other and half that of another: two and eight turns, at most what waits."""
    assert turns_before(3, 2.0, [(1.0, 100), (4.0, 100), (4.0, 3)]) == [2, 8, 3]
