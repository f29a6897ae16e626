"""Keeping results of tasks for later runs with the same input. What cannot be kept or found is computed: nothing depends on it."""

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Final

import msgspec

from mcp_control.agents.matching import Demand, misfit
from mcp_control.agents.model import Agent
from mcp_control.kernel.background import Background
from mcp_control.kernel.changes import Change, Entity, Key, Query, Where
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import Conflict
from mcp_control.pipelines.control import as_millis
from mcp_control.pipelines.forecast import demand_of
from mcp_control.pipelines.plan import Plan
from mcp_control.pipelines.result_model import STAGE_RESULT_KIND, StageResult, combine_of, key_of
from mcp_control.storage.ports import Store
from mcp_control.tasks.model import TaskState
from mcp_control.tasks.records import read as read_task

_AT_ONCE: Final = 200
_NAME: Final = STAGE_RESULT_KIND.name
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(StageResult).decode


class StageResults:
    """Finds and keeps results.

    Args:
        agents: returns the agents of a tenant.
        keep_ms: how long an ended run is kept; a run that used a result of another holds it for twice as long.

    Attributes:
        background: where results are kept; its owner closes it.
    """

    def __init__(self, store: Store, clock: Clock, agents: Callable[[str], Sequence[Agent]], keep_ms: int) -> None:
        self._store = store
        self._clock = clock
        self._agents = agents
        self._keep_ms = keep_ms
        self.background = Background("results")

    def codes(self, tenant: str, plan: Plan) -> dict[str, tuple[str, ...]]:
        """Return by stage, and by `combine_of` it, which versions of its code agents declare; stages with a cache alone are looked at."""
        agents = self._agents(tenant)
        found: dict[str, tuple[str, ...]] = {}
        for place in plan.cached:
            stage = plan.stages[place].stage
            found[stage.id] = _versions(agents, demand_of(stage))
            if stage.fan_out is not None and stage.fan_out.combine is not None:
                found[combine_of(stage.id)] = _versions(agents, demand_of(stage, stage.fan_out.combine.uses))
        return found

    async def find(self, keys: Sequence[str]) -> dict[str, bytes | None]:
        """Return results by key, None where there is none."""
        now = self._clock.now()
        found: dict[str, bytes | None] = {}
        for at in range(0, len(keys), _AT_ONCE):
            some = keys[at : at + _AT_ONCE]
            for key, row in zip(some, await self._store.get(_NAME, some, ("result",)), strict=True):
                valid = row is not None and _decode(row.hot).until > now
                found[key] = row.cold.get("result") if row is not None and valid else None
        return found

    def later(self, tenant: str, plan: Plan, run_id: str, done: Sequence[str], used: Sequence[str]) -> None:
        """Keep the results of these tasks, and hold the runs whose results were used, when there is time for it."""
        if done:
            self.background.begin(self._keep(tenant, plan, done))
        if used:
            self.background.begin(self._hold(run_id, used))

    async def _keep(self, tenant: str, plan: Plan, done: Sequence[str]) -> None:
        codes = {
            (agent.id, each.name): each.version for agent in self._agents(tenant) for each in agent.spec.capabilities
        }
        for at in range(0, len(done), _AT_ONCE):
            rows = await self._store.get("task", done[at : at + _AT_ONCE], ("payload", "result"))
            await self._write(
                [
                    row
                    for each in rows
                    if each is not None and (row := self._kept(tenant, plan, each, codes)) is not None
                ]
            )

    def _kept(self, tenant: str, plan: Plan, row: Entity, codes: Mapping[tuple[str, str], str]) -> Entity | None:
        task = read_task(row)
        stage = plan.stages[plan.place_of[task.links.stage or ""]].stage
        lease = task.last_lease
        code = None if lease is None else codes.get((lease.agent_id, task.type))
        if task.state is not TaskState.COMPLETED or stage.cache is None or code is None or task.emptied_at is not None:
            return None
        key = key_of(tenant, task.type, task.type_version, code, row.cold.get("payload", b"null"))
        until = self._clock.now() + as_millis(stage.cache.seconds)
        return _entity(key, task.links.run_id or "", until, row.cold.get("result", b"null"))

    async def _hold(self, run_id: str, used: Sequence[str]) -> None:
        rows = await self._store.get(_NAME, list(used))
        origins = {_decode(row.hot).run_id for row in rows if row is not None}
        until = self._clock.now() + 2 * self._keep_ms
        await self._write(
            [
                _entity(f"hold_{sha256(f'{origin} {run_id}'.encode()).hexdigest()}", origin, until, None)
                for origin in sorted(origins)
            ]
        )

    async def _write(self, entities: Sequence[Entity]) -> None:
        """Write these over whatever is there; one that somebody else writes at the same time is left to them."""
        outcomes = await self._store.commit([Change([each]) for each in entities]) if entities else []
        there = [each for each, problem in zip(entities, outcomes, strict=True) if isinstance(problem, Conflict)]
        rows = await self._store.get(_NAME, [each.id for each in there]) if there else []
        over = [
            Change([msgspec.structs.replace(each, version=row.version)])
            for each, row in zip(there, rows, strict=True)
            if row is not None
        ]
        if over:
            await self._store.commit(over)


class ResultRetention:
    """Removes results that are over their time, a bounded batch at once."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def once(self, now: int) -> int:
        """Remove one batch; returns how many results that were."""
        rows = await self._store.find(_NAME, Query(where=[Where("until", "lt", now)], order="until", limit=_AT_ONCE))
        outcomes = (
            await self._store.commit([Change((), [Key(_NAME, row.id, row.version)]) for row in rows]) if rows else []
        )
        return sum(outcome is None for outcome in outcomes)


async def held(store: Store, runs: Sequence[str]) -> set[str]:
    """Return which of these runs a result is kept of, or another run needs."""
    if not await store.find(_NAME, Query(limit=1)):
        return set()
    found = set[str]()
    for run_id in runs:
        if await store.find(_NAME, Query(where=[Where("run", "eq", run_id)], limit=1)):
            found.add(run_id)
    return found


def _versions(agents: Sequence[Agent], demand: Demand) -> tuple[str, ...]:
    """Return the versions of the code in which agents offer what is asked."""
    versions = {
        each.version
        for agent in agents
        if misfit(agent.id, agent.spec, demand) is None
        for each in agent.spec.capabilities
        if each.name == demand.type
    }
    return tuple(sorted(versions))


def _entity(key: str, run_id: str, until: int, result: bytes | None) -> Entity:
    hot = _encode(StageResult(id=key, run_id=run_id, until=until))
    return Entity(_NAME, key, 0, {"run": run_id, "until": until}, hot, {} if result is None else {"result": result})
