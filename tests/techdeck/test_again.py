"""Running again what a run set aside, over a real server: only those rows, or their corrected form, as a run that names the earlier one."""

import json
from pathlib import Path
from typing import Any

import orjson
import pytest

from mcp_control.sdk.errors import ApiProblem
from mcp_control.sdk.runs import AsyncRunHandle
from tests.techdeck.test_pipeline import _digests, _panel, _run, _source


async def _outputs(run: AsyncRunHandle) -> dict[str, Any]:
    await run.wait(timeout=90)
    return {stage: await run.output(stage) for stage in ("ingestion", "validation", "quality_assessment")}


async def test_only_what_was_set_aside_goes_through_again(tmp_path: Path) -> None:
    """The rows of the new run are those rejected before; twice the same gives the same bytes, and it names the earlier run."""
    source, truth = _source(tmp_path)
    options: dict[str, Any] = {"gate": "off"}
    async with _panel(tmp_path / "server") as client:
        first = await _run(client, source, quality=options, ingest={"partition_bytes": 60_000})
        again = await first.rerun_rejected(key="once")
        assert (await first.rerun_rejected(key="once")).id == again.id
        found = await _outputs(again)
        view = await again.get()
        assert (view.labels["rerun_of"], view.pipeline_version) == (first.id, (await first.get()).pipeline_version)
        rejected = {item.row for item in truth.rejects}
        assert found["ingestion"]["counts"]["rows_in"] == len(rejected)
        assert (await first.output("ingestion"))["counts"]["rows_in"] > len(rejected)
        quarantine = (await client.artifacts.read(found["quality_assessment"]["quarantine"])).splitlines()
        assert {row["row"] for row in map(json.loads, quarantine)} == rejected
        other = await first.rerun_rejected()
        await other.wait(timeout=90)
        assert await _digests(other) == await _digests(again)


async def test_corrected_records_are_read_in_their_place(tmp_path: Path) -> None:
    """A file with corrected records goes through all stages; the manifest of what is exported names the run that set them aside."""
    source, _ = _source(tmp_path)
    fixed = tmp_path / "fixed.jsonl"
    words = ("apples", "pears", "plums", "cherries", "quinces")
    with fixed.open("wb") as file:
        for word in words:
            turns = [{"role": "user", "content": f"Where do {word} grow best?"}]
            turns.append({"role": "assistant", "content": f"Most {word} like sun, some rain, and a gardener."})
            file.write(orjson.dumps({"messages": turns}) + b"\n")
    async with _panel(tmp_path / "server") as client:
        first = await _run(client, source, quality={"gate": "off"})
        upload = await client.artifacts.upload(fixed, role="input")
        again = await first.rerun_rejected(fixed=upload.id, params={"export": {"format": "chatml"}})
        view = await again.wait(timeout=90)
        assert view.state == "completed", view.message
        assert (await again.output("ingestion"))["counts"]["rows_in"] == len(words)
        export = await again.output("export")
        (manifest,) = [one["artifact"] for one in export["files"] if one["name"] == "manifest.json"]
        assert orjson.loads(await client.artifacts.read(manifest))["rerun_of"] == first.id
        running = await client.pipelines.run("techdeck", {"input": upload.id})
        with pytest.raises(ApiProblem):
            await client.runs.handle("run_" + "0" * 36).rerun_rejected()
        await running.wait(timeout=90)
