"""Lists of runs."""

from typing import Final

from mcp_control.kernel.changes import Query, Where
from mcp_control.kernel.paging import Page, decode_cursor, encode_cursor
from mcp_control.pipelines.model import RunState
from mcp_control.pipelines.plan import off_loop
from mcp_control.pipelines.records import read_run, run_view
from mcp_control.pipelines.runs import Plans
from mcp_control.pipelines.view_model import RunView
from mcp_control.storage.ports import Store

_SCANNED_MAX: Final = 5000


async def page(
    store: Store,
    plans: Plans,
    tenant: str,
    now: int,
    state: RunState | None,
    pipeline: str | None,
    cursor: str | None,
    limit: int,
    oldest_first: bool,
) -> Page[RunView]:
    """Return a page of a tenant's runs for which all conditions given hold (`pipeline` is a name), newest first unless asked otherwise."""
    where: list[Where] = []
    if pipeline is not None:
        where.append(Where("pipeline", "eq", pipeline))
    if state is not None:
        where.append(Where("state", "eq", state.value))
    scope = "runs/oldest" if oldest_first else "runs"
    after = None if cursor is None else decode_cursor(scope, cursor, 1)
    items: list[RunView] = []
    for _ in range(_SCANNED_MAX // (limit + 1) + 1):
        query = Query(where=where, descending=not oldest_first, after=after, limit=limit + 1)
        rows = await store.find("run", query)
        for row in rows:
            run = read_run(row)
            if run.tenant != tenant:
                continue
            if len(items) == limit:
                return Page(items=items, next_cursor=encode_cursor(scope, [items[-1].id]))
            plan = await plans.load(run.pipeline_id)
            items.append(await off_loop(plan.spec, run_view, run, plan, now))
        if len(rows) <= limit:
            return Page(items=items)
        after = [rows[-1].id]
    return Page(items=items, next_cursor=encode_cursor(scope, after or []))
