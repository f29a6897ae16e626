"""A new run over what an earlier one set aside: the pipeline says how its parameters follow from the earlier run."""

from typing import Final

import msgspec

from mcp_control.expressions.programs import ExpressionError
from mcp_control.kernel.errors import FieldError, Invalid, NotFound
from mcp_control.pipelines.expressions import Scope
from mcp_control.pipelines.input_model import RerunRequest
from mcp_control.pipelines.model import Run, RunRequest
from mcp_control.pipelines.service import PipelineEngine
from mcp_control.pipelines.templates import Template
from mcp_control.pipelines.transitions import allow as allow_verb
from mcp_control.security.model import Actor
from mcp_control.tasks.model import Origin

LABEL: Final = "rerun_of"
_object: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Reruns:
    """Starts runs over what earlier ones set aside."""

    def __init__(self, engine: PipelineEngine) -> None:
        self._engine = engine

    async def start(self, actor: Actor, run_id: str, request: RerunRequest, origin: Origin) -> tuple[Run, bool]:
        """Start a run of the same version of the pipeline, with `rerun` of its definition as parameters; say whether it is new.

        The new run has the earlier one's parameters, labels and priority otherwise, and names it by the label `rerun_of`.

        Raises:
            NotFound: no such run, or the version of its pipeline was deleted.
            InvalidTransition: the run has not ended.
            Invalid: the pipeline does not say how, the run did not get far enough, or the parameters.
            IdempotencyKeyInvalid, IdempotencyMismatch: the key, or another request under the same key.
        """
        engine = self._engine
        run = await engine.run(actor, run_id)
        allow_verb("rerun_rejected", run)
        pipeline = await engine.get(actor, run.pipeline, run.pipeline_number)
        if not pipeline.spec.spec.rerun:
            raise _invalid(
                f"the pipeline `{run.pipeline}` does not say how what it set aside is run again", "no-effect"
            )
        template = Template(pipeline.spec.spec.rerun)
        outputs: dict[str, bytes] = {}
        for stage in template.stages:
            try:
                outputs[stage] = await engine.output(actor, run_id, stage)
            except NotFound as error:
                detail = f"stage `{stage}` has no output: the run did not get far enough"
                raise _invalid(detail, "unknown-reference") from error
        before = (await engine.view(actor, run)).params or {}
        about = {"id": run.id, "pipeline": run.pipeline, "version": run.pipeline_number, "round": run.round}
        scope = Scope(before, outputs.__getitem__, {**about, "fixed": request.fixed})
        try:
            params = _object(template.render(scope))
        except ExpressionError as error:
            raise _invalid(str(error), "expression-invalid") from error
        return await engine.execute(
            actor,
            run.pipeline,
            RunRequest(
                params={**before, **params, **request.params},
                version=run.pipeline_number,
                labels={**run.labels, LABEL: run.id},
                priority=run.priority,
                idempotency_key=request.idempotency_key,
            ),
            origin,
        )


def _invalid(detail: str, code: str) -> Invalid:
    return Invalid(detail, errors=[FieldError(pointer="#", code=code, detail=detail[:500])])
