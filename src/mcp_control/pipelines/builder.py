"""Definitions written in Python. Imports models only, so that the SDK can offer it."""

import json
import re
from collections.abc import Mapping, Sequence

import msgspec

from mcp_control.pipelines.definition_model import (
    NO_NEEDS,
    Body,
    Cache,
    Combine,
    FanOut,
    Gate,
    Metadata,
    Mode,
    PipelineSpec,
    RunWhen,
    Stage,
)
from mcp_control.pipelines.input_model import Approval, Compensate, Param, WaitFor
from mcp_control.tasks.budget_model import Budget
from mcp_control.tasks.model import Needs, RetryPolicy


class StageHandle:
    """A stage in the making: name it in `needs` of later ones, put `output` into their `with_`."""

    __slots__ = ("id",)

    def __init__(self, id: str) -> None:
        self.id = id

    @property
    def output(self) -> str:
        """The expression for the whole output of the stage."""
        return self.field()

    def field(self, *path: str | int) -> str:
        """Return the expression for a part of the output, e.g. `field("artifact", "id")`."""
        steps = "".join(f"[{json.dumps(step)}]" for step in path)
        head = f"stages.{self.id}" if re.fullmatch(r"[A-Za-z_]\w*", self.id) else f"stages[{json.dumps(self.id)}]"
        return "${{ " + head + ".output" + steps + " }}"


class PipelineBuilder:
    """A definition written in Python.

    ::

        p = PipelineBuilder("nightly")
        source = p.param("source")
        raw = p.stage("ingest", "dataset.ingest", with_={"url": source})
        p.stage("report", "dataset.report", needs=[raw], with_={"data": raw.output})
        spec = p.build()
    """

    def __init__(
        self,
        name: str,
        *,
        description: str = "",
        labels: Mapping[str, str] | None = None,
        priority: int = 50,
        deadline_seconds: float | None = None,
        max_running: int | None = None,
        budget: Budget | None = None,
        mode: Mode = "concurrent",
        outputs: Mapping[str, object] | None = None,
        rerun: Mapping[str, object] | None = None,
    ) -> None:
        self._metadata = Metadata(name=name, description=description, labels=dict(labels or {}))
        self._stages: list[Stage] = []
        self._params: dict[str, Param] = {}
        self._priority = priority
        self._deadline_seconds = deadline_seconds
        self._max_running = max_running
        self._budget = budget
        self._mode = mode
        self._outputs = dict(outputs or {})
        self._rerun = dict(rerun or {})

    def param(
        self,
        name: str,
        type: str = "string",
        *,
        required: bool = True,
        default: object = msgspec.UNSET,
        choices: Sequence[object] = (),
        description: str = "",
    ) -> str:
        """Declare a parameter and return the expression for its value. One with a default need not be given."""
        data: dict[str, object] = {
            "type": type,
            "required": required,
            "description": description,
            "choices": list(choices),
        }
        if default is not msgspec.UNSET:
            data["default"] = default
        self._params[name] = msgspec.convert(data, Param)
        return "${{ params." + name + " }}"

    def stage(
        self,
        id: str,
        uses: str,
        *,
        with_: Mapping[str, object] | None = None,
        needs: Sequence[StageHandle | str] = (),
        version: str = "*",
        fan_out: FanOut | str | None = None,
        combine: Combine | str | None = None,
        when: str | None = None,
        run_when: RunWhen = "all_completed",
        gate: Gate | str | None = None,
        compensate: Compensate | str | None = None,
        retry: RetryPolicy | None = None,
        timeout: float | None = None,
        deadline_seconds: float | None = None,
        cache_seconds: float | None = None,
        requires: Needs = NO_NEEDS,
        priority: int | None = None,
        description: str = "",
    ) -> StageHandle:
        """Add a stage. `fan_out` may be the expression for the list, `combine` and `compensate` the task type, `gate` the condition."""
        if isinstance(fan_out, str):
            fan_out = FanOut(
                over=_bare(fan_out), combine=Combine(uses=combine) if isinstance(combine, str) else combine
            )
        self._stages.append(
            Stage(
                id=id,
                uses=uses,
                version=version,
                needs=[need.id if isinstance(need, StageHandle) else need for need in needs],
                with_=dict(with_ or {}),
                when=None if when is None else _bare(when),
                run_when=run_when,
                fan_out=fan_out,
                gate=Gate(check=_bare(gate)) if isinstance(gate, str) else gate,
                compensate=Compensate(uses=compensate) if isinstance(compensate, str) else compensate,
                retry=retry,
                timeout=timeout,
                deadline_seconds=deadline_seconds,
                cache=None if cache_seconds is None else Cache(seconds=cache_seconds),
                requires=requires,
                priority=priority,
                description=description,
            )
        )
        return StageHandle(id)

    def approval(
        self,
        id: str,
        title: str,
        *,
        message: str = "",
        options: Sequence[str] = ("approve", "reject"),
        stop_on: Sequence[str] | None = None,
        assignees: Sequence[str] = (),
        roles: Sequence[str] = (),
        fields: Mapping[str, Param] | None = None,
        timeout_seconds: float | None = None,
        default: str | None = None,
        needs: Sequence[StageHandle | str] = (),
        when: str | None = None,
        run_when: RunWhen = "all_completed",
        gate: Gate | str | None = None,
        description: str = "",
    ) -> StageHandle:
        """Add a stage that asks people; its output has `option`, `fields`, `comment`, `by` and `at`. See `Approval`."""
        asks = Approval(
            title=title,
            message=message,
            options=list(options),
            stop_on=None if stop_on is None else list(stop_on),
            assignees=list(assignees),
            roles=list(roles),
            fields=dict(fields or {}),
            timeout_seconds=timeout_seconds,
            default=default,
        )
        return self._waiting(id, needs, when, run_when, gate, description, approval=asks)

    def wait_for(
        self,
        id: str,
        signal: str,
        *,
        match: str | None = None,
        timeout_seconds: float | None = None,
        default: object = msgspec.UNSET,
        needs: Sequence[StageHandle | str] = (),
        when: str | None = None,
        run_when: RunWhen = "all_completed",
        gate: Gate | str | None = None,
        description: str = "",
    ) -> StageHandle:
        """Add a stage that waits for a signal; its output has `body`, `name`, `by` and `at`. See `WaitFor`."""
        match = None if match is None else _bare(match)
        wait = WaitFor(signal=signal, match=match, timeout_seconds=timeout_seconds, default=default)
        return self._waiting(id, needs, when, run_when, gate, description, wait_for=wait)

    def _waiting(
        self,
        id: str,
        needs: Sequence[StageHandle | str],
        when: str | None,
        run_when: RunWhen,
        gate: Gate | str | None,
        description: str,
        *,
        approval: Approval | None = None,
        wait_for: WaitFor | None = None,
    ) -> StageHandle:
        self._stages.append(
            Stage(
                id=id,
                needs=[need.id if isinstance(need, StageHandle) else need for need in needs],
                when=None if when is None else _bare(when),
                run_when=run_when,
                gate=Gate(check=_bare(gate)) if isinstance(gate, str) else gate,
                approval=approval,
                wait_for=wait_for,
                description=description,
            )
        )
        return StageHandle(id)

    def output(self, name: str, value: object) -> None:
        """Give a value to whoever has the pipeline run, e.g. the output of a stage."""
        self._outputs[name] = value

    def build(self) -> PipelineSpec:
        """Return the definition. The server validates it when it is created."""
        return PipelineSpec(
            metadata=self._metadata,
            spec=Body(
                stages=list(self._stages),
                params=dict(self._params),
                priority=self._priority,
                deadline_seconds=self._deadline_seconds,
                max_running=self._max_running,
                budget=self._budget,
                mode=self._mode,
                outputs=dict(self._outputs),
                rerun=dict(self._rerun),
            ),
        )


def _bare(expression: str) -> str:
    text = expression.strip()
    return text[3:-2].strip() if text.startswith("${{") and text.endswith("}}") else text
