"""Are the pipelines that a definition includes as stages there, do they take what it gives them, and does none include itself?"""

from collections.abc import Awaitable, Callable, Iterator

import msgspec

from mcp_control.kernel.errors import FieldError
from mcp_control.pipelines.definition_model import NESTED, NESTED_MAX, PipelineSpec, Stage

Load = Callable[[str, int | None], Awaitable[PipelineSpec | None]]


async def faults(spec: PipelineSpec, load: Load) -> list[FieldError]:
    """Return what is wrong with the stages of a definition that are runs of other pipelines.

    Args:
        load: gives a definition by name, of that version or the newest; None where there is none.
    """
    found: list[FieldError] = []
    for index, stage in included(spec):
        pointer = f"#/spec/stages/{index}"
        name, version = target(stage)
        inner = await load(name, version)
        if name == spec.metadata.name:
            detail = f"`{name}` would be a run inside itself"
            found.append(FieldError(pointer=f"{pointer}/uses", code="pipeline-recursion", detail=detail))
        elif inner is None:
            which = "" if version is None else f" {version}"
            detail = f"there is no pipeline `{name}`{which}"
            found.append(FieldError(pointer=f"{pointer}/uses", code="unknown-reference", detail=detail))
        else:
            found += _given(stage, inner, pointer)
            found += await _deeper(spec.metadata.name, [name], inner, load, f"{pointer}/uses")
    return found


def included(spec: PipelineSpec) -> Iterator[tuple[int, Stage]]:
    """Yield place and stage for every stage that is a run of another pipeline."""
    for index, stage in enumerate(spec.spec.stages):
        if stage.uses.startswith(NESTED):
            yield index, stage


def target(stage: Stage) -> tuple[str, int | None]:
    """Return the name and the version of the pipeline that a stage is a run of."""
    return stage.uses.removeprefix(NESTED), int(stage.version) if stage.version.isdecimal() else None


def _given(stage: Stage, inner: PipelineSpec, pointer: str) -> Iterator[FieldError]:
    declared = inner.spec.params
    for name in stage.with_:
        if name not in declared:
            detail = f"pipeline `{inner.metadata.name}` has no parameter `{name[:64]}`"
            token = name[:64].replace("~", "~0").replace("/", "~1")
            yield FieldError(pointer=f"{pointer}/with/{token}", code="unknown-field", detail=detail)
    for name, param in declared.items():
        if param.required and param.default is msgspec.UNSET and name not in stage.with_:
            detail = f"pipeline `{inner.metadata.name}` needs the parameter `{name}`"
            yield FieldError(pointer=f"{pointer}/with", code="missing-field", detail=detail)


async def _deeper(outer: str, path: list[str], spec: PipelineSpec, load: Load, pointer: str) -> list[FieldError]:
    if len(path) > NESTED_MAX:
        detail = f"more than {NESTED_MAX} runs inside runs: {' > '.join(path)}"
        return [FieldError(pointer=pointer, code="limit-exceeded", detail=detail)]
    seen: set[tuple[str, int | None]] = set()
    for _, stage in included(spec):
        wanted = target(stage)
        if wanted in seen:
            continue
        seen.add(wanted)
        name, version = wanted
        if name == outer or name in path:
            detail = f"`{name}` would be a run inside itself: {' > '.join([outer, *path, name])}"
            return [FieldError(pointer=pointer, code="pipeline-recursion", detail=detail)]
        inner = await load(name, version)
        if inner is not None and (found := await _deeper(outer, [*path, name], inner, load, pointer)):
            return found
    return []
