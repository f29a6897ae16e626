"""The figures that facts of tasks become, and the broken promises they show."""

import pytest

from mcp_control.kernel.changes import Fact, StoredFact
from mcp_control.monitoring.metrics import Metrics
from mcp_control.tasks.figures import TaskFigures
from mcp_control.testing.clock import FakeClock


def _facts(*steps: str) -> list[StoredFact]:
    """`kind:attempt@millisecond` for one task, in order."""
    found = []
    for seq, step in enumerate(steps, 1):
        step, _, at = step.partition("@")
        kind, _, attempt = step.partition(":")
        data = b'{"type":"echo","attempt":%d}' % int(attempt or 0)
        found.append(StoredFact(seq, Fact(f"task.{kind}", "task_1", "default", int(at or seq), "system", data)))
    return found


@pytest.mark.parametrize(
    ("steps", "broken"),
    [
        (("queued", "assigned:1", "started:1", "completed:1"), {}),
        (("queued", "assigned:1", "retrying:1", "queued", "assigned:2", "completed:2"), {}),
        (("queued", "assigned:1", "lost:1", "assigned:2", "completed:2"), {}),
        (("queued", "assigned:1", "released:1", "assigned:2", "failed:2"), {}),
        (("queued", "cancelled"), {}),
        (("scheduled", "queued", "expired"), {}),
        (("queued", "assigned:1", "completed:1", "failed:1"), {"double_final": 1}),
        (("queued", "assigned:1", "lost:1", "assigned:1", "completed:1"), {"fence_not_growing": 1}),
        (("queued", "assigned:1", "lost:1", "completed:1"), {"stale_write_accepted": 1}),
        (("queued", "assigned:1", "lost:1", "assigned:2", "completed:1"), {"stale_write_accepted": 1}),
    ],
    ids=" ".join,
)
def test_a_broken_promise_is_counted_and_a_kept_one_is_not(steps: tuple[str, ...], broken: dict[str, int]) -> None:
    """A second end, a fence that does not grow and a result of an older attempt are seen; every good history leaves all counters at 0."""
    metrics = Metrics()
    TaskFigures(metrics, FakeClock()).heard(_facts(*steps))
    assert metrics.violations() == broken


def test_waiting_and_running_times_are_told_in_seconds() -> None:
    """From queued to assigned, and from assigned to the end."""
    metrics = Metrics(types=["echo"])
    TaskFigures(metrics, FakeClock()).heard(_facts("queued@1000", "assigned:1@3000", "completed:1@8000"))
    text = metrics.render().decode()
    assert 'mcp_control_task_queue_seconds_sum{type="echo"} 2.0' in text
    assert 'mcp_control_task_run_seconds_sum{type="echo"} 5.0' in text
    assert 'mcp_control_tasks_total{outcome="completed",type="echo"} 1.0' in text


def test_memory_is_bounded() -> None:
    """What is forgotten is counted as an outcome and judged no more."""
    metrics = Metrics()
    figures = TaskFigures(metrics, FakeClock(), remembered=10)
    for number in range(100):
        fact = Fact("task.queued", f"task_{number}", "default", number, "system", b"{}")
        figures.heard([StoredFact(number + 1, fact)])
    assert len(figures._live) == 10
    assert metrics.violations() == {}
