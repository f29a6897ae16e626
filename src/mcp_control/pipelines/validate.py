"""Is a definition acceptable? Everything that is wrong with it at once, at most 50 places; pure.

Codes: `dag-cycle` (self-edges too), `dag-unknown-node` (unknown or duplicate stage), `limit-exceeded` (more than 10,000 stages, or more
than 100 in a row), `expression-invalid`, `unknown-reference`, `out-of-range` and those of names and labels.
"""

import re
from collections.abc import Collection, Iterator
from graphlib import CycleError, TopologicalSorter
from typing import Final

import msgspec

from mcp_control.expressions.programs import ExpressionError
from mcp_control.kernel.errors import FieldError, Invalid, InvalidPipeline
from mcp_control.kernel.text import label_errors, name_errors, range_errors, text_errors
from mcp_control.pipelines.definition import from_data, parse_json, parse_yaml, readable
from mcp_control.pipelines.definition_model import NESTED, NO_NEEDS, FanOut, PipelineSpec, Stage
from mcp_control.pipelines.expressions import Expression
from mcp_control.pipelines.input_model import Param
from mcp_control.pipelines.params import fits
from mcp_control.pipelines.templates import expressions_in, problems
from mcp_control.pipelines.validate_inputs import FIELDS_MAX, waiting_errors
from mcp_control.tasks.budgets import budget_errors
from mcp_control.tasks.model import RetryPolicy
from mcp_control.tasks.submission import TIMEOUT_MAX, needs_errors, retry_errors, version_errors

ITEMS_MAX: Final = 10_000
STAGES_MAX: Final = 10_000
DEPTH_MAX: Final = 100
ERRORS_MAX: Final = 50
_PARAMS_MAX: Final = 200
_STAGE_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}", re.ASCII)
_PARAM_NAME: Final = re.compile(r"[A-Za-z]\w{0,63}", re.ASCII)
_REASON: Final = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*", re.ASCII)
_NUMBER: Final = re.compile(r"[1-9]\d{0,8}", re.ASCII)
_SHARE: Final = re.compile(r"(100|\d{1,2}(\.\d{1,3})?)%", re.ASCII)
_RESERVED: Final = frozenset({"plan", "validate"})
_DEADLINE_MAX: Final = 366 * 86_400.0
_WHERE_WITH: Final = frozenset({"params", "stages", "run"})


class _Known(msgspec.Struct, frozen=True):
    """What a reference may name: parameters, and places of stages.

    `ancestors` is empty while the graph is not sound; `sure` says whether all ids are known.
    """

    params: frozenset[str]
    places: dict[str, int]
    ancestors: dict[str, int]
    sure: bool = True


def validate(spec: PipelineSpec, capabilities: Collection[str] | None = None) -> list[str]:
    """Check a definition.

    Args:
        capabilities: names of the capabilities of all registered agents; None leaves that check out.

    Returns:
        warnings: what can be accepted and will not run as things are, e.g. a task type that no agent offers.

    Raises:
        InvalidPipeline: with at most 50 errors; `cycle` in its data is the path of the first cycle, where there is one.
    """
    found, cycle = _faults(spec, frozenset(), True)
    if found:
        raise _invalid(found, cycle)
    return [] if capabilities is None else list(_warnings(spec.spec.stages, capabilities))


def read(text: str) -> PipelineSpec:
    """Return the definition in a text, JSON where it begins like an object, else YAML.

    Raises:
        PayloadTooLarge, MalformedJson, TooDeep, DuplicateKey: the text itself.
        Invalid: it is no definition, or none in its shape; with all that is wrong.
    """
    data = parse_json(text) if text.lstrip().startswith("{") else parse_yaml(text)
    try:
        return from_data(data)
    except Invalid as problem:
        problem.errors = tuple([*problem.errors, *further(data)][:ERRORS_MAX])
        raise


def further(data: object) -> list[FieldError]:
    """Return what else is wrong with a definition whose shape is not right: the faults of those parts that can be read."""
    spec, broken, sure = readable(data)
    found, _ = _faults(spec, broken, sure)
    return [error for error in found if spec.spec.stages or error.pointer != "#/spec/stages"]


def _faults(spec: PipelineSpec, broken: frozenset[int], sure: bool) -> tuple[list[FieldError], list[str] | None]:
    """Return all faults and the path of a cycle.

    Args:
        broken: places of stages that could not be read; only their ids and needs count.
        sure: ids and needs of all stages are known, so that what is not among them is not there.
    """
    stages = spec.spec.stages
    if len(stages) > STAGES_MAX:
        return [_error("#/spec/stages", "limit-exceeded", f"{len(stages)} stages; at most {STAGES_MAX}")], None
    found = _head(spec)
    graph, cycle = _graph(stages, sure)
    found += graph
    known = _Known(
        params=frozenset(spec.spec.params),
        places={stage.id: index for index, stage in enumerate(stages)},
        ancestors={} if graph or not sure else _ancestors(stages),
        sure=sure,
    )
    for index, stage in enumerate(stages):
        if len(found) >= ERRORS_MAX:
            break
        if index not in broken:
            found += _stage(stage, f"#/spec/stages/{index}", known)
    found += _with("#/spec/outputs", spec.spec.outputs, _WHERE_WITH, None, known)
    found += _with("#/spec/rerun", spec.spec.rerun, _WHERE_WITH, None, known)
    for name in spec.spec.rerun:
        if name not in spec.spec.params:
            found.append(_error("#/spec/rerun", "unknown-reference", f"there is no parameter `{name[:64]}`"))
    return found, cycle


def _invalid(found: list[FieldError], cycle: list[str] | None = None) -> InvalidPipeline:
    if cycle:
        return InvalidPipeline(found[0].detail, errors=found[:ERRORS_MAX], cycle=cycle)
    return InvalidPipeline(found[0].detail, errors=found[:ERRORS_MAX])


def _error(pointer: str, code: str, detail: str) -> FieldError:
    return FieldError(pointer=pointer, code=code, detail=detail)


# --- the graph ----------------------------------------------------------------------------------------------------


def _graph(stages: list[Stage], sure: bool) -> tuple[list[FieldError], list[str] | None]:
    """Return what is wrong with ids and needs, and the path of a cycle."""
    found: list[FieldError] = []
    places: dict[str, int] = {}
    for index, stage in enumerate(stages):
        if stage.id in places:
            detail = f"stage `{stage.id:.64}` is there twice (first at stages[{places[stage.id]}])"
            found.append(_error(f"#/spec/stages/{index}/id", "dag-unknown-node", detail))
        else:
            places[stage.id] = index
    for index, stage in enumerate(stages):
        for at, need in enumerate(stage.needs):
            pointer = f"#/spec/stages/{index}/needs/{at}"
            if need not in places and not sure:
                continue
            if need not in places:
                found.append(
                    _error(
                        pointer, "dag-unknown-node", f"stage `{stage.id:.64}` needs `{need:.64}`, which is not there"
                    )
                )
            elif need in stage.needs[:at]:
                found.append(_error(pointer, "dag-unknown-node", f"`{need:.64}` is named twice"))
    if not stages:
        found.append(_error("#/spec/stages", "out-of-range", "at least one stage"))
    edges = {stage.id: [need for need in stage.needs if need in places] for stage in stages}
    try:
        order = list(TopologicalSorter(edges).static_order())
    except CycleError as error:
        # graphlib names each node after one that needs it not: reversed, the path reads "a needs b needs a".
        path = list(reversed(error.args[1]))
        where = places[path[0]]
        shown = " needs ".join(path if len(path) <= 12 else [*path[:6], "…", *path[-5:]])
        found.insert(0, _error(f"#/spec/stages/{where}/needs", "dag-cycle", f"a cycle: {shown}"))
        return found, path
    depth: dict[str, int] = {}
    for name in order:
        depth[name] = 1 + max((depth[need] for need in edges[name]), default=0)
        if depth[name] > DEPTH_MAX:
            found.append(
                _error(f"#/spec/stages/{places[name]}", "limit-exceeded", f"more than {DEPTH_MAX} stages in a row")
            )
            break
    return found, None


def _ancestors(stages: list[Stage]) -> dict[str, int]:
    """Return each stage's ancestors as a bit set over the places of stages; the graph is sound."""
    at = {stage.id: 1 << index for index, stage in enumerate(stages)}
    needs = {stage.id: stage.needs for stage in stages}
    found: dict[str, int] = {}
    for name in TopologicalSorter(needs).static_order():
        bits = 0
        for need in needs[name]:
            bits |= found[need] | at[need]
        found[name] = bits
    return found


# --- one stage ----------------------------------------------------------------------------------------------------


def _head(spec: PipelineSpec) -> list[FieldError]:
    metadata, body = spec.metadata, spec.spec
    found = name_errors("#/metadata/name", metadata.name, 100)
    if "/" in metadata.name:
        found.append(_error("#/metadata/name", "invalid-character", "no `/`: the name stands in paths"))
    if metadata.name in _RESERVED:
        found.append(_error("#/metadata/name", "invalid-value", f"`{metadata.name}` has a meaning in paths"))
    found += text_errors("#/metadata/description", metadata.description.replace("\n", " "), 4000)
    found += label_errors("#/metadata/labels", metadata.labels)
    found += range_errors("#/spec/priority", body.priority, 0, 100)
    if body.deadline_seconds is not None:
        found += range_errors("#/spec/deadline_seconds", body.deadline_seconds, 0.001, _DEADLINE_MAX)
    if body.budget is not None:
        found += budget_errors("#/spec/budget", body.budget)
    if body.max_running is not None and body.mode == "sequential":
        detail = "`sequential` is one stage at a time: no `max_running`"
        found.append(_error("#/spec/max_running", "invalid-value", detail))
    if body.max_running is not None:
        found += range_errors("#/spec/max_running", body.max_running, 1, STAGES_MAX)
    if len(body.params) > _PARAMS_MAX:
        found.append(_error("#/spec/params", "limit-exceeded", f"at most {_PARAMS_MAX} parameters"))
    for name, param in list(body.params.items())[:_PARAMS_MAX]:
        found += _param(name, param)
    return found


def _param(name: str, param: Param, base: str = "#/spec/params") -> Iterator[FieldError]:
    pointer = f"{base}/{name[:64].replace('~', '~0').replace('/', '~1')}"
    if not _PARAM_NAME.fullmatch(name):
        yield _error(
            pointer,
            "invalid-character",
            "a parameter is named with letters, digits and `_`, first a letter; at most 64",
        )
    if param.default is not msgspec.UNSET and param.default is not None:
        wrong = fits(param.default, param)
        if wrong:
            yield _error(f"{pointer}/default", "wrong-type", wrong)
    for index, choice in enumerate(param.choices):
        wrong = fits(choice, msgspec.structs.replace(param, choices=[]))
        if wrong:
            yield _error(f"{pointer}/choices/{index}", "wrong-type", wrong)


def _stage(stage: Stage, pointer: str, known: _Known) -> list[FieldError]:
    found: list[FieldError] = []
    if not _STAGE_ID.fullmatch(stage.id):
        detail = "a stage id has letters, digits, `_` and `-`, first a letter; at most 64"
        found.append(_error(f"{pointer}/id", "invalid-character", detail))
    if stage.approval is not None or stage.wait_for is not None:
        found += waiting_errors(stage, pointer)
    elif not stage.uses:
        detail = "say what the stage does: `uses`, `approval` or `wait_for`"
        found.append(_error(f"{pointer}/uses", "missing-field", detail))
    elif stage.uses.startswith(NESTED):
        found += _nested(pointer, stage)
    else:
        found += name_errors(f"{pointer}/uses", stage.uses)
    found += _inputs(stage, pointer, known)
    found += version_errors(f"{pointer}/version", stage.version)
    found += needs_errors(f"{pointer}/requires", stage.requires)
    if stage.priority is not None:
        found += range_errors(f"{pointer}/priority", stage.priority, 0, 100)
    found += _limits(pointer, stage.retry, stage.timeout)
    if stage.deadline_seconds is not None:
        found += range_errors(f"{pointer}/deadline_seconds", stage.deadline_seconds, 0.001, _DEADLINE_MAX)
    if stage.cache is not None:
        found += range_errors(f"{pointer}/cache/seconds", stage.cache.seconds, 0.001, _DEADLINE_MAX)
    if stage.when is not None:
        found += _expression(f"{pointer}/when", stage.when, _WHERE_WITH, stage, known)
    if stage.run_when == "any_completed" and not stage.needs:
        found.append(_error(f"{pointer}/run_when", "invalid-value", "`any_completed` needs something in `needs`"))
    seen = _WHERE_WITH
    if stage.fan_out is not None:
        seen |= {"item", "index"}
        found += _expression(f"{pointer}/fan_out/over", stage.fan_out.over, _WHERE_WITH, stage, known)
        found += _width(f"{pointer}/fan_out", stage.fan_out)
        if stage.fan_out.rank is not None:
            found += _expression(f"{pointer}/fan_out/rank", stage.fan_out.rank, seen, stage, known)
        combine = stage.fan_out.combine
        if combine is not None:
            at = f"{pointer}/fan_out/combine"
            found += name_errors(f"{at}/uses", combine.uses)
            found += _limits(at, combine.retry, combine.timeout)
            found += _with(f"{at}/with", combine.with_, _WHERE_WITH | {"items", "failures"}, stage, known)
    found += _with(f"{pointer}/with", stage.with_, seen, stage, known)
    if stage.gate is not None:
        found += _expression(f"{pointer}/gate/check", stage.gate.check, _WHERE_WITH | {"output"}, stage, known)
        if not _REASON.fullmatch(stage.gate.reason):
            found.append(
                _error(f"{pointer}/gate/reason", "invalid-character", "a reason is lower-case words joined by `-`")
            )
        found += text_errors(f"{pointer}/gate/message", stage.gate.message, 500)
    return found


def _inputs(stage: Stage, pointer: str, known: _Known) -> Iterator[FieldError]:
    """Yield what is wrong with the expressions of a stage that waits, and with what undoes a stage."""
    if stage.approval is not None:
        text = {"title": stage.approval.title, "message": stage.approval.message}
        yield from _with(f"{pointer}/approval", text, _WHERE_WITH, stage, known)
        for name, param in list(stage.approval.fields.items())[:FIELDS_MAX]:
            yield from _param(name, param, f"{pointer}/approval/fields")
    if stage.wait_for is not None and stage.wait_for.match is not None:
        at = f"{pointer}/wait_for/match"
        yield from _expression(at, stage.wait_for.match, _WHERE_WITH | {"output"}, stage, known)
    if stage.compensate is not None:
        at = f"{pointer}/compensate"
        yield from name_errors(f"{at}/uses", stage.compensate.uses)
        yield from _limits(at, stage.compensate.retry, stage.compensate.timeout)
        yield from _with(f"{at}/with", stage.compensate.with_, _WHERE_WITH | {"output"}, stage, known)


def _width(pointer: str, fan_out: FanOut) -> Iterator[FieldError]:
    at_least, mode = fan_out.at_least, fan_out.mode
    if fan_out.width is not None:
        yield from range_errors(f"{pointer}/width", fan_out.width, 1, ITEMS_MAX)
        if mode in ("sequential", "priority"):
            one = "one item is under way at a time" if mode == "sequential" else "all items wait at once, by their rank"
            yield _error(f"{pointer}/width", "invalid-value", f"with `{mode}` {one}: no `width`")
    if (mode == "priority") != (fan_out.rank is not None):
        where = "rank" if fan_out.rank is not None else "mode"
        yield _error(f"{pointer}/{where}", "invalid-value", "`mode: priority` and `rank` go together")
    if isinstance(at_least, int):
        yield from range_errors(f"{pointer}/at_least", at_least, 0, ITEMS_MAX)
    elif at_least is not None and not _SHARE.fullmatch(at_least):
        detail = 'how many items must complete is a number, or a share from "0%" to "100%"'
        yield _error(f"{pointer}/at_least", "invalid-value", detail)


def _nested(pointer: str, stage: Stage) -> Iterator[FieldError]:
    yield from name_errors(f"{pointer}/uses", stage.uses.removeprefix(NESTED), 100)
    if stage.version != "*" and not _NUMBER.fullmatch(stage.version):
        yield _error(f"{pointer}/version", "invalid-value", "the version of a pipeline is a whole number, or `*`")
    for name in ("retry", "timeout", "cache"):
        if getattr(stage, name) is not None:
            yield _error(f"{pointer}/{name}", "invalid-value", f"a run of another pipeline has no `{name}` of its own")
    if stage.requires != NO_NEEDS:
        yield _error(f"{pointer}/requires", "invalid-value", "its own stages say what they require")


def _limits(pointer: str, retry: RetryPolicy | None, timeout: float | None) -> Iterator[FieldError]:
    if retry is not None:
        yield from retry_errors(f"{pointer}/retry", retry)
    if timeout is not None:
        yield from range_errors(f"{pointer}/timeout", timeout, 0.001, TIMEOUT_MAX)


def _with(
    pointer: str, value: object, roots: frozenset[str], stage: Stage | None, known: _Known
) -> Iterator[FieldError]:
    for where, message in problems(value, pointer):
        yield _error(where, "expression-invalid", message)
    for where, expression in expressions_in(value, pointer):
        yield from _references(where, expression, roots, stage, known)


def _expression(pointer: str, source: str, roots: frozenset[str], stage: Stage, known: _Known) -> Iterator[FieldError]:
    try:
        expression = Expression(source)
    except ExpressionError as error:
        yield _error(pointer, "expression-invalid", str(error))
    else:
        yield from _references(pointer, expression, roots, stage, known)


def _references(
    pointer: str, expression: Expression, roots: frozenset[str], stage: Stage | None, known: _Known
) -> Iterator[FieldError]:
    for root in sorted(expression.roots - roots):
        yield _error(pointer, "unknown-reference", f"`{root}` has no value here")
    for name in sorted(expression.params - known.params):
        yield _error(pointer, "unknown-reference", f"there is no parameter `{name[:64]}`")
    for name in sorted(expression.stages):
        place = known.places.get(name)
        if place is None and not known.sure:
            continue
        if place is None:
            yield _error(pointer, "unknown-reference", f"there is no stage `{name[:64]}`")
        elif stage is not None and known.ancestors and not known.ancestors[stage.id] >> place & 1:
            detail = f"stage `{name[:64]}` need not be completed before `{stage.id[:64]}`: add it to `needs`"
            yield _error(pointer, "unknown-reference", detail)


def _warnings(stages: list[Stage], capabilities: Collection[str]) -> Iterator[str]:
    offered = frozenset(capabilities)
    for stage in stages:
        wanted = [stage.uses] if stage.uses and not stage.uses.startswith(NESTED) else []
        wanted += stage.requires.capabilities
        if stage.compensate is not None:
            wanted.append(stage.compensate.uses)
        if stage.fan_out is not None and stage.fan_out.combine is not None:
            wanted.append(stage.fan_out.combine.uses)
        for name in wanted:
            if name not in offered:
                yield f"stage `{stage.id}`: no registered agent offers `{name}`"
