"""How long things are kept: the loops that remove what is over its time, for the server that leads."""

from collections.abc import Awaitable, Callable
from typing import Final

from mcp_control.artifacts.service import Artifacts
from mcp_control.configuration.groups import Retention as Keep
from mcp_control.events.retention import EventRetention
from mcp_control.kernel.clock import Clock
from mcp_control.pipelines.results import ResultRetention
from mcp_control.pipelines.retention import PipelineRetention, RunRetention
from mcp_control.pipelines.timekeeping import ScheduleRetention
from mcp_control.storage.ports import Store
from mcp_control.tasks.history import TaskHistory
from mcp_control.tasks.janitors import PayloadRetention, Retention
from mcp_control.tasks.shares import ShareManager

_DAY_MS: Final = 86_400_000
Once = Callable[[int], Awaitable[object]]


def retention_loops(
    keep: Keep, store: Store, clock: Clock, artifacts: Artifacts, history: TaskHistory, shares: ShareManager
) -> list[tuple[str, float, Once]]:
    """Return name, pace in seconds and what to do, for each kind of thing that is removed after its time."""
    runs_ms = round(keep.runs_days * _DAY_MS)
    events = EventRetention(store, keep_ms=round(keep.events_days * _DAY_MS), keep_count=keep.events_count)
    tasks = Retention(store, clock, round(keep.tasks_days * _DAY_MS))
    payloads = None if keep.payload_days is None else PayloadRetention(store, round(keep.payload_days * _DAY_MS))
    removing: tuple[tuple[str, Once], ...] = (
        ("events-retention", events.once),
        ("statistics-retention", history.forget),
        ("shares-retention", shares.forget),
        ("tasks-retention", lambda _: tasks.once()),
        *([] if payloads is None else [("payloads-retention", payloads.once)]),
        ("results-retention", ResultRetention(store).once),
        ("runs-retention", RunRetention(store, artifacts, runs_ms).once),
        ("schedules-retention", ScheduleRetention(store, runs_ms).once),
        ("pipelines-retention", PipelineRetention(store, runs_ms).once),
    )
    return [(name, keep.interval_seconds, once) for name, once in removing]
