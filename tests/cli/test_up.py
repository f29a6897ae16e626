"""`mcpctl up`: what it starts, what it says, and that nothing of it outlives it."""

import signal
import stat
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mcp_control.sdk.profiles import Profiles
from mcp_control.techdeck.synthetic import generate
from tests.cli.conftest import Cli, Up, until

Start = Callable[..., Up]


def test_up_makes_mcpctl_work_at_once(cli: Cli, panel: Up) -> None:
    """The profile that `up` writes is for its owner alone, and no secret is on a command line."""
    assert cli.json("status")["agents"] == {"online": 2}
    file = cli.config / "profiles.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (profile,) = Profiles(cli.config, environ={}).all()
    assert profile.url == panel.url
    shown = [" ".join(process.cmdline()) for process in psutil.Process(panel.process.pid).children(recursive=True)]
    assert shown
    assert not any(mark in line for line in shown for mark in (profile.token, "mcpt_", "mcpe_", "mcpa_"))
    assert profile.token not in cli("profile", "ls", "--json").stdout


def test_up_tells_a_person_what_they_need(own: Cli, tmp_path: Path) -> None:
    """The first start prints the one-time password and, when it is ready, the address; the second one no password."""
    for first in (True, False):
        up = own.background("up", "--data", str(tmp_path / "data"), "--port", "0", "--log-level", "error")
        assert up.stdout is not None
        lines: list[str] = []
        while not lines or not lines[-1].startswith("Ready: http://127.0.0.1:"):
            lines.append(up.stdout.readline())
            assert lines[-1]
        up.terminate()
        assert up.communicate(timeout=20) == ("", "")
        assert up.returncode == 0
        assert any("one-time password: " in line for line in lines) == first


def test_a_second_up_on_the_same_data_says_so_in_one_line(cli: Cli, panel: Up) -> None:
    """Whether or not the port is free, the data folder's user is named; a taken port alone is told, too."""
    for port in ("0", panel.url.rpartition(":")[2]):
        done = cli("up", "--data", str(panel.data), "--port", port, code=1)
        assert done.stderr.count("\n") == 1
        assert "in use by another server" in done.stderr
        assert str(panel.process.pid) in done.stderr
    done = cli("up", "--data", str(panel.data) + "-other", "--port", panel.url.rpartition(":")[2], code=1)
    assert "--port" in done.stderr


def test_the_first_password_is_shown_once_and_must_be_changed(own: Cli, started: Start) -> None:
    """`login` with the one-time password asks for another; the profile and the agents go on after a restart on another port."""
    up = started("--agents", "1")
    password = up.told["one_time_password"]
    (own.config / "profiles.json").unlink()
    own.inside("status", code=4, MCP_CONTROL_URL=up.url)
    new = "Nine-Lime-Trees-41"
    own("login", up.url, "--password-stdin", code=2, stdin=f"{password}\n")
    own("login", up.url, "--password-stdin", "--name", "here", stdin=f"{password}\n{new}\n")
    assert own.json("--profile", "here", "status")["url"] == up.url
    own("login", up.url, "--password-stdin", code=4, stdin=f"{password}\n")
    assert up.stop(signal.SIGINT) == 0
    again = started("--agents", "1")
    assert again.told["one_time_password"] is None
    assert own.json("status")["agents"] == {"online": 1}
    assert len(own.json("agents", "ls")) == 1


def test_up_ends_in_good_order(own: Cli, started: Start) -> None:
    """SIGTERM drains the agents, ends the server with exit code 0 and leaves no process; the profile's token outlives a restart."""
    up = started("--agents", "2")
    agents = up.agents()
    assert len(agents) == 2
    token = Profiles(own.config, environ={}).all()[0].token
    assert up.stop() == 0
    assert not any(agent.is_running() for agent in agents)
    port = int(up.url.rpartition(":")[2])
    started("--agents", "0", port=port)
    assert Profiles(own.config, environ={}).all()[0].token == token
    assert own.json("status")["agents"] == {"offline": 2}


def test_agents_end_with_their_server_even_after_kill_9(own: Cli, started: Start, tmp_path: Path) -> None:
    """No agent, and no worker process of one, outlives a server that was killed, though it is in the middle of a task."""
    up = started("--agents", "2")
    generate(tmp_path / "data.jsonl", seed=3, n=3000)
    own.inside("pipelines", "run", "techdeck", "--input", str(tmp_path / "data.jsonl"))
    until(lambda: own.json("tasks", "ls", "--state", "running"))
    family = psutil.Process(up.process.pid).children(recursive=True)
    assert len(family) > 2
    assert up.stop(signal.SIGKILL) == -signal.SIGKILL
    until(lambda: not any(_lives(process) for process in family), 15)


def test_an_agent_that_crashes_is_started_again(own: Cli, started: Start) -> None:
    """A killed agent process comes back under the same name."""
    up = started("--agents", "1")
    (first,) = up.agents()
    first.kill()
    until(lambda: any(agent.pid != first.pid and _lives(agent) for agent in up.agents()))
    until(lambda: own.json("status")["agents"] == {"online": 1})
    assert len(own.json("agents", "ls")) == 1


def test_wrong_settings_are_named(own: Cli, tmp_path: Path) -> None:
    """A setting that cannot be is refused with its name, as wrong use."""
    assert "port" in own.inside("up", "--data", str(tmp_path / "d"), "--port", "70000", code=2).stderr
    assert "without TLS" in own.inside("up", "--data", str(tmp_path / "d"), "--host", "192.0.2.1", code=2).stderr


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(("level", "heard"), [("info", True), ("warning", False)])
def test_local_agents_log_as_their_server_does(own: Cli, tmp_path: Path, level: str, heard: bool) -> None:
    """Form and level of the settings file hold for the agents as well."""
    config = tmp_path / "config.toml"
    config.write_text(f'[log]\nlevel = "{level}"\nformat = "console"\n')
    up = own.background(
        "up", "--json", "--data", str(tmp_path / "data"), "--port", "0", "--agents", "1", "--config", str(config)
    )
    assert up.stdout is not None
    assert up.stdout.readline()
    up.terminate()
    _, errors = up.communicate(timeout=30)
    assert up.returncode == 0
    assert not any(line.startswith("{") for line in errors.splitlines())
    assert ("[mcp_control.agent]" in errors) == heard
