"""Pipelines and their runs from the command line: the exact commands that programs build on."""

import contextlib
import hashlib
import json
import os
import pty
import re
import signal
import subprocess
import termios
from pathlib import Path
from typing import Any

import pytest

from mcp_control.techdeck.synthetic import Truth, generate
from tests.cli.conftest import HERE, MCPCTL, Cli, Up, until

STAGES = ["ingestion", "standardization", "validation", "processing", "quality_assessment", "export"]
ROWS = 120


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    """A file of conversations, and the truth about it."""
    path = tmp_path_factory.mktemp("data") / "conversations.jsonl"
    return path, generate(path, seed=7, n=ROWS)


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def finished(
    cli: Cli, panel: Up, data: tuple[Path, Truth], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """What `pipelines run … --wait --json` printed, and the folder of the results."""
    folder = tmp_path_factory.mktemp("results") / "new"
    done = cli(
        "pipelines", "run", "techdeck", "--input", str(data[0]), "--output", str(folder),
        "--set", "export.format=alpaca", "--set", "export.container=csv", "--set", "quality.gate=warn", "--wait", "--json",
    )  # fmt: skip
    return json.loads(done.stdout), folder


def test_a_run_is_one_object_and_its_files_are_there(
    finished: tuple[dict[str, Any], Path], data: tuple[Path, Truth]
) -> None:
    """The object names run, state, stages, quality and artifacts; each file has the digest it tells."""
    found, folder = finished
    assert set(found) == {"run_id", "state", "stages", "quality", "artifacts"}
    assert found["state"] == "completed"
    assert [stage["name"] for stage in found["stages"]] == STAGES
    assert all(set(stage) == {"name", "state", "rows_in", "rows_out", "rejected"} for stage in found["stages"])
    assert found["stages"][0]["rows_in"] == ROWS
    assert sum(stage["rejected"] for stage in found["stages"]) == len(data[1].rejects)
    assert set(found["quality"]) == {"score", "gate"}
    assert 0 < found["quality"]["score"] <= 1
    assert all(set(file) == {"name", "path", "sha256", "rows"} for file in found["artifacts"])
    assert {"report.json", "report.html", "manifest.json", "train.csv"} <= {file["name"] for file in found["artifacts"]}
    assert all(
        Path(file["path"]).parent == folder and _sha256(file["path"]) == file["sha256"] for file in found["artifacts"]
    )
    header = (folder / "train.csv").read_text().partition("\n")[0]
    assert '"instruction","input","output"' in header


def test_get_and_watch_print_that_object(cli: Cli, finished: tuple[dict[str, Any], Path]) -> None:
    """`runs get` and `runs watch` print what `pipelines run --wait` printed, but for the local files."""
    whole = finished[0]
    whole = {**whole, "artifacts": [{**file, "path": None} for file in whole["artifacts"]]}
    run_id = whole["run_id"]
    assert cli.json("runs", "get", run_id) == whole
    assert cli.json("runs", "watch", run_id[-10:]) == whole
    assert run_id in cli.inside("runs", "ls").stdout
    assert {task["stage"] for task in cli.json("runs", "tasks", run_id)} == set(STAGES)
    assert json.loads(cli.inside("runs", "output", run_id, "ingestion").stdout)["counts"]["rows_in"] == ROWS


def test_a_terminal_gets_what_fits_it(
    cli: Cli, panel: Up, finished: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """On 100 columns no line runs on: grouped numbers, short digests, names in the folder; tables are a blank line apart."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 100))
    folder = tmp_path / "a-folder-with-a-name-that-would-fill-half-of-the-line-if-it-stood-there"
    shown = subprocess.Popen(
        [*MCPCTL, "runs", "get", finished[0]["run_id"], "--output", str(folder)],
        stdin=theirs, stdout=theirs, stderr=theirs, env={**cli.environ, "NO_COLOR": "1", "COLUMNS": "100"}, cwd=HERE,
    )  # fmt: skip
    os.close(theirs)
    written = b""
    with contextlib.suppress(OSError):  # a terminal whose last user has gone
        while read := os.read(ours, 65536):
            written += read
    os.close(ours)
    assert shown.wait(30) == 0
    bare = re.sub(r"\x1b\[[0-9;]*m", "", written.decode())  # NO_COLOR leaves bold
    lines = bare.replace("\r\n", "\n").rstrip("\n").split("\n")
    assert lines[0].startswith("completed  score 0.")
    assert lines[1] == f"Report: {folder / 'report.html'}"
    assert max(len(line) for line in lines if not line.startswith("Report: ")) <= 100
    assert all(line == line.rstrip() for line in lines)
    blank = [place for place, line in enumerate(lines) if not line]
    assert [lines[place + 1].split()[0] for place in blank] == ["STAGE", "FILE"]
    digests = {file["name"]: file["sha256"] for file in finished[0]["artifacts"]}
    assert f"train.csv {digests['train.csv'][:12]}" in {
        f"{line.split()[0]} {line.split()[-1]}" for line in lines[blank[1] + 1 :]
    }


def test_results_can_be_fetched_later(cli: Cli, finished: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """`runs artifacts ID --output DIR` downloads what the run made."""
    listed = cli.json("runs", "artifacts", finished[0]["run_id"], "--output", str(tmp_path))
    assert {(file["name"], _sha256(file["path"])) for file in listed} == {
        (file["name"], file["sha256"]) for file in finished[0]["artifacts"]
    }


def test_without_wait_the_run_id_comes_at_once(cli: Cli, panel: Up, data: tuple[Path, Truth]) -> None:
    """`pipelines run` without `--wait` prints `{"run_id"}`; the run can be paused, resumed, cancelled; watching it then is exit code 8."""
    found = cli.json("pipelines", "run", "techdeck", "--input", str(data[0]))
    assert set(found) == {"run_id"}
    run_id = found["run_id"]
    assert cli.json("runs", "pause", run_id, "--reason", "test")["state"] == "paused"
    assert cli.json("runs", "resume", run_id)["state"] in ("pending", "running")
    cli.inside("runs", "cancel", run_id)
    assert cli.json("runs", "watch", run_id, code=8)["state"] == "cancelled"
    assert set(cli.json("runs", "get", run_id)) == {"run_id", "state", "stages", "quality", "artifacts"}


def test_a_run_that_fails_its_gate_is_exit_code_8_and_leaves_its_report(
    cli: Cli, panel: Up, data: tuple[Path, Truth], tmp_path: Path
) -> None:
    """The report is downloaded, nothing is exported, and the next step is told."""
    done = cli(
        "pipelines", "run", "techdeck", "--input", str(data[0]), "--output", str(tmp_path / "o"),
        "--set", "quality.threshold=0.999", "--wait", "--json", code=8,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["state"] == "failed"
    assert found["quality"]["gate"] == "failed"
    names = {file["name"] for file in found["artifacts"]}
    assert "report.json" in names
    assert not any(name.startswith("train") for name in names)
    assert all(_sha256(file["path"]) == file["sha256"] for file in found["artifacts"])
    assert "gate-failed" in done.stderr
    assert "quality.gate=warn" in done.stderr


def test_ctrl_c_leaves_the_run_and_says_how_to_follow_it(cli: Cli, panel: Up, data: tuple[Path, Truth]) -> None:
    """Interrupting the wait does not cancel what was waited for."""
    run_id = cli.json("pipelines", "run", "techdeck", "--input", str(data[0]), "--set", "quality.gate=warn")["run_id"]
    cli.inside("runs", "pause", run_id)
    watcher = cli.background("runs", "watch", run_id)
    assert watcher.stderr is not None
    until(lambda: any(task["state"] == "completed" for task in cli.json("runs", "tasks", run_id)))
    watcher.stderr.readline()  # it follows
    watcher.send_signal(signal.SIGINT)
    _, err = watcher.communicate(timeout=20)
    assert watcher.returncode == 130
    assert f"mcpctl runs watch {run_id}" in err
    assert cli.json("runs", "get", run_id)["state"] == "paused"
    cli.inside("runs", "cancel", run_id)


def test_definitions_are_checked_and_applied(cli: Cli, panel: Up, tmp_path: Path) -> None:
    """A dry run keeps nothing; applying twice makes one version; a wrong definition is refused place by place."""
    file = tmp_path / "two.yaml"
    file.write_text(
        "apiVersion: mcp-control/v1\nkind: Pipeline\nmetadata: {name: two}\nspec:\n  params: {text: {type: string}}\n  stages:\n"
        "    - {id: one, uses: tests.echo, with: {text: '${{ params.text }}'}}\n"
        "    - {id: two, uses: tests.echo, needs: [one], with: {all: '${{ stages.one.output }}'}}\n"
    )
    assert cli.json("pipelines", "apply", str(file), "--dry-run")["valid"] is True
    cli.inside("pipelines", "get", "two", code=3)
    assert [cli.json("pipelines", "apply", str(file))["version"] for _ in range(2)] == [1, 1]
    assert "one --> two" in cli.inside("pipelines", "graph", "two").stdout
    done = cli.json("pipelines", "run", "two", "--set", "text=007", "--wait")
    assert done["state"] == "completed"
    assert json.loads(cli.inside("runs", "output", done["run_id"], "two").stdout) == {"all": {"text": "007"}}
    assert cli.inside("pipelines", "run", "two", "--set", "txt=1", code=2).stderr.count("text") == 1
    file.write_text(file.read_text().replace("needs: [one]", "needs: [none]"))
    assert "dag-unknown-node" in cli.inside("pipelines", "validate", str(file), code=2).stderr


def test_the_demo_does_everything_and_leaves_nothing_running(own: Cli, tmp_path: Path) -> None:
    """`mcpctl demo` generates data, runs it through three agents, prints stages and files, and exits 0."""
    done = own("demo", "--rows", "200", "--output", str(tmp_path / "out"), "--agents", "2")
    for stage in STAGES:
        assert stage in done.stdout
    verdict, report_page = done.stdout.splitlines()[:2]
    assert re.fullmatch(r"completed  score 0\.\d{4}  gate passed", verdict)
    assert report_page == f"Report: {tmp_path / 'out' / 'report.html'}"
    for line in (tmp_path / "out" / "manifest.json", tmp_path / "out" / "report.html"):
        assert line.is_file()
    assert _sha256(str(tmp_path / "out" / "train.jsonl")) in done.stdout
    assert "planted bad rows" in done.stderr
    assert not own.config.exists()
