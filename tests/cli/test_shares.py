"""Shares and explanations of runs at the command line."""

import json
from pathlib import Path

from tests.cli.conftest import Cli, Up, until

PIPELINE = """
metadata: {name: cli-explained}
spec:
  stages:
  - {id: first, uses: tests.unheard-of}
  - {id: second, uses: tests.echo, needs: [first]}
"""


def test_shares_are_weighted_and_listed(cli: Cli, panel: Up) -> None:
    """`shares set KEY --weight` counts whatever tasks say, `shares ls` shows what was served, and without --weight they say again."""
    found = cli.json("shares", "set", "cli-a", "--weight", "2.5")
    assert (found["key"], found["weight"], found["ordered"]) == ("cli-a", 2.5, True)
    done = cli("tasks", "submit", "tests.echo", "--share", "cli-a", "--weight", "4", "--wait", "--json")
    assert json.loads(done.stdout)["state"] == "completed"
    until(lambda: {one["key"]: one for one in cli.json("shares", "ls")}["cli-a"]["served"] == 1)
    assert "cli-a\t2.5" in cli("shares", "ls").stdout
    found = cli.json("shares", "set", "cli-a")
    assert (found["weight"], found["ordered"]) == (4.0, False)


def test_a_run_is_explained_stage_by_stage(cli: Cli, panel: Up, tmp_path: Path) -> None:
    """`runs explain ID` names the first reason and shows each stage that has not ended; `--stage` asks for one."""
    file = tmp_path / "pipeline.yaml"
    file.write_text(PIPELINE)
    cli.inside("pipelines", "apply", str(file))
    run_id = cli.json("pipelines", "run", "cli-explained")["run_id"]
    found = cli.json("runs", "explain", run_id)
    assert (found["code"], [stage["code"] for stage in found["stages"]]) == (
        "no-capable-agent",
        ["no-capable-agent", "needs-not-done"],
    )
    assert cli.json("runs", "explain", run_id, "--stage", "second")["held_by"] == ["first"]
    assert "it waits for first" in cli.inside("runs", "explain", run_id).stdout
    cli.inside("runs", "cancel", run_id)
