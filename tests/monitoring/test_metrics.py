"""Metrics: golden signals, bounded labels, invariants at zero, one registry per server."""

import asyncio

import pytest

from mcp_control.monitoring.loop_lag import LoopLag
from mcp_control.monitoring.metrics import INVARIANTS, Metrics
from mcp_control.testing.clock import FakeClock


def lines(metrics: Metrics) -> dict[str, float]:
    """The samples by their name and labels."""
    found = {}
    for line in metrics.render().decode().splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    return found


def test_requests_are_counted_by_route_method_and_status() -> None:
    """Traffic, errors and latency per route template."""
    metrics = Metrics(routes=["/api/v1/tasks/{id}"])
    for _ in range(3):
        metrics.request("/api/v1/tasks/{id}", "GET", 200, 0.004)
    metrics.request("/api/v1/tasks/{id}", "GET", 404, 0.004)
    found = lines(metrics)
    assert found['mcp_control_http_requests_total{method="GET",route="/api/v1/tasks/{id}",status="200"}'] == 3
    assert found['mcp_control_http_requests_total{method="GET",route="/api/v1/tasks/{id}",status="404"}'] == 1
    assert found['mcp_control_http_request_seconds_bucket{le="0.005",method="GET",route="/api/v1/tasks/{id}"}'] == 4


def test_what_users_choose_never_becomes_a_label() -> None:
    """Ten thousand made-up names add nothing to the output, and none of them appears in it."""
    metrics = Metrics(routes=["/r"], types=["techdeck.process"])
    metrics.watch_lanes(lambda: [(f"canary{n}", 2, float(n)) for n in range(1000)] + [("techdeck.process", 5, 1.5)])
    metrics.watch_states("agents", "agents by state", ["online", "offline"], lambda: {"online": 3, "canary": 2})

    def act(n: int) -> None:
        metrics.request(f"/canary{n}", f"CANARY{n}", 200 + n, 0.1)
        metrics.task_ended(f"canary{n}", "completed")
        metrics.task_ended("techdeck.process", f"canary{n}")
        metrics.task_waited(f"canary{n}", 1)
        metrics.task_ran(f"canary{n}", 1)
        metrics.shed(f"canary{n}")
        metrics.login(f"canary{n}")

    act(0)
    for n in range(400):
        act(n)
    size = len(metrics.render())
    for n in range(400, 10_000):
        act(n)
    assert len(metrics.render()) < size + 1000  # the digits of the counts
    assert b"canary" not in metrics.render().lower()
    found = lines(metrics)
    assert found['mcp_control_tasks_total{outcome="completed",type="other"}'] == 10_001
    assert found['mcp_control_lane_waiting{type="other"}'] == 2000
    assert found['mcp_control_lane_oldest_seconds{type="other"}'] == 999
    assert found['mcp_control_lane_waiting{type="techdeck.process"}'] == 5
    assert found["mcp_control_lanes"] == 1001
    assert (found['mcp_control_agents{state="online"}'], found['mcp_control_agents{state="offline"}']) == (3, 0)
    assert found['mcp_control_agents{state="other"}'] == 2


def test_invariants_are_there_from_the_start_and_zero() -> None:
    """An alert on `> 0` works before the first violation; a violation counts; a wrong name is an error."""
    metrics = Metrics()
    found = lines(metrics)
    assert [found[f'mcp_control_invariant_violations_total{{name="{name}"}}'] for name in INVARIANTS] == [0] * len(
        INVARIANTS
    )
    assert metrics.violations() == {}
    metrics.violation("double_final")
    assert metrics.violations() == {"double_final": 1}
    with pytest.raises(ValueError, match="no such invariant"):
        metrics.violation("dubble_final")


def test_figures_are_read_when_they_are_shown() -> None:
    """Gauges and totals of other parts are pulled, so they cost nothing between."""
    metrics = Metrics()
    figures = {"queue": 1.0}
    metrics.watch("writer_queue", "changes waiting", lambda: figures["queue"])
    metrics.watch_total("store_commits", "physical commits", lambda: 7)
    figures["queue"] = 42.0
    found = lines(metrics)
    assert found["mcp_control_writer_queue"] == 42
    assert found["mcp_control_store_commits_total"] == 7


def test_two_servers_in_one_process_do_not_share() -> None:
    """Each has a registry of its own."""
    one, two = Metrics(), Metrics()
    one.violation("double_final")
    assert two.violations() == {}


async def test_event_loop_lag_is_what_a_sleep_took_too_long() -> None:
    """The last, the worst of the window, and each to who asked for it."""
    clock = FakeClock()
    late = [0.0, 0.25, 0.02, 0.01]
    noted: list[float] = []

    async def sleep(seconds: float) -> None:
        clock.advance(seconds + late.pop(0))

    lag = LoopLag(clock, interval=0.1, window=3, noted=noted.append, sleep=sleep)
    assert (lag.now, lag.worst) == (0, 0)
    for expected in (0, 0.25, 0.02):
        assert await lag.once() == pytest.approx(expected)
    assert (lag.now, lag.worst) == (pytest.approx(0.02), pytest.approx(0.25))
    await lag.once()
    assert noted == pytest.approx([0, 0.25, 0.02, 0.01])
    metrics = Metrics()
    for each in noted:
        metrics.loop_lag(each)
    assert lines(metrics)['mcp_control_event_loop_lag_seconds_bucket{le="0.01"}'] in (1, 2)


async def test_lag_measurement_starts_and_stops() -> None:
    """It runs until it is stopped, and both may be said twice."""
    clock, measured = FakeClock(), asyncio.Event()

    async def sleep(seconds: float) -> None:
        clock.advance(seconds)
        await asyncio.sleep(0)

    lag = LoopLag(clock, noted=lambda _: measured.set(), sleep=sleep)
    lag.start()
    lag.start()
    await asyncio.wait_for(measured.wait(), 10)
    await lag.stop()
    await lag.stop()
