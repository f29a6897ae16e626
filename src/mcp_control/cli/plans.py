"""Forecasts and differences of pipelines, for people."""

import json
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mcp_control.cli.output import safe, say, tabbed, table

if TYPE_CHECKING:
    from mcp_control.pipelines.plan_model import RunPlan, StagePlan

HEAD = ("STAGE", "USES", "AGENTS", "TASKS", "P50", "P90", "BEGINS", "ENDS", "CRITICAL", "NOTE")


def show(plan: "RunPlan") -> None:
    """Print a forecast: a line per stage, then what holds for the whole run."""
    lines = [_line(stage) for stage in plan.stages]
    if sys.stdout.isatty():
        table(HEAD, lines)
    else:
        tabbed(HEAD, lines)
    sys.stdout.flush()
    for warning in plan.warnings:
        say(f"warning: {warning}")
    least = "" if plan.known else "at least "
    if plan.p50 is None or plan.p90 is None:
        say("it cannot end as things are: see the stages without agents")
    else:
        say(f"forecast: {least}{_seconds(plan.p50)} if every task takes its p50, {least}{_seconds(plan.p90)} with p90")
    if plan.expected_finish is not None:
        say(f"expected finish: {plan.expected_finish.isoformat(timespec='seconds')}")
    if plan.waiting:
        say(f"counted in: {plan.waiting} tasks that wait already")
    say(f"critical path: {' > '.join(_shortened(plan.critical_path))}")
    if plan.one_more_agent is not None:
        more = plan.one_more_agent
        say(f"one more agent like {more.like} would save {_seconds(more.saves_seconds)}")


def _line(stage: "StagePlan") -> list[str]:
    waited = {"people": "people", "signal": "a signal", "run": f"a run of {stage.uses.partition(':')[2]}"}
    notes = [] if stage.history else ["no history"]
    if stage.waits_for is not None:
        notes = [f"waits for {waited[stage.waits_for]}: unknown"]
    if stage.tasks is None:
        notes.append("how many tasks is known in the run only")
    if stage.unable and not stage.able:
        notes.append("; ".join(stage.unable))
    agents = ",".join(stage.agents) + (f" +{stage.able - len(stage.agents)}" if stage.able > len(stage.agents) else "")
    # What is before a stage may take longer than is known, and then it begins later.
    least = ">=" if stage.at_least else ""
    moments = [_seconds(stage.p50), _seconds(stage.p90)]
    moments += ["-" if value is None else least + _seconds(value) for value in (stage.begins, stage.ends)]
    tasks = "?" if stage.tasks is None else str(stage.tasks)
    critical = "yes" if stage.critical else ""
    return [
        safe(cell)
        for cell in (
            stage.stage,
            stage.uses,
            agents or ("none" if stage.waits_for is None else "-"),
            tasks,
            *moments,
            critical,
            ", ".join(notes),
        )
    ]


def _shortened(path: list[str]) -> list[str]:
    return path if len(path) <= 12 else [*path[:6], "...", *path[-5:]]


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    if value < 60:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def changes(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a difference."""
    yield f"{safe(found['pipeline'])}: version {found['before']} to {found['after']}"
    if found["same"]:
        yield "  nothing changed"
    for field in found["fields"]:
        yield _change(field)
    for stage in found["removed"]:
        yield f"- stage {safe(stage)}"
    for stage in found["added"]:
        yield f"+ stage {safe(stage)}"
    for stage in found["changed"]:
        yield f"~ stage {safe(stage['stage'])}"
        for field in stage["fields"]:
            yield f"  {_change(field)}"
    if found["reordered"]:
        yield "~ the order of stages"


def _change(field: Mapping[str, Any]) -> str:
    place = safe(field["pointer"])
    if "before" not in field:
        return f"+ {place}: {_value(field['after'])}"
    if "after" not in field:
        return f"- {place}: {_value(field['before'])}"
    return f"~ {place}: {_value(field['before'])} -> {_value(field['after'])}"


def _value(value: object) -> str:
    return safe(json.dumps(value, ensure_ascii=False))
