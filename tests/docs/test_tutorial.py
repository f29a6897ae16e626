"""The tutorial and the README's first agent, done as a reader would do them: same files, same commands, real processes."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT, Block, blocks

SECONDS = 90


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A reader's terminal: the commands on the path, a home of its own, any free port."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MCP_CONTROL_")}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}",
        "MCP_CONTROL_CONFIG_DIR": str(tmp_path / "config"),
        "MCP_CONTROL_PORT": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


@contextmanager
def _background(command: str, sign: str, folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """A terminal of its own: the command runs until Ctrl-C; `sign` is what it prints when it is ready."""
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    seen: list[str] = []
    try:
        for line in process.stdout:
            seen.append(line)
            if sign in line:
                break
        else:
            pytest.fail("".join(seen))
        yield
    finally:
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, "".join(seen) + rest


def _run(command: str, code: int, folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _step(block: Block, folder: Path, environment: dict[str, str], terminals: ExitStack) -> str:
    """Do what a block's marks say; returns what it printed."""
    if "file" in block.marks:
        (folder / block.marks["file"]).write_text(block.text, encoding="utf-8")
    if "background" in block.marks:
        terminals.enter_context(_background(block.text.strip(), block.marks["background"], folder, environment))
    if "run" in block.marks:
        code = re.fullmatch(r"exit (\d+)", block.marks["run"])
        command = block.marks["run"] if block.marks["run"] and not code else block.text
        return _run(command, int(code[1]) if code else 0, folder, environment)
    return ""


@pytest.mark.timeout(300)
def test_the_tutorial_works_from_start_to_end(tmp_path: Path, environment: dict[str, str]) -> None:
    """Every marked block in order, with the results the text tells of."""
    folder = tmp_path / "reader"
    folder.mkdir()
    printed = ""
    with ExitStack() as terminals:
        for block in blocks(DOCS / "tutorial.md"):
            printed += _step(block, folder, environment, terminals)
    for told in (
        "Hello, Ada",
        "worked at attempt 3",
        "no-capable-agent",
        "Hello, Edsger",
        "completed 100%",
        "techdeck-1",
    ):
        assert told in printed, told
    assert {path.name for path in (folder / "out").iterdir()} >= {
        "train.jsonl",
        "validation.jsonl",
        "test.jsonl",
        "manifest.json",
        "README.md",
        "report.json",
        "report.html",
        "quarantine.jsonl",
    }


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", ["limits.md", "schedules.md", "shares.md"])
def test_the_commands_of_a_page_work(page: str, tmp_path: Path, environment: dict[str, str]) -> None:
    """Every marked block of a page of a noun, on a server that has just been started."""
    marked = [block for block in blocks(DOCS / page) if "run" in block.marks]
    assert marked
    with _background("mcpctl up --data panel", "Ready", tmp_path, environment), ExitStack() as terminals:
        for block in marked:
            _step(block, tmp_path, environment, terminals)


def test_the_first_agent_of_the_readme_works(tmp_path: Path, environment: dict[str, str]) -> None:
    """Ten lines of agent, started and used by the very commands below them, from the shell and from Python."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## A first agent")[2].partition("\n## ")[0]
    agent, client = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (commands,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    start, submit = commands.replace(".venv/bin/", "").strip().splitlines()
    (tmp_path / "hello.py").write_text(agent, encoding="utf-8")
    (tmp_path / "client.py").write_text(client, encoding="utf-8")
    assert len([line for line in agent.splitlines() if line.strip() and not line.startswith("#")]) <= 10
    with (
        _background("mcpctl up --data panel", "Ready", tmp_path, environment),
        _background(start.rstrip("& "), "agent.connected", tmp_path, environment),
    ):
        assert '"result":{"text":"Hello, Ada"}' in _run(submit, 0, tmp_path, environment)
        assert _run("python client.py", 0, tmp_path, environment) == "{'text': 'Hello, Ada'}\n"
