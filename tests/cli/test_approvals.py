"""The inbox, signals and repetitions from the command line, the Python client and YAML."""

from pathlib import Path

from mcp_control.pipelines.builder import PipelineBuilder
from mcp_control.pipelines.definition import from_yaml, to_json
from mcp_control.pipelines.input_model import Compensate, Param
from mcp_control.sdk.client import Client
from mcp_control.sdk.profiles import Profiles
from tests.cli.conftest import Cli, Up, until

RELEASE = """
apiVersion: mcp-control/v1
kind: Pipeline
metadata: {name: asking}
spec:
  params:
    where: {default: production}
  rerun: {where: "${{ run.id }}"}
  stages:
    - id: ask
      approval:
        title: Deploy to ${{ params.where }}?
        fields: {ticket: {type: string}}
        timeout_seconds: 600
        default: reject
    - id: paid
      needs: [ask]
      wait_for: {signal: payment, match: output.body.order == 7}
    - id: ship
      uses: tests.echo
      needs: [paid]
      with: {amount: "${{ stages.paid.output.body.amount }}", by: "${{ stages.ask.output.by }}"}
      compensate: {uses: tests.echo}
"""


def test_a_run_is_answered_and_signalled_from_the_command_line(cli: Cli, panel: Up, tmp_path: Path) -> None:
    """List, show, refuse what is no field, answer once; send a signal twice and see it once; look at the end."""
    file = tmp_path / "asking.yaml"
    file.write_text(RELEASE)
    cli.inside("pipelines", "apply", str(file))
    run = cli.json("pipelines", "run", "asking", "--budget", "tokens=500", "--budget", "money=2.50")["run_id"]
    budget = cli.json("runs", "budget", run)["budget"]
    assert (budget["tokens"], budget["money_micros"]) == (500, 2_500_000)
    (asked,) = until(lambda: cli.json("approvals", "ls", "--mine", "--run", run))
    assert (asked["title"], asked["options"]) == ("Deploy to production?", ["approve", "reject"])
    assert "Deploy" in cli.inside("approvals", "show", asked["id"][-12:]).stdout
    assert "ticket" in cli.inside("approvals", "answer", asked["id"], "approve", "--set", "tickt=T-1", code=2).stderr
    cli.inside("approvals", "answer", asked["id"], "approve", code=2)
    answered = cli.json("approvals", "answer", asked["id"], "approve", "--set", "ticket=T-1", "--comment", "fine")
    assert (answered["state"], answered["answer"]["fields"]) == ("answered", {"ticket": "T-1"})
    cli.inside("approvals", "answer", asked["id"], "approve", "--set", "ticket=T-1", code=5)
    assert cli.json("approvals", "ls", "--run", run) == []
    body = '{"order": 7, "amount": 20}'
    for _ in range(2):
        sent = cli.json("runs", "signal", run, "payment", "--body", body, "--key", "seven")
        assert sent["name"] == "payment"
    assert len(cli.json("runs", "signals", run)) == 1
    ended = until(lambda: found if (found := cli.json("runs", "get", run))["state"] == "completed" else None)
    assert [stage["state"] for stage in ended["stages"]] == ["completed"] * 3
    again = cli.json("runs", "rerun-rejected", run)
    assert again["labels"] == {"rerun_of": run}
    with Client(panel.url, profiles=Profiles(cli.config, environ={})) as client:
        (question,) = until(lambda: list(client.approvals.iter(run=again["id"], state="pending")))
        assert question.title == f"Deploy to {run}?"
        assert client.approvals.answer(question.id, "reject", fields={"ticket": "T-2"}).answer is not None
        refused = client.runs.get(again["id"])
        assert (refused.state, refused.reason) == ("failed", "rejected")
    changed = cli.json("runs", "retry", again["id"], "--from", "ask", "--set", "where=nowhere", "--reason", "once more")
    assert (changed["state"], changed["retries"][0]["reason"]) == ("input_required", "once more")
    cli.inside("runs", "cancel", again["id"])
    assert cli.json("approvals", "ls", "--run", again["id"], "--state", "withdrawn")[0]["title"] == "Deploy to nowhere?"


def test_python_and_yaml_mean_the_same() -> None:
    """A definition with everything that waits and is undone, written both ways, is the same bytes."""
    p = PipelineBuilder("asking", rerun={"where": "${{ run.id }}"})
    where = p.param("where", default="production")
    ask = p.approval("ask", f"Deploy to {where}?", fields={"ticket": Param()}, timeout_seconds=600, default="reject")
    paid = p.wait_for("paid", "payment", match="output.body.order == 7", needs=[ask])
    p.stage(
        "ship",
        "tests.echo",
        needs=[paid],
        with_={"amount": "${{ stages.paid.output.body.amount }}", "by": "${{ stages.ask.output.by }}"},
        compensate=Compensate(uses="tests.echo"),
    )
    assert to_json(p.build()) == to_json(from_yaml(RELEASE))
