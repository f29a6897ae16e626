"""The OpenAPI 3.1 document, made from the table of routes and the Structs that decode and encode; nothing is written twice."""

from collections.abc import Iterable
from typing import Any, Final

import msgspec

from mcp_control.api.json_schema import any_json
from mcp_control.api.problem import ProblemDocument
from mcp_control.api.routing import Endpoint

_REF: Final = "#/components/schemas/{name}"
_PROBLEM: Final = {"application/problem+json": {"schema": {"$ref": _REF.format(name="ProblemDocument")}}}
_NAMES: Final = {
    "auth": "Log in, passwords, API tokens",
    "agents": "Agents: enrol, register, discover, order; sessions of agents without WebSocket",
    "tasks": "Durable units of work",
    "pipelines": "Versioned graphs of stages",
    "operations": "One verb for many tasks",
    "dead-letters": "Tasks that failed for good",
    "runs": "Executions of pipelines",
    "artifacts": "Data between stages and out to people",
    "events": "What happened, in one order",
    "system": "Status, health, metrics",
}
_INTRODUCTION: Final = (
    "Send `Authorization: Bearer` with an access token (`POST /api/v1/auth/login`), an API token or an agent's credential. "
    "Errors are problem documents (RFC 9457) with a stable `code`; a 4xx changed nothing. Lists are paged by cursor. "
    "The WebSockets `/ws` and `/ws/agent` are described by [/asyncapi.json](/asyncapi.json)."
)


def build(endpoints: Iterable[Endpoint], version: str) -> bytes:
    """Return the document as JSON."""
    shown = list(endpoints)
    types: list[Any] = [ProblemDocument]
    for endpoint in shown:
        types += [
            kind
            for kind in (endpoint.returns, endpoint.body and endpoint.body.type, *endpoint.others.values())
            if kind is not None
        ]
    schemas, components = msgspec.json.schema_components(types, schema_hook=any_json, ref_template=_REF)
    by_type = dict(zip(map(repr, types), schemas, strict=True))
    paths: dict[str, dict[str, object]] = {}
    for endpoint in shown:
        path = endpoint.full_path.replace(":name}", "}")
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, by_type)
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "MCP Server (Management Control Panel)",
            "version": version,
            "description": _INTRODUCTION,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": text} for name, text in _NAMES.items()],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Access token, API token (`mcpt_…`) or agent credential (`mcpa_…`)",
                }
            },
        },
        "security": [{"bearer": []}],
    }
    return msgspec.json.encode(document)


def _operation(endpoint: Endpoint, schemas: dict[str, Any]) -> dict[str, object]:
    operation: dict[str, object] = {
        "operationId": endpoint.handler.__name__,
        "summary": endpoint.summary,
        "description": (endpoint.handler.__doc__ or "").strip(),
        "tags": [endpoint.tag],
        "responses": _responses(endpoint, schemas),
    }
    if endpoint.access == "open":
        operation["security"] = []
    parameters = [*_path_parameters(endpoint), *_query_parameters(endpoint), *_header_parameters(endpoint)]
    if parameters:
        operation["parameters"] = parameters
    if endpoint.body is not None:
        content: dict[str, object] = {"schema": schemas[repr(endpoint.body.type)]}
        if endpoint.example is not None:
            content["example"] = endpoint.example
        operation["requestBody"] = {
            "required": not endpoint.body.optional,
            "content": {
                media: content if media.endswith("json") else {"schema": {"type": "string"}}
                for media in endpoint.body.media_types
            },
        }
    elif endpoint.body_type is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {endpoint.body_type: {"schema": {"type": "string", "format": "binary"}}},
        }
    return operation


def _responses(endpoint: Endpoint, schemas: dict[str, Any]) -> dict[str, object]:
    answer: dict[str, object] = {"description": endpoint.summary}
    if endpoint.returns is not None:
        json_schema = {"schema": schemas[repr(endpoint.returns)]}
        text: dict[str, object] = {"schema": {"type": "string"}}
        answer["content"] = {media: json_schema if media == "application/json" else text for media in endpoint.produces}
    elif endpoint.status == 200:
        answer["content"] = {media: {"schema": {}} for media in endpoint.produces}
    found = {str(status): answer for status in (endpoint.status, *endpoint.statuses)}
    for status, other in endpoint.others.items():
        either = {"anyOf": [schemas[repr(endpoint.returns)], schemas[repr(other)]]}
        found[str(status)] = {"description": endpoint.summary, "content": {"application/json": {"schema": either}}}
    return {
        **found,
        "4XX": {"description": "The request was refused and changed nothing", "content": _PROBLEM},
        "5XX": {"description": "Not now, or a mistake of the server", "content": _PROBLEM},
    }


def _path_parameters(endpoint: Endpoint) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for part in endpoint.full_path.split("/"):
        if part.startswith("{"):
            name, _, kind = part[1:-1].partition(":")
            schema = (
                {"type": "string", "minLength": 1, "maxLength": 128}
                if kind
                else {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}
            )
            text = "Its id or its name" if kind else "Its id"
            found.append({"name": name, "in": "path", "required": True, "schema": schema, "description": text})
    return found


def _query_parameters(endpoint: Endpoint) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for field in msgspec.structs.fields(endpoint.query.type):
        schema = msgspec.json.schema(field.type, schema_hook=any_json)
        # Inline: the parameters' types are plain, enumerations come with one definition.
        for definition in schema.pop("$defs", {}).values():
            schema = _inlined(schema, definition)
        found.append(
            {"name": field.encode_name, "in": "query", "required": field.required, "schema": _without_null(schema)}
        )
    return found


def _inlined(schema: dict[str, Any], definition: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        return definition
    return {
        key: [_inlined(item, definition) for item in value] if key == "anyOf" else value
        for key, value in schema.items()
    }


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    options = [option for option in schema.get("anyOf", ()) if option != {"type": "null"}]
    return options[0] if len(options) == 1 else schema


def _header_parameters(endpoint: Endpoint) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    if endpoint.method == "PATCH":
        text = "The ETag of the version this edit is based on"
        found.append(
            {"name": "If-Match", "in": "header", "required": True, "schema": {"type": "string"}, "description": text}
        )
    if endpoint.weight == "submit" and endpoint.body is not None:
        text = "Repeating a request with the same key repeats its answer"
        found.append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": False,
                "schema": {"type": "string", "minLength": 1, "maxLength": 255},
                "description": text,
            }
        )
    return found
