"""The examples run as they are documented: processes of their own, against a real server."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from mcp_control import Client
from mcp_control.pipelines.definition import from_yaml
from mcp_control.pipelines.definition_model import PipelineSpec
from mcp_control.testing.server import ServerProcess

EXAMPLES = Path(__file__).parents[2] / "examples"
SECONDS = 60


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A server, and the environment in which programs find it."""
    folder = tmp_path_factory.mktemp("examples")
    with ServerProcess(folder / "server") as server:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MCP_CONTROL_")}
        yield {
            **kept,
            "MCP_CONTROL_URL": server.url,
            "MCP_CONTROL_TOKEN": server.admin_token,
            "MCP_CONTROL_CONFIG_DIR": str(folder / "config"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }


@pytest.fixture(scope="module")
def client(environment: dict[str, str]) -> Iterator[Client]:
    with Client(environment["MCP_CONTROL_URL"], token=environment["MCP_CONTROL_TOKEN"]) as there:
        yield there


@contextmanager
def _agent(module: str, name: str, environment: dict[str, str], client: Client) -> Iterator[None]:
    """The agent of an example, started as its docstring says."""
    command = [sys.executable, "-m", "mcp_control.cli.main", "agents", "start", f"{module}:agent"]
    process = subprocess.Popen(command, cwd=EXAMPLES, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + SECONDS
        while not any(agent.name == name and agent.state.value == "online" for agent in client.agents.iter()):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < until, "the agent did not connect"
        yield
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, errors


def _python(script: str, environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=EXAMPLES,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_client_and_the_greeter_do_what_they_say(environment: dict[str, str], client: Client) -> None:
    """Every part of client.py prints what its agent did."""
    with _agent("greeter", "greeter", environment, client):
        lines = _python("client.py", environment).splitlines()
        key = client.tasks.run("stretch-key", {"text": "secret", "rounds": 2}, wait=SECONDS)
    assert lines[:5] == [
        "Hello, Ada!",
        "Hello, Grace!",
        "Hello, number 0!",
        "Hello, number 1!",
        "Hello, number 2!",
    ]
    assert "log greeted" in lines
    assert "completed 100%" in lines
    assert lines[-5:] == ["failed: no-name", "no-capable-agent", "cancelled", "{'lines': 3, 'words': 8}", "True"]
    assert len(key["key"]) == 64


def test_work_in_a_process_ends_when_it_is_cancelled(environment: dict[str, str], client: Client) -> None:
    """The task that keeps a core busy stops at its next check, long before its rounds are over."""
    with _agent("greeter", "greeter", environment, client):
        task = client.tasks.submit("stretch-key", {"text": "secret", "rounds": 1_000_000})
        for update in task.stream():
            if update.progress > 0:
                break
        task.cancel("enough")
        found = task.wait(timeout=SECONDS)
    assert found.state.value == "cancelled"
    assert found.cancel_reason == "enough"


def test_three_stages_run_from_python_and_from_yaml(environment: dict[str, str], client: Client) -> None:
    """The report has a line per person; YAML and Python make one and the same version."""
    with _agent("three_stages", "three-stages", environment, client):
        report = _python("three_stages.py", environment, "Ada", " ", "Grace").splitlines()
        assert report[0].startswith("Greetings of run_")
        assert report[1:] == ["0: Hello, Ada", "1: Hello, Grace"]
        assert client.pipelines.apply(EXAMPLES / "three_stages.yaml").version == 1
        run = client.pipelines.run("three-stages", {"names": ["Ada", ""]})
        view = run.result(timeout=SECONDS)
        assert view.summary == {"greeted": 1}
        assert (view.stages[0].rows_in, view.stages[0].rows_out, view.stages[0].rejected) == (2, 1, 1)
        few = client.pipelines.run("three-stages", {"names": ["Ada"], "at_least": 2}).wait(timeout=SECONDS)
        assert (few.state.value, few.reason) == ("failed", "too-few-people")


def test_the_python_definition_is_the_yaml_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads one has read the other."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import three_stages  # found in the folder of the examples only

    definitions = [
        msgspec.json.decode(msgspec.json.encode(three_stages.pipeline().build()), type=PipelineSpec),
        from_yaml((EXAMPLES / "three_stages.yaml").read_text(encoding="utf-8")),
    ]
    assert definitions[0] == definitions[1]


def test_every_example_is_listed() -> None:
    """The folder's README names each file."""
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    files = {path.name for path in EXAMPLES.iterdir() if path.is_file() and path.name != "README.md"}
    assert files
    assert {name for name in files if f"({name})" not in text} == set()
