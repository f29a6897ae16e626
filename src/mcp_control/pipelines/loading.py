"""What a decision on a run needs beside the run document, loaded when it is missed."""

from typing import Final

import msgspec

from mcp_control.pipelines.counting import child_id, failure_of, items_in, task_id
from mcp_control.pipelines.decision import Material, Missing
from mcp_control.pipelines.model import Run, RunState
from mcp_control.pipelines.plan import Plan
from mcp_control.pipelines.records import read_run
from mcp_control.pipelines.results import StageResults
from mcp_control.storage.ports import Store
from mcp_control.tasks.model import TaskState
from mcp_control.tasks.records import read as read_task

_FETCHED_AT_ONCE: Final = 500
_taken: Final = msgspec.json.Decoder(dict[int, msgspec.Raw]).decode
_params: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Loader:
    """Loads parameters, outputs, results of items and signals into a run's material."""

    def __init__(self, store: Store, kept: StageResults | None = None) -> None:
        self._store = store
        self._kept = kept

    async def fetch(self, plan: Plan, material: Material, run: Run, missing: Missing) -> None:
        """Load what was missed. Raises LookupError when it is not stored, StoreUnavailable and the like."""
        if missing.results is not None:
            await self._results(plan, material, run, missing.results)
            return
        if missing.kept:
            # Nothing depends on what is kept: where it cannot be looked up, it is computed.
            material.kept.update(
                dict.fromkeys(missing.kept) if self._kept is None else await self._kept.find(missing.kept)
            )
            return
        if missing.signal is not None:
            await self._signals(material, run, missing.signal)
            return
        wanted = ["params"] if missing.params else [f"output/{missing.output}"]
        if material.params is None and not missing.params:
            wanted.append("params")
        entity = (await self._store.get("run", [run.id], wanted))[0]
        cold = {} if entity is None else entity.cold
        if "params" in wanted:
            material.params = _params(cold.get("params", b"{}"))
        if missing.output is not None:
            if f"output/{missing.output}" not in cold:
                raise LookupError(f"the output of stage {missing.output} is not stored")
            material.outputs[missing.output] = cold[f"output/{missing.output}"]

    async def _signals(self, material: Material, run: Run, name: str) -> None:
        wanted = [each.id for each in run.signals if each.name == name and each.stage is None]
        entity = (await self._store.get("run", [run.id], [f"signal/{each}" for each in wanted]))[0]
        for each in wanted:
            if entity is None or f"signal/{each}" not in entity.cold:
                raise LookupError(f"the signal {each} is not stored")
            material.signals[each] = entity.cold[f"signal/{each}"]

    async def _results(self, plan: Plan, material: Material, run: Run, place: int) -> None:
        """Load the results of items that are not in memory, newest round first: a retry keeps those of earlier rounds."""
        stage = run.stages[place]
        results = material.results.setdefault(stage.id, {})
        ended = int.from_bytes(stage.ended, "little")  # what ends in this very decision is with its finished tasks
        items = range(items_in(plan.stages[place], stage))
        left = [item for item in items if ended >> item & 1 and item not in results]
        if stage.cached:
            name = f"kept/{stage.id}"
            entity = (await self._store.get("run", [run.id], (name,)))[0]
            taken = {} if entity is None else _taken(entity.cold.get(name, b"{}"))
            results.update((item, taken[item]) for item in left if item in taken)
            left = [item for item in left if item not in results]
            if not left:
                return
        bad = int.from_bytes(stage.bad, "little")
        for number in range(stage.round, stage.since - 1, -1):
            for some in (left[at : at + _FETCHED_AT_ONCE] for at in range(0, len(left), _FETCHED_AT_ONCE)):
                if plan.stages[place].nested is not None:
                    ids = [child_id(run.id, stage, item) for item in some]
                    for item, entity in zip(some, await self._store.get("run", ids, ("result",)), strict=True):
                        if entity is not None:
                            results[item] = _inner_result(read_run(entity), item, entity.cold.get("result"))
                    continue
                ids = [task_id(run.id, stage.id, item, number) for item in some]
                for item, entity in zip(some, await self._store.get("task", ids, ("result",)), strict=True):
                    if entity is None:
                        continue
                    task = read_task(entity)
                    if task.state is TaskState.COMPLETED:
                        results[item] = entity.cold.get("result", b"null")
                    elif bad >> item & 1 and number == stage.round:
                        results[item] = failure_of(task, item)
            left = [item for item in left if item not in results]
            if not left:
                return
        raise LookupError(f"results of stage {stage.id} are no longer stored")


def _inner_result(inner: Run, item: int, output: bytes | None) -> bytes:
    if inner.state is RunState.COMPLETED:
        return b"null" if output is None else output
    told = {"index": item, "state": inner.state.value, "reason": inner.reason, "message": inner.message[:500]}
    return msgspec.json.encode(told)
