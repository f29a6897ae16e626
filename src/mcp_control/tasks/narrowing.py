"""Several conditions on tasks at once: which of them leads through the tasks.

There is no index for every combination: each would cost every write. The indexes there are tell, by counting a little, of which condition
the fewest tasks are; its tasks are gone through, and the other conditions are looked at one by one (System R chose by selectivity, too:
Selinger et al. 1979).
"""

from collections.abc import Sequence
from typing import Final

from mcp_control.kernel.changes import Entity, Where
from mcp_control.storage.ports import Store

_FEW: Final = 1000  # counted at most: with so many, which one leads makes little difference to a page
_LEADING: Final = ("run", "agent", "group_id", "type")
_WITH_STATE: Final = ("group_id",)  # an index has both


async def narrowed(store: Store, where: Sequence[Where]) -> tuple[list[Where], list[Where]]:
    """Split conditions on tasks into those to ask the store for, through which one index leads, and the rest, see `fulfils`.

    Raises StoreUnavailable.
    """
    equal = {one.field: one for one in where if one.op == "eq"}
    leads = [
        [equal[name], *([equal["state"]] if name in _WITH_STATE and "state" in equal else [])]
        for name in _LEADING
        if name in equal
    ]
    if "state" in equal and not any(name in equal for name in _WITH_STATE):
        leads.append([equal["state"]])
    if len(leads) < 2:
        return [*where], []
    counts = [await store.count("task", lead, _FEW) for lead in leads]
    first = leads[counts.index(min(counts))]
    rest = [one for lead in leads for one in lead if one not in first]
    return [one for one in where if one not in rest], rest


def fulfils(entity: Entity, rest: Sequence[Where]) -> bool:
    """Say whether a stored task fulfils the conditions that were not asked for."""
    return all(entity.index.get(one.field) == one.value for one in rest)
