"""Where the time of a cluster goes: a server sampled while tasks run, and what the database was asked for them."""

import asyncio
from typing import Final

from bench.cluster_loads import SLOTS, done
from bench.cluster_stand import Cluster, Databases, cluster, commands
from bench.profile import ATTACH_SECONDS, sampled, summary

_COUNTS: Final = (("batched", 10_000), ("single", 3_000))


def _asked(before: dict[str, float], after: dict[str, float], tasks: int, seconds: float) -> str:
    """Return what the primary did per task."""
    lines = [f"-- asked of the primary for each task, in {seconds:.1f} s"]
    grown = {name: after[name] - before.get(name, 0) for name in after}
    for name, count in sorted(grown.items(), key=lambda item: -item[1]):
        if count >= tasks / 1000:
            lines.append(f"{count / tasks:10.3f}  {name}")
    transactions = max(1.0, grown["transactions"])
    lines.append(f"{tasks / transactions:10.1f}  tasks for each transaction, of which each task takes part in three")
    return "\n".join(lines)


async def _one(there: Cluster, mode: str, tasks: int) -> str:
    await done(there, mode, tasks // 10)
    before = commands(there)
    with there.metered() as effort, sampled(there.first.server) as stacks:
        await asyncio.sleep(ATTACH_SECONDS)
        await done(there, mode, tasks)
    after = commands(there)
    seconds = effort.seconds - ATTACH_SECONDS
    sides = ", ".join(f"{side} {value:,.0f}" for side, value in effort.per_task(tasks).items())
    title = f"== T {mode}, one server: {tasks / seconds:,.0f} tasks/s, µs of processor time per task: {sides}"
    return "\n".join((title, summary(stacks, tasks), _asked(before, after, tasks, seconds), ""))


async def profiled(there: Databases) -> str:
    """Return where the time goes with one server, submitting in batches and one by one."""
    async with cluster(there, 1) as made:
        await made.first.start_agents("noop", 1, SLOTS)
        return "\n".join([await _one(made, mode, tasks) for mode, tasks in _COUNTS])
