"""The tree of commands describes itself, starts quickly, and takes common options anywhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mcp_control.cli.main import ordered
from mcp_control.cli.options import loose, seconds
from mcp_control.cli.output import cell, safe
from mcp_control.cli.report import file_name
from tests.cli.conftest import Cli


def test_every_command_has_help_and_is_described(own: Cli) -> None:
    """`commands --json` holds every command with its parameters, and `--help` works for each of them."""
    tree = json.loads(own("commands", "--json").stdout)
    assert tree["exit_codes"]["8"]
    leaves: list[dict[str, object]] = []

    def walk(node: dict[str, object]) -> None:
        below = node.get("commands")
        if isinstance(below, list):
            for one in below:
                walk(one)
        else:
            leaves.append(node)

    walk(tree)
    names = {str(leaf["name"]) for leaf in leaves}
    assert {
        "mcpctl up",
        "mcpctl demo",
        "mcpctl pipelines run",
        "mcpctl tasks explain",
        "mcpctl agents start",
        "mcpctl doctor",
    } <= names
    for leaf in leaves:
        shown = own.inside(*str(leaf["name"]).split()[1:], "--help").stdout
        assert str(leaf["help"]).split()[0] in shown
        assert all(isinstance(one, dict) and (one["help"] or one["kind"] == "argument") for one in leaf["parameters"])


@pytest.mark.parametrize(
    "noun", ["profile", "tokens", "tasks", "agents", "pipelines", "runs", "schedules", "artifacts"]
)
def test_list_is_ls(own: Cli, noun: str) -> None:
    """`list` does what `ls` does, and no help speaks of it."""
    assert own.inside(noun, "list", "--help").stdout == own.inside(noun, "ls", "--help").stdout.replace(
        " ls ", " list "
    )
    assert " list " not in own.inside(noun, "--help").stdout
    assert f"mcpctl {noun} list" not in own.inside("commands").stdout


def test_help_needs_neither_client_nor_server() -> None:
    """What `mcpctl --help` imports is little: no HTTP client, no database, no data library, no event loop."""
    code = (
        "import sys; from mcp_control.cli.main import run; run(['--help']);"
        "heavy = {'httpx2', 'apsw', 'uvicorn', 'polars', 'pydantic', 'yaml', 'asyncio', 'rich'};"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "[]"
    assert "Usage: mcpctl" in done.stdout


def test_the_client_brings_no_heavy_libraries() -> None:
    """Commands that talk to a server import its HTTP client and nothing that only few of them need."""
    code = (
        "import sys; import mcp_control.sdk.client;"
        "heavy = {'apsw', 'uvicorn', 'polars', 'pydantic', 'yaml', 'rich', 'cryptography', 'psutil'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_doctor_and_settings_work_without_a_server(own: Cli, tmp_path: Path) -> None:
    """Both say what a server here would find; a server that is away is no failure of this machine."""
    given = {
        "MCP_CONTROL_DATA": str(tmp_path / "d"),
        "MCP_CONTROL_URL": "http://127.0.0.1:1",
        "JWT_SECRET": "a-secret-of-32-characters-or-more",
    }
    checks = {one["check"]: one["state"] for one in json.loads(own.inside("doctor", "--json", **given).stdout)}
    assert checks["server reachable"] == "warn"
    assert checks["python"] == checks["sqlite"] == checks["data folder"] == "ok"
    shown = own.inside("settings", "show", "--json", **given).stdout
    (data,) = [one for one in json.loads(shown) if one["name"] == "data"]
    assert data["origin"] == "environment"
    assert "a-secret" not in shown


def test_common_options_may_stand_anywhere() -> None:
    """`--profile` and its like go to the front; what follows `--` stays as it is."""
    given = ["tasks", "ls", "--profile", "here", "--json", "--yes", "--", "--profile", "x"]
    assert ordered(given) == ["--profile", "here", "--yes", "tasks", "ls", "--json", "--", "--profile", "x"]


@pytest.mark.parametrize(
    ("text", "value"), [("", None), ("90", 90.0), ("1.5s", 1.5), ("2m", 120.0), ("1h", 3600.0), ("250ms", 0.25)]
)
def test_times_are_read(text: str, value: float | None) -> None:
    """Times are numbers of seconds, or have a unit."""
    assert seconds(text) == value


def test_values_are_json_where_they_are_json() -> None:
    """`--set a=…` takes numbers, truth values and lists as such, and all else as text."""
    assert [loose(text) for text in ("0.5", "true", "[1]", "chatml", "007")] == [0.5, True, [1], "chatml", "007"]


def test_text_from_elsewhere_cannot_steer_the_terminal() -> None:
    """Escape sequences, line ends and marks that turn the direction of text are written out."""
    assert safe("a\x1b[31mb\n\u202ec") == "a\\x1b[31mb\\n\\u202ec"
    assert cell({"a": "\x1b"}) == '{"a":"\\u001b"}'


@pytest.mark.parametrize(
    ("name", "file"),
    [("a.csv", "a.csv"), ("../../etc/passwd", "passwd"), ("..", "art_1"), ("c:\\x\\y", "y"), ("", "art_1")],
)
def test_an_artifact_cannot_choose_its_folder(name: str, file: str) -> None:
    """Whatever an artifact is called, its file is in the folder that was named."""
    assert file_name(name, "art_1") == file
