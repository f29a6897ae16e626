"""The pipeline (P): techdeck over synthetic conversations, with one agent and with two."""

from pathlib import Path
from typing import Any, Final

from bench.stand import Usage, stand
from bench.statistics import Line, median
from mcp_control import AsyncClient
from mcp_control.techdeck.synthetic import generate

_SEED: Final = 7
_WAIT: Final = 900
_PIPELINE: Final = Path("src/mcp_control/techdeck/pipeline.yaml")


async def conversations(reps: int, rows: int) -> list[Line]:
    """P: seconds from the start of the run to its end, all six stages, agents with one slot and warm workers."""
    lines: list[Line] = []
    for agents in (1, 2):
        async with (
            stand("techdeck", agents=agents, slots=1) as there,
            AsyncClient(there.url, token=there.token) as client,
        ):
            warm, source = there.folder / "warm.jsonl", there.folder / "input.jsonl"
            generate(warm, seed=_SEED, n=200)
            truth = generate(source, seed=_SEED + 1, n=rows)
            await client.pipelines.apply(_PIPELINE)
            view = await _run(client, warm)
            usages: list[Usage] = []
            for _ in range(reps):
                with there.metered() as usage:
                    async with there.watched(usage):
                        view = await _run(client, source)
                usages.append(usage)
            stages = {
                stage.name: round((stage.finished_at - stage.started_at).total_seconds(), 2) for stage in view.stages
            }
            seconds = median(usage.seconds for usage in usages)
            lines.append(
                {
                    "bench": "P",
                    "rows": truth.rows,
                    "agents": agents,
                    "seconds": round(seconds, 2),
                    "rows_per_s": round(truth.rows / seconds),
                    "input_mb": round(source.stat().st_size / (1 << 20), 1),
                    "stages_s": stages,
                    "server_rss_mb": round(max(usage.server_rss_mb for usage in usages)),
                    "agents_rss_mb": round(max(usage.agent_rss_mb for usage in usages)),
                    "server_cpu_s": round(median(usage.server_cpu for usage in usages), 2),
                    "agent_cpu_s": round(median(usage.agent_cpu for usage in usages), 2),
                    "runs": [round(usage.seconds, 2) for usage in usages],
                }
            )
    return lines


async def _run(client: AsyncClient, source: Path) -> Any:
    artifact = await client.artifacts.upload(source, source.name, role="input")
    run = await client.pipelines.run("techdeck", {"input": artifact.id, "quality": {"gate": "warn"}})
    return await run.result(_WAIT)
