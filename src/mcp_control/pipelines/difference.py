"""What differs between two versions of a definition: stages by id, everything else by place. Pure."""

from collections.abc import Iterator
from typing import Final

import msgspec

from mcp_control.pipelines.definition_model import PipelineSpec
from mcp_control.pipelines.plan_model import Difference, FieldChange, StageChange

_MISSING: Final = object()


def difference(pipeline: str, before: tuple[int, PipelineSpec], after: tuple[int, PipelineSpec]) -> Difference:
    """Return what differs between two versions, each a number and its definition."""
    old, new = (msgspec.to_builtins(spec) for _, spec in (before, after))
    stages_before = {stage["id"]: stage for stage in old["spec"].pop("stages")}
    stages_after = {stage["id"]: stage for stage in new["spec"].pop("stages")}
    both = [name for name in stages_after if name in stages_before]
    changed = [
        StageChange(stage=name, fields=fields)
        for name in both
        if (fields := list(_changes(stages_before[name], stages_after[name], "")))
    ]
    fields = list(_changes(old, new, ""))
    added = [name for name in stages_after if name not in stages_before]
    removed = [name for name in stages_before if name not in stages_after]
    reordered = both != [name for name in stages_before if name in stages_after]
    return Difference(
        pipeline=pipeline,
        before=before[0],
        after=after[0],
        same=not (added or removed or changed or fields or reordered),
        added=added,
        removed=removed,
        changed=changed,
        fields=fields,
        reordered=reordered,
    )


def _changes(before: object, after: object, pointer: str) -> Iterator[FieldChange]:
    """Yield changes of members; lists are compared as wholes, since an element has no name."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in [*before, *(name for name in after if name not in before)]:
            token = str(name).replace("~", "~0").replace("/", "~1")
            yield from _changes(before.get(name, _MISSING), after.get(name, _MISSING), f"{pointer}/{token}")
    elif before is _MISSING:
        yield FieldChange(pointer=pointer, after=after)
    elif after is _MISSING:
        yield FieldChange(pointer=pointer, before=before)
    elif before != after or type(before) is not type(after):
        yield FieldChange(pointer=pointer, before=before, after=after)
