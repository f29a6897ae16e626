"""Schedules from the command line."""

import json
from pathlib import Path
from typing import Any

from tests.cli.conftest import Cli, Up, until


def test_a_schedule_from_its_making_to_its_end(cli: Cli, panel: Up) -> None:
    """Make one, look ahead, start it by hand, let it fire, stop it, fill in the past, remove it."""
    ahead = cli.json(
        "schedules", "create", "tidy", "--cron", "30 2 29 3 *", "--timezone", "Europe/Berlin", "--task", "echo", "--dry-run"
    )  # fmt: skip
    assert ahead[0]["local"].endswith("-03-29T02:30:00+02:00") or ahead[0]["local"].endswith("-03-29T03:00:00+02:00")
    made = cli.json(
        "schedules", "create", "tidy", "--every", "1s", "--overlap", "allow", "--task", "echo",
        "--payload", '{"slot": "${{ run.slot }}"}', "--label", "team=a",
    )  # fmt: skip
    assert (made["name"], made["state"], made["when"]) == ("tidy", "active", "every 1 s")
    assert made["spec"]["task"]["labels"] == {"team": "a"}
    assert len(cli.json("schedules", "next", "tidy", "-n", "3")) == 3
    by_hand = cli.json("schedules", "trigger", "tidy", "--key", "one")
    assert cli.json("schedules", "trigger", "tidy", "--key", "one") == by_hand

    def fired() -> list[dict[str, Any]]:
        return [one for one in cli.json("schedules", "fires", "tidy") if one["source"] == "schedule"]

    (first, *_) = until(lambda: found if len(found := fired()) > 1 else None)
    task = cli.json("tasks", "get", first["target"])
    assert task["labels"] == {"schedule": "tidy", "team": "a"}
    assert cli.json("schedules", "pause", "tidy", "--reason", "enough")["state"] == "paused"
    assert "tidy" in cli.inside("schedules", "ls").stdout
    assert cli.json("schedules", "resume", "tidy")["state"] == "active"
    window = ("--from", "2026-01-01T00:00:00Z", "--to", "2026-01-01T00:00:03Z")
    assert len(cli.json("schedules", "backfill", "tidy", *window, "--dry-run")) == 3
    cli.inside("schedules", "backfill", "tidy", *window, "--width", "3")
    until(lambda: sum(one["source"] == "backfill" for one in cli.json("schedules", "fires", "tidy")) == 3)
    cli.inside("schedules", "rm", "tidy", "--yes")
    cli.inside("schedules", "get", "tidy", code=3)


def test_a_file_makes_a_schedule_what_it_says(cli: Cli, panel: Up, tmp_path: Path) -> None:
    """`apply` makes it, and changes it; `get` gives back what `apply` reads."""
    file = tmp_path / "nightly.yaml"
    file.write_text("name: nightly\ncron: 30 2 * * *\ntimezone: Europe/Berlin\ntask: {type: echo}\n")
    made = cli.json("schedules", "apply", str(file))
    file.write_text(json.dumps({**made["spec"], "cron": "0 3 * * *"}))
    changed = cli.json("schedules", "apply", str(file))
    assert (changed["id"], changed["when"]) == (made["id"], "0 3 * * * Europe/Berlin")
    assert cli.json("schedules", "get", "nightly", "--fields", "spec")["spec"] == changed["spec"]


def test_a_time_that_never_comes_is_refused_with_its_place(cli: Cli, panel: Up) -> None:
    """The message names the field; nothing is kept."""
    for cron in ("61 * * * *", "@every -1s", "0 0 30 2 *"):
        done = cli.inside("schedules", "create", "never", "--cron", cron, "--task", "echo", code=2)
        assert "cron" in done.stderr
    assert "never" not in cli.inside("schedules", "ls").stdout
