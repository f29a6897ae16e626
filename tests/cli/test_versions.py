"""Definitions from the command line: what is wrong with them, what would become of them, what changed, and their end."""

from pathlib import Path

from tests.cli.conftest import Cli, Up, until

TEXT = (
    "metadata: {name: versions}\nspec:\n  params: {text: {}, days: {type: array}}\n  stages:\n"
    "    - {id: one, uses: tests.echo, with: {text: '${{ params.text }}'}}\n"
    "    - id: each\n      uses: tests.echo\n      needs: [one]\n      with: {day: '${{ item }}'}\n"
    "      fan_out: {over: params.days}\n"
)


def test_every_fault_of_a_file_is_told_like_a_compiler_does(cli: Cli, panel: Up, tmp_path: Path) -> None:
    """`validate` names file, line, column and code of all faults at once, and exits 2; in JSON with pointers."""
    file = tmp_path / "wrong.yaml"
    file.write_text(TEXT.replace("uses: tests.echo\n", "uses: 5\n").replace("[one]", "[none]"))
    done = cli.inside("pipelines", "validate", str(file), code=2)
    assert f"{file}:7:7: " in done.stderr
    assert f"{file}:8:15: " in done.stderr
    assert "[wrong-type]" in done.stderr
    assert "[dag-unknown-node]" in done.stderr
    file.write_text("metadata: {name: x}\nspec: {stages: [}\n")
    assert f"{file}:2:" in cli.inside("pipelines", "apply", str(file), code=2).stderr


def test_a_plan_says_who_could_take_it_and_how_long_it_would_take(cli: Cli, panel: Up, tmp_path: Path) -> None:
    """Without agents nothing is routable; after some work there is a history; parameters give the size of a fan-out."""
    file = tmp_path / "versions.yaml"
    file.write_text(TEXT)
    found = cli.json("pipelines", "plan", str(file), "--params", '{"days": [1, 2, 3]}')
    assert [stage["tasks"] for stage in found["stages"]] == [1, 3]
    assert any("text" in warning for warning in found["warnings"])
    assert found["critical_path"] == ["one", "each"]
    for _ in range(3):
        cli.inside("tasks", "submit", "tests.echo", "--payload", "1", "--wait")

    def known() -> bool:
        return bool(cli.json("pipelines", "plan", str(file), "--set", "text=a", "--params", '{"days": []}')["known"])

    until(known)
    (statistic,) = [one for one in cli.json("tasks", "statistics") if one["type"] == "tests.echo"]
    assert statistic["completed"] >= 1
    assert 0 < statistic["p50"] <= statistic["p99"]
    shown = cli.inside("pipelines", "plan", str(file), "--set", "text=a", "--params", '{"days": [1]}')
    assert "critical path: one > each" in shown.stderr
    assert shown.stdout.splitlines()[0].startswith("STAGE\tUSES\tAGENTS")
    assert "has no parameter day" in cli.inside("pipelines", "plan", str(file), "--set", "day=a", code=2).stderr


def test_versions_are_listed_compared_and_deleted(cli: Cli, panel: Up, tmp_path: Path) -> None:
    """`diff` shows what changed, `delete` takes one version or all, and says no while a run uses it."""
    file = tmp_path / "versions.yaml"
    text = TEXT.replace("tests.echo", "tests.absent")
    file.write_text(text)
    assert cli.json("pipelines", "apply", str(file))["version"] == 1
    file.write_text(text.replace("id: each\n", "id: every\n").replace("metadata: {", "metadata: {description: d, "))
    assert cli.json("pipelines", "apply", str(file))["version"] == 2
    assert [one["version"] for one in cli.json("pipelines", "versions", "versions")] == [2, 1]
    shown = cli.inside("pipelines", "diff", "versions").stdout.splitlines()
    assert shown == [
        "versions: version 1 to 2", '+ /metadata/description: "d"', "- stage each", "+ stage every",
    ]  # fmt: skip
    assert cli.json("pipelines", "diff", "versions", "2", "1")["removed"] == ["every"]
    assert (
        cli.json("pipelines", "plan", "versions", "--version", "1", "--set", "text=1")["stages"][1]["stage"] == "each"
    )
    run = cli.json("pipelines", "run", "versions", "--params", '{"text": "a", "days": [1]}', "--version", "1")["run_id"]
    refused = cli.inside("pipelines", "delete", "versions", "--version", "1", "--yes", code=5)
    assert run in refused.stderr
    cli.inside("runs", "cancel", run)
    until(lambda: cli.json("runs", "get", run)["state"] == "cancelled")
    cli.inside("pipelines", "delete", "versions", "--version", "1", "--yes")
    assert cli.json("pipelines", "get", "versions")["version"] == 2
    cli.inside("pipelines", "delete", "versions", "--yes")
    cli.inside("pipelines", "get", "versions", code=3)
