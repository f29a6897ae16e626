"""Tasks, agents and what is common to all commands: formats, ids, exit codes."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import MCPCTL, Cli, Up, until


def test_a_task_is_submitted_waited_for_and_printed_whole(cli: Cli, panel: Up) -> None:
    """`tasks submit TYPE --payload JSON --wait --json` prints the task with its result and exits 0."""
    found = json.loads(cli("tasks", "submit", "tests.echo", "--payload", '{"a": [1, null]}', "--wait", "--json").stdout)
    assert found["state"] == "completed"
    assert found["result"] == {"a": [1, None]}
    assert cli.inside("tasks", "get", found["id"][-12:], "-o", "name").stdout.strip() == found["id"]
    assert "echoing" in cli.inside("tasks", "logs", found["id"]).stdout


def test_a_task_that_failed_is_exit_code_8(cli: Cli, panel: Up) -> None:
    """Who waits for a task that fails learns it from the exit code, and finds it among the failed ones."""
    done = cli("tasks", "submit", "tests.refuse", "--wait", "--json", code=8)
    task_id = json.loads(done.stdout)["id"]
    assert "E_NEVER" in done.stderr
    failed = cli.json("tasks", "ls", "--state", "failed")
    assert task_id in [one["id"] for one in failed]
    assert all(one["state"] == "failed" and one["type"] and one["attempts"] for one in failed)
    assert cli.json("tasks", "watch", task_id, code=8)["id"] == task_id


def test_why_a_task_does_not_run_is_explained(cli: Cli, panel: Up) -> None:
    """`tasks explain ID` names the reason; the wait for it ends with exit code 7 and the task goes on."""
    done = cli("tasks", "submit", "tests.nobody", "--wait", "--timeout", "0.2", "--json", code=7)
    assert "mcpctl tasks watch" in done.stderr
    (task_id,) = cli.inside("tasks", "ls", "--type", "tests.nobody", "-o", "name").stdout.split()
    assert cli.json("tasks", "explain", task_id)["code"] == "no-capable-agent"
    assert "no-capable-agent" in cli.inside("tasks", "explain", task_id).stdout
    assert cli.json("tasks", "cancel", task_id, "--reason", "test")["state"] == "cancelled"


def test_agents_are_listed_drained_and_resumed(cli: Cli, panel: Up) -> None:
    """`agents ls --json` lists whole agents; `agents drain NAME` and `resume` act by name."""
    assert {one["name"] for one in cli.json("agents", "ls")} == {"tests", "techdeck-1"}
    assert cli.json("agents", "drain", "techdeck-1", "--note", "test")["state"] == "draining"
    assert cli.json("agents", "get", "techdeck-1")["note"] == "test"
    assert cli.json("agents", "resume", "techdeck-1")["state"] == "online"


def test_an_empty_list_is_an_empty_list(cli: Cli, panel: Up) -> None:
    """Empty lists print `[]` in JSON and only a head when piped."""
    assert cli.inside("runs", "ls", "--pipeline", "unheard-of", "--json").stdout == "[]\n"
    assert cli.inside("runs", "ls", "--pipeline", "unheard-of").stdout.count("\n") == 1


def test_piped_output_is_tab_separated_and_never_cut(cli: Cli, panel: Up) -> None:
    """A list that is piped has one line per thing, tabs between cells, whole ids and no boxes, however narrow the terminal."""
    cli.inside("tasks", "submit", "tests.echo", "--payload", '"x"', "--wait")
    lines = cli("tasks", "ls", "--limit", "2", COLUMNS="20").stdout.splitlines()
    assert lines[0].split("\t")[:3] == ["ID", "TYPE", "STATE"]
    assert all(len(line.split("\t")) == len(lines[0].split("\t")) for line in lines)
    assert all(len(line.split("\t")[0]) == len("task_") + 36 for line in lines[1:])
    assert not any(character in "".join(lines) for character in "│─┃…\x1b")


@pytest.mark.parametrize("form", ["json", "jsonl", "yaml", "csv", "name"])
def test_every_format_holds_the_same_things(cli: Cli, panel: Up, form: str) -> None:
    """`-o` chooses the form, `--fields` what is in it; the things are the same."""
    import yaml

    wanted = {"tests", "techdeck-1"}
    printed = cli.inside("agents", "ls", "-o", form, *(() if form == "name" else ("--fields", "name,state"))).stdout
    found = {
        "json": lambda: {one["name"] for one in json.loads(printed)},
        "jsonl": lambda: {json.loads(line)["name"] for line in printed.splitlines()},
        "yaml": lambda: {one["name"] for one in yaml.safe_load(printed)},
        "csv": lambda: {line.split(",")[0] for line in printed.splitlines()[1:]},
        "name": lambda: set(printed.split()),
    }[form]()
    assert found == wanted


@pytest.mark.parametrize(
    ("code", "args"),
    [
        (2, ("tasks", "submit", "tests.echo", "--payload", "{")),
        (2, ("tasks", "nothing")),
        (2, ("tasks", "ls", "--state", "unheard-of")),
        (2, ("agents", "start", "no_such_module:agent")),
        (2, ("agents", "retire", "tests", "--no-input")),
        (2, ("--profile", "unheard-of", "status")),
        (2, ("pipelines", "run", "techdeck", "--input", "no-such-file", "--wait")),
        (2, ("pipelines", "run", "techdeck", "--set", "nonsense.x=1")),
        (3, ("tasks", "get", "task_" + "0" * 36)),
        (3, ("runs", "get", "nothing-ends-so")),
        (3, ("pipelines", "run", "unheard-of")),
        (3, ("agents", "drain", "unheard-of")),
        (6, ("status", "--profile", "http://127.0.0.1:1")),
    ],
)
def test_what_goes_wrong_has_its_exit_code(cli: Cli, panel: Up, code: int, args: tuple[str, ...]) -> None:
    """2 wrong use, 3 not found, 6 unreachable: with the reason on standard error and nothing on standard output."""
    done = cli.inside(*args, code=code)
    assert done.stdout == ""
    assert done.stderr


def test_who_may_not_is_told_so(cli: Cli, panel: Up) -> None:
    """A token that is not valid is exit code 4, with the request's id and the next command."""
    done = cli.inside("status", code=4, MCP_CONTROL_TOKEN="mcpt_nonsense")
    assert "mcpctl login" in done.stderr
    assert "request" in done.stderr


def test_what_does_not_fit_the_state_is_a_conflict(cli: Cli, panel: Up) -> None:
    """Cancelling what has ended is exit code 5."""
    task_id = cli.json("tasks", "submit", "tests.echo", "--wait")["id"]
    cli.inside("tasks", "assign", task_id, "tests", code=5)


def test_a_reader_that_leaves_is_no_error(cli: Cli, panel: Up) -> None:
    """`mcpctl … | head` ends quietly."""
    command = f"{MCPCTL[0]} -m mcp_control.cli.main settings show | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=cli.environ, timeout=60)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_any_route_can_be_called(cli: Cli, panel: Up) -> None:
    """`mcpctl api` sends a request as it is, and a refused one has the exit code of its kind."""
    made = json.loads(
        cli.inside("api", "POST", "/tasks?wait=10", "--data", '{"type": "tests.echo", "payload": 7}').stdout
    )
    assert made["result"] == 7
    cli.inside("api", "GET", "/tasks/unheard-of", code=3)
    assert "mcp_control" in cli.inside("api", "GET", "//metrics").stdout


def test_events_are_printed_one_object_per_line(cli: Cli, panel: Up) -> None:
    """`events tail --json` prints what happened after a cursor."""
    lines = cli.inside("events", "tail", "--after", "evt_0", "-n", "3", "--json").stdout.splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["evt_1", "evt_2", "evt_3"]


def test_a_token_is_made_listed_and_revoked(cli: Cli, panel: Up) -> None:
    """A token works until it is revoked, and its secret is printed once."""
    token = cli.inside("tokens", "create", "for a test", "--expires", "1h").stdout.strip()
    assert cli.inside("status", MCP_CONTROL_TOKEN=token, MCP_CONTROL_URL=panel.url).returncode == 0
    listed = cli.inside("tokens", "ls", "--json").stdout
    assert token not in listed
    (token_id,) = [one["id"] for one in json.loads(listed) if one["name"] == "for a test"]
    cli.inside("tokens", "revoke", token_id)
    cli.inside("status", code=4, MCP_CONTROL_TOKEN=token, MCP_CONTROL_URL=panel.url)


def test_an_agent_elsewhere_enrols_with_a_one_time_token(cli: Cli, own: Cli, panel: Up) -> None:
    """`agents enrol` makes the token with which an agent registers that has nothing else."""
    token = cli.inside("agents", "enrol", "--name", "elsewhere").stdout.strip()
    agent = own.background(
        "agents",
        "start",
        "agent_for_tests:agent",
        "--name",
        "elsewhere",
        MCP_CONTROL_URL=panel.url,
        MCP_CONTROL_ENROLMENT_TOKEN=token,
    )
    try:
        until(lambda: any(one["name"] == "elsewhere" for one in cli.json("agents", "ls", "--state", "online")))
    finally:
        agent.terminate()
        agent.communicate(timeout=30)
    assert agent.returncode == 0
    assert cli.json("agents", "retire", "elsewhere", "--yes")["state"] == "retired"


def test_files_go_up_and_come_down_unchanged(cli: Cli, panel: Up, tmp_path: Path) -> None:
    """An artifact that is downloaded has the bytes of the file that was uploaded."""
    source = tmp_path / "some.bin"
    source.write_bytes(bytes(range(256)) * 1000)
    artifact = cli.json("artifacts", "upload", str(source))["id"]
    found = cli.json("artifacts", "download", artifact[-10:], "--output", str(tmp_path / "down"))
    assert Path(found["path"]).read_bytes() == source.read_bytes()
    assert artifact in cli.inside("artifacts", "ls", "--name", "some.bin").stdout
