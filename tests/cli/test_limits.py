"""Limits from the command line."""

from tests.cli.conftest import Cli, Up


def test_a_limit_from_its_making_to_its_end(cli: Cli, panel: Up) -> None:
    """Set it, see it, change it, remove it; what is wrong is said and nothing is kept."""
    made = cli.json(
        "limits", "set", "per-customer", "--type", "report.*", "--label", "team=a", "--key", "labels.customer",
        "--concurrency", 'labels.tier == "premium" ? 10 : 1',
    )  # fmt: skip
    assert (made["name"], made["key"], made["match"]) == (
        "per-customer",
        "labels.customer",
        {"type": "report.*", "labels": {"team": "a"}},
    )
    assert cli.json("limits", "set", "mail", "--rate", "100/1m", "--burst", "5")["rate"] == {
        "count": 100,
        "seconds": 60.0,
        "burst": 5,
    }
    assert [one["name"] for one in cli.json("limits", "ls")] == ["mail", "per-customer"]
    assert cli.json("limits", "set", "mail", "--concurrency", "3")["concurrency"] == 3
    assert cli.json("limits", "show", "mail")["concurrency"] == 3
    assert "per-customer" in cli.inside("limits", "ls").stdout
    cli.inside("limits", "rm", "mail", "--yes")
    cli.inside("limits", "show", "mail", code=3)
    for wrong in (("--rate", "often"), (), ("--concurrency", "params.n"), ("--concurrency", "0")):
        cli.inside("limits", "set", "never", *wrong, code=2)
    assert "never" not in cli.inside("limits", "ls").stdout
