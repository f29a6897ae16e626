"""Who uses a pipeline: runs that have not ended, and schedules. What is used cannot be deleted."""

from collections.abc import Sequence
from typing import Final

from mcp_control.kernel.changes import IndexValue, Query, Where
from mcp_control.kernel.errors import PipelineInUse
from mcp_control.pipelines.model import RUN_FINAL, Pipeline, RunState
from mcp_control.pipelines.records import read_run, scoped
from mcp_control.pipelines.schedule_model import SCHEDULE_KIND
from mcp_control.pipelines.schedule_records import read_schedule
from mcp_control.storage.ports import Store

_BATCH: Final = 200
_SHOWN: Final = 10
_ACTIVE: Final = [state.value for state in RunState if state not in RUN_FINAL]


async def refuse_in_use(store: Store, tenant: str, going: Sequence[Pipeline], left: Sequence[Pipeline]) -> None:
    """Raise PipelineInUse when versions of one name cannot go because something uses them.

    Args:
        left: the versions that would stay; a schedule of the newest version needs at least one.
    """
    runs = await _runs(store, tenant, going)
    schedules = await _schedules(store, tenant, going, bool(left))
    if runs or schedules:
        named = [*runs, *(f"schedule {name}" for name in schedules)]
        more = " and others" if len(named) > 3 else ""
        raise PipelineInUse(f"used by {', '.join(named[:3])}{more}", runs=runs[:_SHOWN], schedules=schedules[:_SHOWN])


async def _runs(store: Store, tenant: str, going: Sequence[Pipeline]) -> list[str]:
    ids = {each.id for each in going}
    found: list[str] = []
    # One state after the other: each is led straight to its rows by the index over pipeline and state.
    for state in _ACTIVE:
        where = [Where("pipeline", "eq", going[0].name), Where("state", "eq", state)]
        after: list[IndexValue] | None = None
        while len(found) <= _SHOWN:
            rows = await store.find("run", Query(where=where, after=after, limit=_BATCH))
            found += [run.id for row in rows if (run := read_run(row)).tenant == tenant and run.pipeline_id in ids]
            if len(rows) < _BATCH:
                break
            after = [rows[-1].id]
    return found


async def _schedules(store: Store, tenant: str, going: Sequence[Pipeline], some_left: bool) -> list[str]:
    names = {going[0].name, *(each.id for each in going)}
    numbers = {each.number for each in going}
    found: list[str] = []
    after: list[IndexValue] | None = None
    where = [Where("name", "ge", scoped(tenant, "")), Where("name", "lt", tenant + "\x20")]
    while True:
        rows = await store.find(SCHEDULE_KIND.name, Query(where=where, order="name", after=after, limit=_BATCH))
        for row in rows:
            schedule = read_schedule(row)
            run = schedule.spec.run
            if run is None or run.pipeline not in names or schedule.deleted or schedule.finished_at is not None:
                continue
            by_id = run.pipeline != going[0].name
            if run.version in numbers or (run.version is None and (by_id or not some_left)):
                found.append(schedule.spec.name)
        if len(rows) < _BATCH:
            return found
        after = [rows[-1].index["name"], rows[-1].id]
