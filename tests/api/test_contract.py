"""What holds for every route: who may call it, and how a person, a file and a pipeline get through."""

import base64
import hashlib
from pathlib import Path

import httpx2
import pytest

from mcp_control import __version__
from mcp_control.api.assembly import routes
from mcp_control.api.routing import Endpoint
from mcp_control.testing.server import RunningServer

pytestmark = pytest.mark.asyncio(loop_scope="module")

ENDPOINTS = routes(__version__)
OPEN = {
    "/health/live", "/health/ready", "/docs", "/docs/start.js", "/docs/swagger-ui.css", "/docs/swagger-ui-bundle.js", "/openapi.json",
    "/asyncapi.json",
    "/api/v1/auth/login", "/api/v1/auth/password",
}  # fmt: skip


def named(endpoint: Endpoint) -> str:
    return f"{endpoint.method} {endpoint.full_path}"


def concrete(endpoint: Endpoint) -> str:
    return "/".join("x1" if part.startswith("{") else part for part in endpoint.full_path.split("/"))


@pytest.mark.parametrize("endpoint", [each for each in ENDPOINTS if each.full_path not in OPEN], ids=named)
async def test_no_route_is_open_but_health_docs_and_login(server: RunningServer, endpoint: Endpoint) -> None:
    """Without a credential every other route answers 401, whatever else is wrong."""
    async with httpx2.AsyncClient(base_url=server.url) as nobody:
        answer = await nobody.request(endpoint.method, concrete(endpoint))
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")


@pytest.mark.parametrize("path", sorted(path for path in OPEN if not path.startswith("/api")))
async def test_open_pages_answer_and_need_nothing_from_elsewhere(server: RunningServer, path: str) -> None:
    """Health and documentation work without login, and the pages refer to this server alone."""
    async with httpx2.AsyncClient(base_url=server.url) as nobody:
        answer = await nobody.get(path)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    if path == "/docs":
        assert "http" not in answer.text.replace("<!doctype html>", "")
        assert "unsafe" not in answer.headers["content-security-policy"]


async def test_a_session_of_a_person_from_first_password_to_logout(server: RunningServer) -> None:
    """The printed password must be changed, the new one gives a token, a revoked API token ends at once."""
    async with httpx2.AsyncClient(base_url=server.url) as person:
        first = {"username": "admin", "password": server.one_time_password}
        must = await person.post("/api/v1/auth/login", json=first)
        assert (must.status_code, must.json()["code"]) == (403, "password-change-required")
        new = "a long and private sentence 42"
        change = {"username": "admin", "current_password": server.one_time_password, "new_password": new}
        assert (await person.post("/api/v1/auth/password", json=change)).status_code == 204
        login = await person.post("/api/v1/auth/login", json={"username": "admin", "password": new})
        assert login.json()["token_type"] == "Bearer"
        person.headers["Authorization"] = "Bearer " + login.json()["access_token"]
        assert (await person.get("/api/v1/auth/me")).json()["display"] == "admin"
        made = (await person.post("/api/v1/auth/tokens", json={"name": "ci"})).json()
        program = {"Authorization": "Bearer " + made["token"]}
        assert (await person.get("/api/v1/auth/me", headers=program)).json()["kind"] == "token"
        listed = (await person.get("/api/v1/auth/tokens")).json()["items"]
        assert made["id"] in {token["id"] for token in listed}
        assert all("token" not in token for token in listed)
        assert (await person.delete(f"/api/v1/auth/tokens/{made['id']}")).status_code == 204
        assert (await person.get("/api/v1/auth/me", headers=program)).status_code == 401


async def test_request_ids_are_kept_or_made(client: httpx2.AsyncClient) -> None:
    """A caller's id comes back when it is harmless; otherwise one is made."""
    kept = await client.get("/health/live", headers={"X-Request-Id": "trace-1"})
    made = await client.get("/health/live", headers={"X-Request-Id": "a b<script>"})
    assert kept.headers["x-request-id"] == "trace-1"
    assert made.headers["x-request-id"].startswith("req_")


async def test_artifacts_go_in_and_out_with_checked_digests_and_ranges(
    client: httpx2.AsyncClient, tmp_path: Path, backend: str
) -> None:
    """Upload, look up, read whole and in part, refuse a wrong digest, delete."""
    data = b"0123456789" * 1000
    digest = "sha-256=:" + base64.b64encode(hashlib.sha256(data).digest()).decode() + ":"
    made = await client.post(
        "/api/v1/artifacts?name=a.txt&media_type=text/plain", content=data, headers={"Content-Digest": digest}
    )
    assert made.status_code == 201, made.text
    path = f"/api/v1/artifacts/{made.json()['id']}"
    whole = await client.get(f"{path}/content")
    assert (whole.status_code, whole.content, whole.headers["content-digest"]) == (200, data, digest)
    part = await client.get(f"{path}/content", headers={"Range": "bytes=5-14"})
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, b"5678901234", "bytes 5-14/10000")
    assert (await client.get(f"{path}/content", headers={"Range": "bytes=10000-"})).status_code == 416
    assert (await client.get(f"{path}/content", headers={"If-None-Match": whole.headers["etag"]})).status_code == 304
    location = (await client.get(f"{path}/location")).json()
    if backend == "embedded":
        assert Path(location["path"]).read_bytes() == data  # noqa: ASYNC240 - a small file
    else:
        assert location["path"] is None, "what lies in a database has no path"
    wrong = await client.post("/api/v1/artifacts?name=b", content=b"other", headers={"Content-Digest": digest})
    assert (wrong.status_code, wrong.json()["code"]) == (422, "digest-mismatch")
    assert (await client.delete(path)).status_code == 204
    assert (await client.get(path)).status_code == 404


async def test_a_pipeline_is_defined_in_json_and_yaml_and_started(client: httpx2.AsyncClient) -> None:
    """The same definition in both forms is one version; a check keeps nothing; a run starts and can be cancelled."""
    spec = {
        "apiVersion": "mcp-control/v1",
        "kind": "Pipeline",
        "metadata": {"name": "two"},
        "spec": {"stages": [{"id": "a", "uses": "none"}]},
    }
    text = "apiVersion: mcp-control/v1\nkind: Pipeline\nmetadata: {name: two}\nspec:\n  stages:\n  - id: a\n    uses: none\n"
    dry = await client.post("/api/v1/pipelines/validate", json=spec)
    assert dry.json()["valid"] is True
    assert (await client.get("/api/v1/pipelines/two")).status_code == 404
    assert (await client.post("/api/v1/pipelines", json=spec)).status_code == 201
    again = await client.post("/api/v1/pipelines", content=text, headers={"content-type": "application/yaml"})
    assert (again.status_code, again.json()["version"]) == (200, 1), again.text
    run = await client.post("/api/v1/pipelines/two/execute", json={})
    assert run.status_code == 201, run.text
    path = f"/api/v1/runs/{run.json()['id']}"
    assert [task["type"] for task in (await client.get(f"{path}/tasks")).json()["items"]] == ["none"]
    assert (await client.post(f"{path}/cancel", json={"reason": "enough"})).status_code == 200
    assert (await client.get(f"{path}?wait=5")).json()["state"] == "cancelled"


async def test_all_faults_of_a_definition_are_told_with_lines_and_pointers(client: httpx2.AsyncClient) -> None:
    """Checking and defining refuse alike; in JSON and YAML each fault has its pointer, line and column."""
    text = "metadata: {name: lines}\nspec:\n  stages:\n  - id: a\n    uses: 5\n  - id: b\n    uses: t\n    needs: [c]\n"
    wanted = [("wrong-type", "#/spec/stages/0/uses", 5, 5), ("dag-unknown-node", "#/spec/stages/1/needs/0", 8, 13)]
    for path in ("/api/v1/pipelines/validate", "/api/v1/pipelines"):
        refused = await client.post(path, content=text, headers={"content-type": "application/yaml"})
        assert refused.status_code == 422, refused.text
        places = [(e["code"], e["pointer"], e["line"], e["column"]) for e in refused.json()["errors"]]
        assert places == wanted
        same = {
            "metadata": {"name": "lines"},
            "spec": {"stages": [{"id": "a", "uses": 5}, {"id": "b", "uses": "t", "needs": ["c"]}]},
        }
        refused = await client.post(path, json=same)
        assert [(e["code"], e["pointer"]) for e in refused.json()["errors"]] == [place[:2] for place in wanted]
        assert refused.json()["errors"][1]["line"] == 1
    broken = await client.post(
        "/api/v1/pipelines/validate", content="a: [", headers={"content-type": "application/yaml"}
    )
    assert (broken.json()["errors"][0]["code"], broken.json()["errors"][0]["line"]) == ("malformed-yaml", 2), (
        broken.text
    )
