"""Runs that ended long ago go, and nothing of them stays behind."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mcp_control.artifacts.service import ArtifactFilter, Artifacts, NewArtifact
from mcp_control.kernel.errors import NotFound
from mcp_control.pipelines.builder import PipelineBuilder
from mcp_control.pipelines.definition_model import PipelineSpec
from mcp_control.pipelines.model import StageState
from mcp_control.pipelines.retention import RunRetention
from mcp_control.storage.local.blobs import FolderBlobs
from tests.pipelines.world import ANNA, world


def one_stage() -> PipelineSpec:
    """The smallest pipeline."""
    p = PipelineBuilder("small")
    p.stage("a", "work")
    return p.build()


async def some_bytes(content: bytes) -> AsyncIterator[bytes]:
    """A stream of one chunk."""
    yield content


async def test_ended_runs_go_with_their_artifacts(tmp_path: Path) -> None:
    """Runs that ended before the moment go with the files they made; running ones and what belongs to no run stay."""
    async with world(tmp_path / "store") as here:
        blobs = tmp_path / "blobs"
        artifacts = Artifacts(here.store, FolderBlobs(blobs), here.clock, here.ids, max_bytes=1 << 20)
        retention = RunRetention(here.store, artifacts, keep_ms=1000)
        old, live = await here.start(one_stage()), await here.start(one_stage())
        for owner in (old.id, old.id, live.id, None):
            new = NewArtifact(name="rows", role="output", run_id=owner)
            await artifacts.upload(ANNA, new, some_bytes(str(owner).encode()))
        await here.finish(await here.tasks(old))
        assert await retention.once(here.clock.now()) == 0
        here.clock.advance(10)
        assert await retention.once(here.clock.now()) == 1
        with pytest.raises(NotFound):
            await here.engine.run(ANNA, old.id)
        assert (await here.run(live)).stages[0].state is StageState.RUNNING
        kept = (await artifacts.list(ANNA, ArtifactFilter())).items
        assert sorted(str(artifact.run_id) for artifact in kept) == sorted([live.id, "None"])
        assert await retention.once(here.clock.now()) == 0
