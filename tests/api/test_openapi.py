"""The documentation is complete and true."""

import json
from typing import Any

import jsonschema_rs
import msgspec
import pytest

from mcp_control import __version__
from mcp_control.api.assembly import routes
from mcp_control.api.openapi import build
from mcp_control.api.routing import Endpoint

ENDPOINTS = routes(__version__)
SEED_PATHS = [
    ("POST", "/api/v1/agents/register"), ("GET", "/api/v1/agents"), ("GET", "/api/v1/agents/{agent}"), ("POST", "/api/v1/tasks"),
    ("GET", "/api/v1/tasks/{task_id}"), ("POST", "/api/v1/tasks/{task_id}/cancel"), ("POST", "/api/v1/pipelines"),
    ("POST", "/api/v1/pipelines/{pipeline}/execute"), ("GET", "/health/live"), ("GET", "/metrics"), ("POST", "/api/v1/auth/login"),
]  # fmt: skip


def named(endpoint: Endpoint) -> str:
    return f"{endpoint.method} {endpoint.full_path}"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(build(ENDPOINTS, __version__))
    return found


def test_every_route_is_documented(document: dict[str, Any]) -> None:
    """The document has exactly the routes of the table, each with summary, description, answers and a unique name."""
    shown = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert shown == {(each.method, each.full_path.replace(":name}", "}")) for each in ENDPOINTS}
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    assert all(operation["summary"] and operation["description"] and operation["responses"] for operation in operations)
    names = [operation["operationId"] for operation in operations if operation["operationId"] != "docs_asset"]
    assert len(names) == len(set(names))
    assert set(SEED_PATHS) <= shown


def test_the_document_is_openapi_3_1(document: dict[str, Any]) -> None:
    """Every schema in it is JSON Schema 2020-12, and every reference leads somewhere."""
    assert document["openapi"] == "3.1.0"
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        jsonschema_rs.Draft202012Validator({**schema, "components": {"schemas": schemas}})
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in schemas


@pytest.mark.parametrize("endpoint", [each for each in ENDPOINTS if each.example is not None], ids=named)
def test_every_example_is_what_the_route_reads(document: dict[str, Any], endpoint: Endpoint) -> None:
    """Examples pass the decoder of the route and the documented schema."""
    assert endpoint.body is not None
    endpoint.body.decode(msgspec.json.encode(endpoint.example))
    operation = document["paths"][endpoint.full_path.replace(":name}", "}")][endpoint.method.lower()]
    content = operation["requestBody"]["content"]["application/json"]
    assert content["example"] == json.loads(msgspec.json.encode(endpoint.example))
    jsonschema_rs.Draft202012Validator({**content["schema"], "components": document["components"]}).validate(
        content["example"]
    )
