"""Lists of tasks: which, and a page of them."""

from collections.abc import Mapping
from typing import Final

import msgspec

from mcp_control.kernel.changes import Query, Where
from mcp_control.kernel.paging import Page, decode_cursor, encode_cursor
from mcp_control.storage.ports import Store
from mcp_control.tasks.model import TaskState
from mcp_control.tasks.narrowing import fulfils, narrowed
from mcp_control.tasks.records import readable, view
from mcp_control.tasks.view_model import TaskView

_SCANNED_MAX: Final = 5000
_STEPS: Final = (200, 1000)  # rows looked at first, and with each further step, where the index does not tell all


class TaskFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which tasks: all conditions given must hold."""

    state: TaskState | None = None
    type: str | None = None
    run: str | None = None
    group: str | None = None
    agent: str | None = None
    labels: Mapping[str, str] = {}
    oldest_first: bool = False


async def page(
    store: Store, tenant: str, wanted: TaskFilter, now: int, cursor: str | None, limit: int
) -> Page[TaskView]:
    """Return a page of a tenant's tasks that match, newest first unless asked otherwise; without payloads and results.

    Where no index tells all that was asked, a page may come back short, with a cursor to go on from, but never costs without bound.
    """
    where: list[Where] = []
    if wanted.run is not None:
        where.append(Where("run", "eq", wanted.run))
    if wanted.group is not None:
        where.append(Where("group_id", "eq", wanted.group))
    if wanted.agent is not None:
        where.append(Where("agent", "eq", wanted.agent))
    if wanted.state is not None:
        where.append(Where("state", "eq", wanted.state.value))
    if wanted.type is not None:
        where.append(Where("type", "eq", wanted.type))
    scope = "tasks/oldest" if wanted.oldest_first else "tasks"
    after = None if cursor is None else decode_cursor(scope, cursor, 1)
    items: list[TaskView] = []
    scanned = 0
    lead, rest = await narrowed(store, where)
    while True:
        asked = max(limit + 1, _STEPS[scanned > 0]) if wanted.labels or rest else limit + 1
        rows = await store.find("task", Query(where=lead, descending=not wanted.oldest_first, after=after, limit=asked))
        for place, entity in enumerate(rows):
            if not fulfils(entity, rest):
                continue
            task = readable(entity)
            if (
                task is None
                or task.tenant != tenant
                or any(task.labels.get(name) != value for name, value in wanted.labels.items())
            ):
                continue
            items.append(view(task, now))
            if len(items) == limit:
                more = place + 1 < len(rows) or len(rows) == asked
                return Page(items=items, next_cursor=encode_cursor(scope, [task.id]) if more else None)
        scanned += len(rows)
        if len(rows) < asked:
            return Page(items=items)
        after = [rows[-1].id]
        if scanned >= _SCANNED_MAX:
            return Page(items=items, next_cursor=encode_cursor(scope, after))
