"""What tasks take of an agent beside one slot each: weighted slots, cores, memory, GPUs. Counted here, decided by the leases in the store.

A task that asks for nothing special has no `Load`, and a session that holds none of the others has no `Account`: they pay nothing.
"""

from collections.abc import Mapping
from typing import Final, Literal

import msgspec

from mcp_control.agents.model import AgentSpec, Resources

Scarce = Literal["slots", "cpu", "memory_mb", "gpu"]
_NOTHING: Final = Resources()


class Load(msgspec.Struct, frozen=True, gc=False):
    """What one task takes. `cpu` is in thousandths of a core, so that sums are exact."""

    slots: int = 1
    cpu: int = 0
    memory_mb: int = 0
    gpu: int = 0


_SCARCE: Final[tuple[Scarce, ...]] = ("slots", "cpu", "memory_mb", "gpu")


def load_of(slots: int, resources: Resources) -> Load | None:
    """Return what a task takes; None where that is one slot and nothing else."""
    if slots == 1 and resources == _NOTHING:
        return None
    return Load(slots, round(resources.cpu * 1000), resources.memory_mb, resources.gpu)


def capacity(slots: int, resources: Resources) -> Load:
    """Return what an instance has in all."""
    return Load(slots, round(resources.cpu * 1000), resources.memory_mb, resources.gpu)


class Account:
    """What the tasks of one instance take. Taking or giving back the same task twice counts once.

    Attributes:
        extra: slots taken beyond one per task.
    """

    __slots__ = ("_cpu", "_gpu", "_loads", "_memory_mb", "extra")

    def __init__(self) -> None:
        self._loads: dict[str, Load] = {}
        self.extra = 0
        self._cpu = 0
        self._memory_mb = 0
        self._gpu = 0

    def take(self, task_id: str, load: Load) -> None:
        """Count what a task takes."""
        if task_id in self._loads:
            self.give(task_id)
        self._loads[task_id] = load
        self._add(load, 1)

    def give(self, task_id: str) -> Load | None:
        """Give back what a task took; returns it, None where it took nothing."""
        load = self._loads.pop(task_id, None)
        if load is not None:
            self._add(load, -1)
        return load

    def _add(self, load: Load, sign: int) -> None:
        self.extra += sign * (load.slots - 1)
        self._cpu += sign * load.cpu
        self._memory_mb += sign * load.memory_mb
        self._gpu += sign * load.gpu

    def take_over(self, other: "Account") -> None:
        """Count what another account of the same instance counts, too."""
        for task_id, load in other._loads.items():
            self.take(task_id, load)

    def loads(self) -> dict[str, Load]:
        """Return what is taken, by task."""
        return dict(self._loads)

    def left(self, there: Load) -> Load:
        """Return what is left of everything but slots."""
        return Load(there.slots, there.cpu - self._cpu, there.memory_mb - self._memory_mb, there.gpu - self._gpu)


class Types:
    """How many tasks of each type an instance holds whose agent limits some of them.

    A task that was there before the agent had limits may be of any type: until it ends it counts for each, so that no limit is exceeded.
    """

    __slots__ = ("_counts", "_types", "limits")

    def __init__(self, limits: Mapping[str, int]) -> None:
        self.limits = limits
        self._types: dict[str, str] = {}
        self._counts: dict[str, int] = {}

    def take(self, task_id: str, task_type: str) -> None:
        """Count a task; the same task twice counts once."""
        if task_id not in self._types:
            self._types[task_id] = task_type
            self._counts[task_type] = self._counts.get(task_type, 0) + 1

    def give(self, task_id: str) -> None:
        """Count a task no more."""
        task_type = self._types.pop(task_id, None)
        if task_type is not None:
            self._counts[task_type] -= 1
            if not self._counts[task_type]:
                del self._counts[task_type]

    def take_over(self, other: "Types") -> None:
        """Count what is counted for another session of the same instance, too."""
        for task_id, task_type in other._types.items():
            self.take(task_id, task_type)

    def left(self, task_type: str, held: int) -> int | None:
        """Return how many more tasks of a type it may have that holds so many tasks in all; None where the type has no limit."""
        limit = self.limits.get(task_type)
        if limit is None:
            return None
        unknown = max(0, held - len(self._types))
        return max(0, limit - self._counts.get(task_type, 0) - unknown)


def limits_of(spec: AgentSpec) -> dict[str, int]:
    """Return the types of which each instance of an agent takes only so many at once."""
    return {capability.name: capability.limit for capability in spec.capabilities if capability.limit is not None}


def fits(load: Load, left: Load) -> int:
    """Return how many tasks that take `load` fit into what is left."""
    least = left.slots // load.slots
    if load.cpu:
        least = min(least, left.cpu // load.cpu)
    if load.memory_mb:
        least = min(least, left.memory_mb // load.memory_mb)
    if load.gpu:
        least = min(least, left.gpu // load.gpu)
    return max(0, least)


def lacking(load: Load, left: Load) -> float:
    """Return how much is missing for a task that takes `load`, as the sum of the shares of it that are; 0 where it fits."""
    wanted = {name: float(getattr(load, name)) for name in _SCARCE}
    return sum(max(0.0, 1 - float(getattr(left, name)) / amount) for name, amount in wanted.items() if amount > 0)


def leaves(kept: Load, load: Load, left: Load) -> bool:
    """Say whether a task that takes `load` touches nothing of what is kept: enough of all it uses is left beyond that, for now."""
    return all(
        getattr(left, name) - taken >= getattr(kept, name) for name in _SCARCE if (taken := getattr(load, name)) > 0
    )


def short_of(load: Load, left: Load) -> Scarce | None:
    """Return the first thing of which too little is left for one more task; None where it fits."""
    for name in _SCARCE:
        if getattr(left, name) < getattr(load, name):
            return name
    return None


def amount(name: Scarce, load: Load) -> str:
    """Return how much of something that is, for people."""
    if name == "cpu":
        return f"{load.cpu / 1000:g} cpu"
    return {"slots": f"{load.slots} slots", "memory_mb": f"{load.memory_mb} MiB", "gpu": f"{load.gpu} gpu"}[name]
