"""Generated requests: whatever the documentation lets a caller send, and more, is never answered by a mistake of the server."""

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode

from mcp_control import __version__
from mcp_control.api.assembly import routes
from mcp_control.testing.server import ServerProcess

# Streams and long polls wait on purpose; the pages of the documentation have no input.
LEFT_OUT = ("/docs", "/openapi.json", "/api/v1/agents/session/{instance_id}/claim")
OPERATIONS = [
    (each.method, each.full_path.replace(":name}", "}"))
    for each in routes(__version__)
    if not each.full_path.startswith(LEFT_OUT[:2]) and each.full_path != LEFT_OUT[2]
]


@pytest.fixture(scope="module")
def process(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder: Path = tmp_path_factory.mktemp("fuzzed")
    with ServerProcess(folder) as server:
        yield server


@pytest.fixture(scope="module")
def schema(process: ServerProcess) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_dict(httpx2.get(f"{process.url}/openapi.json").json())


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=[" ".join(each) for each in OPERATIONS])
def test_no_generated_request_is_a_mistake_of_the_server(
    process: ServerProcess, schema: schemathesis.BaseSchema, method: str, path: str
) -> None:
    """Right and wrong requests alike are answered, and never with 5xx."""
    operation = schema[path][method]

    @settings(
        max_examples=8,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(GenerationMode.POSITIVE) | operation.as_strategy(GenerationMode.NEGATIVE))
    def asked(case: schemathesis.Case) -> None:
        if isinstance(case.query, dict):
            case.query.pop("wait", None)
        answer = case.call(base_url=process.url, headers=process.headers)
        case.validate_response(answer, checks=(not_a_server_error,))

    asked()
