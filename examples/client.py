"""A client: submit and wait, many at once, follow a task, cancel, upload and download. Needs the agent of `greeter.py`.

Run it with `python client.py`.
"""

import tempfile
from pathlib import Path

import msgspec

from mcp_control import Client, TaskFailed, TaskSpec
from mcp_control.sdk.errors import ApiProblem


def main() -> None:
    """Show each of them, one after the other."""
    with Client() as client:
        # One task: submitted, done by an agent, its result. The key makes a repetition return this very task.
        print(client.tasks.run("greet", {"name": "Ada"}, wait=30)["text"])
        task = client.tasks.submit("greet", {"name": "Grace"}, priority="high", labels={"from": "client.py"}, retries=2)
        print(task.result(timeout=30)["text"])

        # Many tasks in one request; each has a handle or a problem of its own.
        specs = [TaskSpec(type="greet", payload=msgspec.Raw(b'{"name": "number %d"}' % n)) for n in range(3)]
        for handle in client.tasks.submit_many(specs):
            print(handle if isinstance(handle, ApiProblem) else handle.result(timeout=30)["text"])

        # Progress and log lines while it runs.
        for update in client.tasks.submit("greet", {"name": "Edsger", "times": 3}).stream():
            print(f"log {update.line.message}" if update.line else f"{update.state.value} {update.progress:.0%}")

        # A task that failed tells why; `explain` tells why one waits.
        try:
            client.tasks.run("greet", {"name": " "}, wait=30)
        except TaskFailed as error:
            print(f"{error.task.state.value}: {error.task.failure.code if error.task.failure else ''}")
        waiting = client.tasks.submit("nobody-does-this")
        print(client.tasks.explain(waiting.id).code)
        print(waiting.cancel("not needed").state.value)

        # Files: up, through an agent, and down again with the digest checked.
        with tempfile.TemporaryDirectory() as name:
            source = Path(name) / "poem.txt"
            source.write_text("so much depends\nupon\na red wheel barrow\n", encoding="utf-8")
            stored = client.artifacts.upload(source, media_type="text/plain", role="input")
            print(client.tasks.run("count-words", {"artifact": stored.id}, wait=30))
            copy = client.artifacts.download(stored.id, Path(name) / "copy.txt")
            print(copy.read_bytes() == source.read_bytes())


if __name__ == "__main__":
    main()
