"""Access on a running server: every route asks who is there, an agent is no administrator, secrets stay secret."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from mcp_control.testing.server import ServerProcess
from tests.integration.support import (
    API,
    AgentProcess,
    admin,
    agents_online,
    enrolment,
    in_state,
    submit,
)

pytestmark = pytest.mark.usefixtures("backend")

OPEN = {
    ("GET", "/health/live"),
    ("GET", "/health/ready"),
    ("GET", "/docs"),
    ("GET", "/docs/start.js"),
    ("GET", "/docs/swagger-ui.css"),
    ("GET", "/docs/swagger-ui-bundle.js"),
    ("GET", "/openapi.json"),
    ("GET", "/asyncapi.json"),
    ("POST", "/api/v1/auth/login"),
    ("POST", "/api/v1/auth/password"),
}
# What an agent does with its own credential; all else is refused.
AGENT_MAY = {
    ("GET", "/api/v1/auth/me"),
    ("POST", "/api/v1/agents/register"),
    ("POST", "/api/v1/agents/session"),
    ("POST", "/api/v1/agents/session/{instance_id}/claim"),
    ("POST", "/api/v1/agents/session/{instance_id}/heartbeat"),
    ("POST", "/api/v1/agents/session/{instance_id}/report"),
    ("DELETE", "/api/v1/agents/session/{instance_id}"),
    ("POST", "/api/v1/artifacts"),
    ("POST", "/api/v1/tasks/{task_id}/usage"),
    ("POST", "/api/v1/tasks/{task_id}/children"),  # with the live lease of that task alone
    ("GET", "/api/v1/artifacts"),
    ("GET", "/api/v1/artifacts/{artifact_id}"),
    ("GET", "/api/v1/artifacts/{artifact_id}/content"),
    ("GET", "/api/v1/artifacts/{artifact_id}/location"),
}
CANARY = "canary-7f3a9c41"


@pytest.fixture(scope="module")
def server(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("security"), log__level="debug") as running:
        yield running


def _routes(server: ServerProcess) -> list[tuple[str, str, dict[str, Any]]]:
    document = httpx2.get(f"{server.url}/openapi.json").json()
    return [
        (method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if method in ("get", "post", "put", "patch", "delete")
    ]


def _address(path: str) -> str:
    return re.sub(r"\{[^}]*\}", "task_00000000000000000000000000000000000", path)


def _body(operation: dict[str, Any]) -> dict[str, Any]:
    """Return a request body that is as the document says, so that nothing but access is in question."""
    content = operation.get("requestBody", {}).get("content", {})
    if "application/json" in content:
        media = content["application/json"]
        example = media.get("example")
        if example is None and media.get("examples"):
            example = next(iter(media["examples"].values()))["value"]
        return {"json": {} if example is None else example}
    if content:
        return {"content": b"x", "headers": {"Content-Type": next(iter(content))}}
    return {}


def test_every_documented_route_asks_who_is_there(server: ServerProcess) -> None:
    """Without a credential, and with a wrong one, every route but the open ones answers 401 and says how to authenticate."""
    routes = _routes(server)
    assert len(routes) > 50
    with httpx2.Client(base_url=server.url, timeout=20) as client:
        for method, path, operation in routes:
            sent = _body(operation)
            headers = sent.pop("headers", {})
            for credential in ({}, {"Authorization": "Bearer mcpt_wrong"}, {"Authorization": "Basic YWRtaW46YWRtaW4="}):
                answer = client.request(method, _address(path), headers={**headers, **credential}, **sent)
                if (method, path) in OPEN:
                    assert answer.status_code in (200, 204, 400, 401, 404, 422, 429), (method, path, answer.text)
                    continue
                assert answer.status_code == 401, (method, path, credential, answer.text)
                assert answer.json()["code"] in ("unauthenticated", "invalid-token")
                assert answer.headers["www-authenticate"].startswith("Bearer")
        assert {(method, path) for method, path, _ in routes} >= OPEN


def test_a_credential_in_the_address_is_refused_everywhere(server: ServerProcess) -> None:
    """`400 token-in-url`, whatever the route and although the token is good; the answer does not repeat it."""
    with httpx2.Client(base_url=server.url, headers=server.headers, timeout=20) as client:
        for method, path, operation in _routes(server):
            sent = _body(operation)
            for name in ("access_token", "token"):
                answer = client.request(method, f"{_address(path)}?{name}={server.admin_token}", **sent)
                assert (answer.status_code, answer.json()["code"]) == (400, "token-in-url"), (method, path, answer.text)
                assert server.admin_token not in answer.text


async def test_an_agents_credential_opens_an_agents_doors_only(server: ServerProcess, tmp_path: Path) -> None:
    """Every verb of an administrator is forbidden to an agent, whatever it names; a user's token is no agent's."""
    async with admin(server) as client:
        token = await enrolment(client)
        made = await client.post(
            f"{API}/agents/register",
            json={"name": "nosy", "capabilities": [{"name": "it.nosy"}]},
            headers={"Authorization": f"Bearer {token}"},
        )
        assert made.status_code == 201, made.text
        mine = {"Authorization": f"Bearer {made.json()['credential']}"}
        task_id = await submit(client, "it.nobody")
        async with httpx2.AsyncClient(base_url=server.url, headers=mine, timeout=20) as agent:
            assert (await agent.get(f"{API}/auth/me")).json()["kind"] == "agent"
            wrong = []
            for method, path, operation in _routes(server):
                if (method, path) in OPEN | AGENT_MAY:
                    continue
                sent = _body(operation)
                headers = {"If-Match": '"1"', **sent.pop("headers", {})}
                address = path.replace("{task_id}", task_id)
                answer = await agent.request(method, _address(address), headers=headers, **sent)
                if answer.status_code != 403:
                    wrong.append((method, path, answer.status_code, answer.text[:150]))
            assert not wrong, wrong
            other = {"name": "somebody-else", "capabilities": [{"name": "it.nosy"}]}
            taken = await agent.post(f"{API}/agents/register", json=other)
            assert taken.status_code in (401, 403, 409), taken.text
        session = await client.post(
            f"{API}/agents/session",
            json={"op": "hello", "protocol": 1, "agent": {"name": "nosy", "capabilities": [{"name": "it.nosy"}]}},
        )
        assert session.status_code == 403
        assert (await client.get(f"{API}/tasks/{task_id}")).json()["state"] == "queued"


async def test_an_enrolment_token_is_good_for_its_uses_and_nothing_else(server: ServerProcess) -> None:
    """One use registers one agent; a second use and every other route are refused."""
    async with admin(server) as client:
        once = {"Authorization": f"Bearer {await enrolment(client, uses=1)}"}
        spec = {"name": "enrolled-once", "capabilities": [{"name": "x"}]}
        for path in ("tasks", "agents", "status", "auth/me"):
            assert (await client.get(f"{API}/{path}", headers=once)).status_code in (401, 403)
        assert (await client.post(f"{API}/agents/register", json=spec, headers=once)).status_code == 201
        again = await client.post(f"{API}/agents/register", json={**spec, "name": "enrolled-twice"}, headers=once)
        assert again.status_code == 401


async def test_secrets_and_payloads_never_leave_their_place(tmp_path: Path) -> None:
    """Tokens, passwords and payloads are in no log, figure or problem; credentials are in no data file but as hashes."""
    folder = tmp_path / "server"
    secret = f"jwt-secret-{CANARY}-that-is-long-enough-to-be-used"
    server = ServerProcess(folder, log__level="debug", security__jwt_secret=secret).start()
    agent: AgentProcess | None = None
    answers: list[str] = []
    try:
        async with admin(server) as client:
            token = await enrolment(client)
            agent = AgentProcess(tmp_path, "worker", server.url, token).start()
            await agents_online(client, ["worker"])
            password = f"{CANARY}-correct horse battery staple"
            changed = await client.post(
                f"{API}/auth/password",
                json={"username": "admin", "current_password": server.one_time_password, "new_password": password},
            )
            assert changed.status_code == 204, changed.text
            login = await client.post(f"{API}/auth/login", json={"username": "admin", "password": password})
            access = login.json()["access_token"]
            mine = await client.post(f"{API}/auth/tokens", json={"name": "ci"})
            api_token = mine.json()["token"]
            done = await submit(client, "it.echo", {"secret": f"payload-{CANARY}"})
            await in_state(client, done, "completed")
            await submit(client, "it.busy", {"secret": f"payload-{CANARY}"}, retry={"max_attempts": 1})
            bad: list[tuple[str, str, dict[str, Any]]] = [
                ("POST", "/auth/login", {"json": {"username": "admin", "password": f"wrong-{CANARY}"}}),
                ("POST", "/auth/login", {"json": {"username": f"{CANARY}", "password": f"wrong-{CANARY}"}}),
                ("POST", "/auth/login", {"content": f'{{"password": "{CANARY}"', "headers": {"Content-Type": "application/json"}}),
                ("POST", "/auth/login", {"json": {"username": "admin", "password": [CANARY]}}),
                ("GET", f"/tasks?token={CANARY}", {}),
                ("GET", "/tasks", {"headers": {"Authorization": f"Bearer {CANARY}"}}),
                ("GET", "/tasks", {"headers": {"Authorization": f"Bearer mcpt_{CANARY}"}}),
                ("POST", "/tasks", {"content": f'{{"type": "x", "payload": "{CANARY}', "headers": {"Content-Type": "application/json"}}),
                ("POST", "/tasks", {"json": {"type": 5, "payload": CANARY}}),
            ]  # fmt: skip
            for method, path, sent in bad:
                answer = await client.request(method, API + path, **sent)
                assert 400 <= answer.status_code < 500, (path, answer.status_code)
                answers.append(answer.text)
            answers.append((await client.get("/metrics")).text)
            answers.append((await client.get(f"{API}/status")).text)
            answers.append((await client.get(f"{API}/events?limit=500")).text)
    finally:
        if agent is not None:
            agent.kill()
        assert server.stop() == 0
    log = (folder / "server.log").read_text()
    credential = next((tmp_path / "worker" / "agents").glob("*.json")).read_text()
    agent_secret = re.search(r"mcpa_[A-Za-z0-9_]+", credential)
    assert agent_secret is not None
    one_time = server.one_time_password
    assert one_time is not None
    secrets = [token, access, api_token, server.admin_token, agent_secret[0], one_time]
    for text in (*answers, log, agent.log.read_text()):
        assert CANARY not in text
        assert not [secret for secret in secrets if secret in text]
    held = [CANARY.encode() + b"-correct", secret.encode(), *(one.encode() for one in secrets)]
    for path in sorted((folder / "data").rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            assert not [one for one in held if one in content], path
            assert path.stat().st_mode & 0o077 == 0, f"{path} can be read by others"
