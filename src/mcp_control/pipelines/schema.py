"""JSON Schema of a definition, for editors and for whoever writes YAML by hand."""

from typing import Any

import msgspec

from mcp_control.pipelines.definition_model import PipelineSpec


def definition_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a pipeline definition."""
    (reference,), definitions = msgspec.json.schema_components(
        [PipelineSpec], schema_hook=_anything, ref_template="#/$defs/{name}"
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Pipeline definition",
        **reference,
        "$defs": definitions,
    }


def _anything(kind: type) -> dict[str, Any]:
    if kind is object:
        return {"description": "any JSON value"}
    raise NotImplementedError
