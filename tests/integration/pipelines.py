"""The made-up pipeline of these tests: a fan-out with artifacts whose bytes the parameters alone decide."""

from typing import Any

import httpx2

from mcp_control.pipelines.builder import PipelineBuilder
from mcp_control.pipelines.definition_model import Combine, FanOut, PipelineSpec
from mcp_control.tasks.model import RetryPolicy
from tests.integration.support import API, until

_PATIENT = RetryPolicy(max_attempts=20, first_seconds=0.05, longest_seconds=0.2)


def parts_pipeline() -> PipelineSpec:
    """Split, make each part, join them, write the last file."""
    p = PipelineBuilder("parts")
    seed = p.param("seed")
    parts = p.param("parts", "integer")
    split = p.stage("split", "it.split", with_={"seed": seed, "parts": parts, "blocks": 8}, retry=_PATIENT)
    made = p.stage(
        "make",
        "it.make",
        needs=[split],
        with_={"seed": "${{ item.seed }}", "part": "${{ item.part }}", "blocks": "${{ item.blocks }}"},
        fan_out=FanOut(
            over="stages.split.output.parts",
            combine=Combine(uses="it.join", with_={"items": "${{ items }}"}, retry=_PATIENT),
        ),
        retry=_PATIENT,
    )
    p.stage("final", "it.final", needs=[made], with_={"joined": made.field("artifact")}, retry=_PATIENT)
    return p.build()


async def started(client: httpx2.AsyncClient, pipeline: str, params: dict[str, Any], key: str) -> str:
    """Start a run and return its id."""
    answer = await client.post(
        f"{API}/pipelines/{pipeline}/execute", json={"params": params}, headers={"Idempotency-Key": key}
    )
    assert answer.status_code in (200, 201), answer.text
    run_id: str = answer.json()["id"]
    return run_id


async def run_view(client: httpx2.AsyncClient, run_id: str) -> dict[str, Any]:
    """Return a run as it is."""
    answer = await client.get(f"{API}/runs/{run_id}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def completed(client: httpx2.AsyncClient, run_id: str, seconds: float) -> dict[str, Any]:
    """Wait until a run has completed."""

    async def ended() -> dict[str, Any] | None:
        found = await run_view(client, run_id)
        return found if found["state"] in ("completed", "failed", "cancelled") else None

    found = await until(ended, seconds, f"the end of {run_id}")
    assert found is not None
    assert found["state"] == "completed", (found["state"], found["reason"], found["message"])
    return found


async def checksums(client: httpx2.AsyncClient, run_id: str) -> dict[str, str]:
    """Return the artifacts of a run that count, by name: the outputs of its stages."""
    answer = await client.get(f"{API}/runs/{run_id}/artifacts", params={"limit": 500})
    assert answer.status_code == 200, answer.text
    return {item["name"]: item["sha256"] for item in answer.json()["items"] if item["role"] in ("output", "report")}


async def outputs(client: httpx2.AsyncClient, run_id: str) -> dict[str, str]:
    """Return the checksums that the outputs of the stages name."""
    named = {}
    for stage in ("make", "final"):
        answer = await client.get(f"{API}/runs/{run_id}/stages/{stage}/output")
        assert answer.status_code == 200, answer.text
        named[stage] = answer.json()["sha256"]
    return named
