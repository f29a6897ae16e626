"""A run over what an earlier one set aside: its parameters follow from the earlier run as the definition says."""

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from mcp_control.kernel.errors import Invalid, InvalidPipeline, InvalidTransition
from mcp_control.pipelines.builder import PipelineBuilder
from mcp_control.pipelines.definition_model import PipelineSpec
from mcp_control.pipelines.input_model import RerunRequest
from mcp_control.pipelines.rerunning import Reruns
from mcp_control.pipelines.validate import validate
from tests.pipelines.world import ANNA, ORIGIN, World, world


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


def sorting(**rerun: object) -> PipelineSpec:
    p = PipelineBuilder("sorting", rerun=rerun)
    source = p.param("source")
    p.param("mode", default="strict")
    p.param("only", "array", default=[])
    p.stage("sort", "work", with_={"source": source, "only": "${{ params.only }}", "mode": "${{ params.mode }}"})
    return p.build()


RERUN = {
    "source": "${{ run.fixed == null ? params.source : run.fixed }}",
    "only": "${{ stages.sort.output.rejected }}",
}


async def test_the_new_run_works_on_what_was_set_aside(here: World) -> None:
    """It has the earlier one's parameters but for those that the definition and the caller name, and says which run it repeats."""
    run = await here.start(sorting(**RERUN), source="art_a", mode="loose")
    reruns = Reruns(here.engine)
    with pytest.raises(InvalidTransition):
        await reruns.start(ANNA, run.id, RerunRequest(), ORIGIN)
    await here.finish(await here.tasks(run), {"rejected": [3, 7]})
    again, created = await reruns.start(ANNA, run.id, RerunRequest(idempotency_key="k"), ORIGIN)
    assert created
    assert again.labels == {"rerun_of": run.id}
    assert await here.payload((await here.tasks(again))[0]) == {"source": "art_a", "only": [3, 7], "mode": "loose"}
    same, created = await reruns.start(ANNA, run.id, RerunRequest(idempotency_key="k"), ORIGIN)
    assert (same.id, created) == (again.id, False)
    changed = {"mode": msgspec.Raw(b'"any"')}
    fixed, _ = await reruns.start(ANNA, run.id, RerunRequest(fixed="art_b", params=changed), ORIGIN)
    assert await here.payload((await here.tasks(fixed))[0]) == {"source": "art_b", "only": [3, 7], "mode": "any"}


async def test_a_run_that_cannot_be_repeated_so_says_why(here: World) -> None:
    """A pipeline that does not say how, a run without the output, an output without the field."""
    reruns = Reruns(here.engine)
    silent = await here.start(sorting(), source="a")
    await here.finish(await here.tasks(silent))
    early = await here.start(sorting(**RERUN), source="a")
    await here.engine.cancel(ANNA, early.id)
    await here.settled()
    other = await here.start(sorting(**RERUN), source="a")
    await here.finish(await here.tasks(other), {})
    for run, code in ((silent, "no-effect"), (early, "unknown-reference"), (other, "expression-invalid")):
        with pytest.raises(Invalid) as refused:
            await reruns.start(ANNA, run.id, RerunRequest(), ORIGIN)
        assert [error.code for error in refused.value.errors] == [code]


def test_parameters_of_a_rerun_are_checked_with_the_definition() -> None:
    """A name that is no parameter, and an expression over a stage that is not there."""
    with pytest.raises(InvalidPipeline) as refused:
        validate(sorting(colour="red", only="${{ stages.nowhere.output }}"))
    assert [(error.pointer, error.code) for error in refused.value.errors] == [
        ("#/spec/rerun/only", "unknown-reference"),
        ("#/spec/rerun", "unknown-reference"),
    ]
