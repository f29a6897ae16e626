"""Groups from the command line."""

import json

from tests.cli.conftest import Cli, Up


def test_a_group_is_made_waited_for_and_tried_again_from_the_command_line(cli: Cli, panel: Up) -> None:
    """Make one with a callback, wait for its end, list its tasks, retry what failed; an open one is added to and sealed."""
    tasks = json.dumps(
        [{"type": "tests.echo", "payload": {"page": 1}}, {"type": "tests.refuse", "retry": {"max_attempts": 1}}]
    )
    made = cli.json(
        "groups", "create", tasks, "--name", "import", "--on", "ended=tests.echo", "--key", "import-1", "--wait", code=8
    )
    assert (made["state"], made["counts"]) == ("failed", {"completed": 1, "failed": 1})
    told = cli.json("tasks", "get", made["callbacks"]["ended"])["payload"]["group"]
    assert (told["name"], told["event"], told["failed"]) == ("import", "ended", [made["first_failure"]])
    assert (
        cli.json("groups", "create", tasks, "--name", "import", "--on", "ended=tests.echo", "--key", "import-1")["id"]
        == (made["id"])
    )
    (bad,) = cli.json("tasks", "ls", "--group", made["id"], "--state", "failed")
    assert bad["id"] == made["first_failure"]
    assert cli.json("groups", "retry", made["id"][-12:])["round"] == 1
    again = cli.json("groups", "wait", made["id"], code=8)
    assert (again["state"], again["total"], again["first_failure"] != bad["id"]) == ("failed", 2, True)
    opened = cli.json("groups", "create", "--open")
    assert cli.json("groups", "add", opened["id"], '[{"type": "tests.nobody.in.groups"}]')["total"] == 1
    assert cli.json("groups", "seal", opened["id"])["state"] == "sealed"
    cli.inside("groups", "add", opened["id"], '[{"type": "tests.nobody.in.groups"}]', code=5)
    assert cli.json("groups", "cancel", opened["id"], "--yes")["state"] == "cancelling"
    assert cli.json("groups", "wait", opened["id"], code=8)["state"] == "cancelled"
    assert [one["id"] for one in cli.json("groups", "ls", "--name", "import")] == [made["id"]]
    assert "EVENT=TYPE" in cli.inside("groups", "create", "--on", "someday=tests.echo", code=2).stderr
