"""The order of waiting tasks as one number: priority, age and deadline, and what that bounds."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from mcp_control.storage.ports import RANK_MAX
from mcp_control.tasks.ranking import ORDER_SHIFT, ORDER_STEP, longest_overtaking_ms, rank_of

NOW = 1_800_000_000_000
DAY = 86_400_000


@dataclass(frozen=True)
class Waiting:
    """A task that waits, as its rank sees it."""

    created: int
    priority: int
    deadline: int | None
    expected: int

    def rank(self, point_ms: int) -> int:
        """Return its rank."""
        return rank_of(self.created << ORDER_SHIFT, self.priority, self.deadline, self.expected, point_ms)


CREATED = st.integers(NOW, NOW + DAY)
TASKS = st.builds(
    lambda created, priority, until, expected: Waiting(
        created, priority, None if until is None else created + until, expected
    ),
    CREATED,
    st.integers(0, 100),
    st.none() | st.integers(1, DAY),
    st.integers(0, 600_000),
)
POINTS = st.sampled_from([0, 1, 6000, 3_600_000])


@given(old=TASKS, new=TASKS, point_ms=POINTS)
def test_what_comes_late_enough_never_overtakes(old: Waiting, new: Waiting, point_ms: int) -> None:
    """A task waits for none that came later than its bound, whatever that one's priority and deadline: nothing is starved."""
    if new.created > old.created + longest_overtaking_ms(old.priority, new.expected, point_ms):
        assert old.rank(point_ms) < new.rank(point_ms)


@given(one=TASKS, two=TASKS, point_ms=POINTS, moment=CREATED)
def test_two_tasks_age_at_the_same_speed(one: Waiting, two: Waiting, point_ms: int, moment: int) -> None:
    """Who comes first is what priority less age says, at any moment: the order never has to be computed again."""
    if one.deadline is None and two.deadline is None and point_ms:

        def urgency(task: Waiting) -> int:
            return task.priority * point_ms + (moment - task.created)

        first, second = urgency(one), urgency(two)
        assert (one.rank(point_ms) < two.rank(point_ms)) == (first > second)


@given(task=TASKS, other=TASKS, point_ms=POINTS)
def test_a_deadline_only_ever_moves_a_task_forward_and_the_nearest_comes_first(
    task: Waiting, other: Waiting, point_ms: int
) -> None:
    """A task with a deadline is at least as early as without; of two that have to hurry the one that must begin first comes first."""
    without = Waiting(task.created, task.priority, None, task.expected)
    assert task.rank(point_ms) <= without.rank(point_ms)
    pressed = [
        (one.deadline - one.expected, one.rank(point_ms))
        for one in (task, other)
        if one.deadline is not None and one.rank(point_ms) < Waiting(one.created, one.priority, None, 0).rank(point_ms)
    ]
    assert [rank for _, rank in sorted(pressed)] == sorted(rank for _, rank in pressed)


@given(places=st.lists(st.integers(0, 10_000), min_size=2, max_size=20, unique=True), priority=st.integers(0, 100))
def test_tasks_of_one_moment_keep_their_places(places: list[int], priority: int) -> None:
    """Places in line that differ by one step give ranks that differ, in the same order."""
    orders = [(NOW << ORDER_SHIFT) + place * ORDER_STEP for place in places]
    assert sorted(orders, key=lambda order: rank_of(order, priority, None, 0)) == sorted(orders)
    assert len({rank_of(order, priority, None, 0) for order in orders}) == len(orders)


@given(task=TASKS, point_ms=st.integers(0, 10**12))
def test_every_rank_can_be_stored_exactly(task: Waiting, point_ms: int) -> None:
    """Whatever the setting, a rank is a whole number that a double holds exactly."""
    assert 0 <= task.rank(point_ms) <= RANK_MAX == int(float(RANK_MAX))
