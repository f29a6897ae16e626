"""The checker of histories finds what it is there for: each broken history is refused for its own reason."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.cluster.history import Executed, History, Seen, check, violations


def _good() -> History:
    """Two tasks of a run, the second after the first; the first was lost once. One more task that a client submitted."""
    history = History(stages={"second": ["first"]})
    history.acked("key", "t3")
    history.acked("key", "t3")
    story = [
        ("task.queued", "t1", "first", 0),
        ("task.queued", "t3", None, 0),
        ("task.assigned", "t1", "first", 1),
        ("task.started", "t1", "first", 1),
        ("task.lost", "t1", "first", 1),
        ("task.assigned", "t1", "first", 2),
        ("task.assigned", "t3", None, 1),
        ("task.completed", "t1", "first", 2),
        ("task.queued", "t2", "second", 0),
        ("task.completed", "t3", None, 1),
        ("task.assigned", "t2", "second", 1),
        ("task.completed", "t2", "second", 1),
    ]
    history.events = [
        Seen(seq, kind, subject, "run" if stage else None, stage, attempt)
        for seq, (kind, subject, stage, attempt) in enumerate(story, 7)
    ]
    history.executions = [Executed("t1", 1, 5), Executed("t1", 2, 6), Executed("t2", 1, 5), Executed("t3", 1, 5)]
    lost = {"number": 1, "outcome": "lost", "assigned_at": 100, "ended_at": 200}
    done = {"number": 2, "outcome": "completed", "assigned_at": 200, "ended_at": 300}
    first = {**done, "number": 1}
    history.read({"id": "t1", "state": "running", "fence": "1.1", "attempt": 1, "attempts": []})
    history.read(
        {"id": "t1", "state": "completed", "fence": "1.3", "attempt": 2, "attempts": [lost, done], "result": 1}
    )
    history.read({"id": "t2", "state": "completed", "fence": "1.1", "attempt": 1, "attempts": [first]})
    history.read(
        {"id": "t3", "state": "completed", "fence": "1.1", "attempt": 1, "attempts": [first], "idempotency_key": "key"}
    )
    return history


def _event(history: History, at: int, **changes: Any) -> None:
    before = history.events[at]
    given = {name: getattr(before, name) for name in Seen.__struct_fields__}
    history.events[at] = Seen(**{**given, **changes})


def _two_ids(history: History) -> None:
    history.acked("key", "t1")


def _gone(history: History) -> None:
    history.acked("lost", "t9")


def _two_tasks(history: History) -> None:
    history.reads["t1"][-1]["idempotency_key"] = "key"


def _ended_twice(history: History) -> None:
    history.events.append(Seen(19, "task.completed", "t1", attempt=2))


def _ended_otherwise(history: History) -> None:
    history.read({**history.reads["t1"][-1], "state": "failed"})


def _undone(history: History) -> None:
    history.read({**history.reads["t1"][-1], "state": "running"})


def _two_results(history: History) -> None:
    history.read({**history.reads["t1"][-1], "result": 2})


def _fence_back(history: History) -> None:
    history.read({**history.reads["t1"][-1], "fence": "1.2"})


def _fence_stays(history: History) -> None:
    history.reads["t1"][0]["fence"] = "1.3"


def _given_twice(history: History) -> None:
    history.executions.append(Executed("t3", 1, 6))


def _attempt_again(history: History) -> None:
    _event(history, 5, attempt=1)


def _held_by_two(history: History) -> None:
    _event(history, 4, type="task.progressed")


def _overlap(history: History) -> None:
    history.reads["t1"][-1]["attempts"][1]["assigned_at"] = 150


def _no_event(history: History) -> None:
    _event(history, 9, type="task.progressed")


def _unheard_attempt(history: History) -> None:
    history.reads["t2"][-1]["attempt"] = 2


def _gap(history: History) -> None:
    del history.events[3]


def _twice_seen(history: History) -> None:
    history.events.insert(3, history.events[3])


def _unheard_task(history: History) -> None:
    history.acked("new", "t4")
    history.read({"id": "t4", "state": "completed", "fence": "1.1", "idempotency_key": "new"})


def _before_parent(history: History) -> None:
    _event(history, 7, type="task.progressed")


def _not_ended(history: History) -> None:
    history.reads["t2"] = [{"id": "t2", "state": "queued", "fence": "1.0"}]


def test_a_sound_history_is_accepted() -> None:
    """What a correct cluster shows breaks no invariant, repeated acknowledgements and a lost attempt included."""
    check(_good())


@pytest.mark.parametrize(
    ("invariant", "harm"),
    [
        ("I1", _two_ids),
        ("I1", _gone),
        ("I1", _two_tasks),
        ("I2", _ended_twice),
        ("I2", _ended_otherwise),
        ("I2", _undone),
        ("I2", _two_results),
        ("I3", _fence_back),
        ("I3", _fence_stays),
        ("I3", _given_twice),
        ("I3", _attempt_again),
        ("I4", _held_by_two),
        ("I4", _overlap),
        ("I5", _no_event),
        ("I5", _unheard_attempt),
        ("I9", _gap),
        ("I9", _twice_seen),
        ("I9", _unheard_task),
        ("I6", _before_parent),
        ("I7", _not_ended),
    ],
)
def test_a_broken_history_is_refused(invariant: str, harm: Callable[[History], None]) -> None:
    """Each way to break an invariant is found, and named by that invariant."""
    history = copy.deepcopy(_good())
    harm(history)
    found = violations(history)
    assert [one for one in found if one.startswith(invariant)], found
    with pytest.raises(AssertionError, match="violations"):
        check(history)
