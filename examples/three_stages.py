"""The pipeline of `three_stages.yaml` in Python, and the agent that does its tasks.

`mcpctl agents start three_stages:agent` runs the agent; `python three_stages.py Ada Grace` defines the pipeline, runs it and prints the
report.
"""

import sys

from mcp_control import Agent, Client, Pipeline, RetryPolicy, SyncContext
from mcp_control.pipelines.definition_model import Combine, FanOut, Gate

agent = Agent("three-stages", slots=4)


@agent.task("prepare")
def prepare(payload: dict[str, list[str]]) -> dict[str, object]:
    """Clean the names. What stands under `counts` is shown with the stage."""
    people = [name.strip() for name in payload["names"] if name.strip()]
    counts = {
        "rows_in": len(payload["names"]),
        "rows_out": len(people),
        "rejected": len(payload["names"]) - len(people),
    }
    return {"people": people, "counts": counts}


@agent.task("greet-one")
async def greet_one(payload: dict[str, object]) -> str:
    """Greet one person: one task for each element."""
    return f"{payload['number']}: Hello, {payload['person']}"


@agent.task("gather")
def gather(payload: dict[str, list[str]]) -> dict[str, list[str]]:
    """Follow all greetings; their results come in order."""
    return {"lines": payload["greetings"]}


@agent.task("write-report")
def write_report(payload: dict[str, object], ctx: SyncContext) -> dict[str, object]:
    """Store the report as a file of the run. What stands under `summary` is shown with the run."""
    lines = payload["lines"]
    assert isinstance(lines, list)
    text = "\n".join([str(payload["title"]), *lines, ""])
    view = ctx.artifacts.upload(text.encode(), "report.txt", media_type="text/plain", role="output", rows=len(lines))
    return {"artifact": view.id, "summary": {"greeted": len(lines)}}


def pipeline() -> Pipeline:
    """Return the definition."""
    p = Pipeline("three-stages", description="Prepares names, greets each of them, reports.")
    names = p.param("names", "array", description="Whom to greet.")
    p.param(
        "at_least",
        "integer",
        default=1,
        description="Fewer people than this fail the run at the gate of the first stage.",
    )
    first = p.stage(
        "prepare",
        "prepare",
        with_={"names": names},
        gate=Gate(
            check="size(output.people) >= params.at_least",
            reason="too-few-people",
            message="There are fewer people than at_least.",
        ),
    )
    greeted = p.stage(
        "greet",
        "greet-one",
        needs=[first],
        with_={"person": "${{ item }}", "number": "${{ index }}"},
        retry=RetryPolicy(max_attempts=5, first_seconds=0.2),
        timeout=30,
        fan_out=FanOut(
            over="stages.prepare.output.people", combine=Combine(uses="gather", with_={"greetings": "${{ items }}"})
        ),
    )
    p.stage(
        "report",
        "write-report",
        needs=[first, greeted],
        with_={"title": "Greetings of ${{ run.id }}", "lines": "${{ stages.greet.output.lines }}"},
    )
    return p


def main(names: list[str]) -> None:
    """Define the pipeline (the same definition twice is one version), run it and print its report."""
    with Client() as client:
        client.pipelines.apply(pipeline())
        run = client.pipelines.run("three-stages", {"names": names})
        run.result(timeout=60)
        print(client.artifacts.read(run.output("report")["artifact"]).decode(), end="")


if __name__ == "__main__":
    main(sys.argv[1:] or ["Ada", "Grace", "Edsger"])
