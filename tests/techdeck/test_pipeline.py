"""The pipeline over a real server: definition, agents, artifacts, gate and what a person gets in the end."""

import csv
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from mcp_control.pipelines.validate import validate
from mcp_control.sdk.agent import Agent
from mcp_control.sdk.client import AsyncClient
from mcp_control.sdk.profiles import Profiles
from mcp_control.sdk.runs import AsyncRunHandle
from mcp_control.techdeck.agent import agent as techdeck
from mcp_control.techdeck.plugin import pipelines
from mcp_control.techdeck.synthetic import Truth, generate
from mcp_control.testing.server import running_server

SEEDED = 7
(DEFINITION,) = pipelines()


def _agent(name: str, url: str, token: str, folder: Path) -> Agent:
    agent = Agent(
        name,
        url=url,
        profiles=Profiles(folder / name, {"MCP_CONTROL_ENROLMENT_TOKEN": token, "MCP_CONTROL_URL": url}),
        cancel_grace=1.0,
    )
    for handler in techdeck.handlers.values():
        agent.add(handler)
    return agent


@asynccontextmanager
async def _panel(folder: Path, agents: int = 1) -> AsyncIterator[AsyncClient]:
    """A server with the pipeline and some agents."""
    async with running_server(folder) as server:
        token = await server.enrolment_token()
        workers = [_agent(f"deck-{number}", server.url, token, folder) for number in range(agents)]
        client = AsyncClient(server.url, token=server.admin_token)
        for worker in workers:
            await worker.start()
        try:
            await client.pipelines.apply(DEFINITION)
            yield client
        finally:
            for worker in workers:
                await worker.stop()
            await client.close()


async def _run(client: AsyncClient, source: Path, **params: Any) -> AsyncRunHandle:
    view = await client.artifacts.upload(source, role="input")
    run = await client.pipelines.run("techdeck", {"input": view.id, **params})
    await run.wait(timeout=90)
    return run


async def _digests(run: AsyncRunHandle) -> dict[str, str]:
    return {view.name: view.sha256 async for view in run.artifacts() if view.role in ("output", "report")}


def _source(folder: Path, **shape: Any) -> tuple[Path, Truth]:
    path = folder / "data.jsonl"
    return path, generate(path, seed=SEEDED, n=200, **shape)


def test_the_definition_is_accepted_and_the_agent_does_all_of_it() -> None:
    """No error, and no task type that nobody offers."""
    spec = DEFINITION
    assert validate(spec, set(techdeck.handlers)) == []
    assert [stage.id for stage in spec.spec.stages] == [
        "ingestion",
        "standardization",
        "validation",
        "processing",
        "quality_assessment",
        "export",
    ]


async def test_a_run_gives_the_known_truth_and_files_that_check_out(tmp_path: Path) -> None:
    """Rows and rejects per stage, duplicates, digests; the quarantine names every row set aside."""
    source, truth = _source(tmp_path)
    async with _panel(tmp_path / "server") as client:
        run = await _run(client, source, quality={"gate": "warn"})
        view = await run.get()
        assert view.state == "completed", view.message
        for stage, name in zip(view.stages, ("ingestion", "standardization", "validation"), strict=False):
            assert stage.rejected == sum(item.stage == name for item in truth.rejects)
        kept = truth.accepted("ingestion", "standardization", "validation")
        assert view.stages[3].rows_out == kept
        export = await run.output("export")
        assert export["duplicates"] == len(truth.exact) + len(truth.near)
        assert export["counts"]["rows_out"] == kept - export["duplicates"]
        contents = {file["name"]: await client.artifacts.read(file["artifact"]) for file in export["files"]}
        assert {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()} == {
            file["name"]: file["sha256"] for file in export["files"]
        }
        rows = [
            orjson.loads(line) for name in contents if name.endswith(".jsonl") for line in contents[name].splitlines()
        ]
        assert len(rows) == export["counts"]["rows_out"]
        quality = await run.output("quality_assessment")
        aside = (await client.artifacts.read(quality["quarantine"])).splitlines()
        assert {(row["row"], row["code"]) for row in map(json.loads, aside)} == {
            (item.row, item.code) for item in truth.rejects
        }
        assert view.summary["quality"] == {
            "score": quality["score"],
            "gate": quality["gate"],
            "failed": quality["failed"],
        }


async def test_the_same_input_gives_the_same_bytes_with_any_number_of_agents(tmp_path: Path) -> None:
    """One agent or two, several partitions: every exported file and the report are equal."""
    source, _ = _source(tmp_path)
    found = []
    for agents in (1, 2):
        async with _panel(tmp_path / str(agents), agents) as client:
            run = await _run(client, source, ingest={"partition_bytes": 60_000}, quality={"gate": "warn"})
            assert len((await run.output("ingestion"))["partitions"]) > 2
            found.append(await _digests(run))
    assert found[0] == found[1]
    assert {"train.jsonl", "validation.jsonl", "test.jsonl", "manifest.json", "README.md"} < set(found[0])


async def test_a_failed_gate_ends_the_run_with_its_report_and_without_export(tmp_path: Path) -> None:
    """Reason `gate-failed`; the export stage never runs."""
    source, _ = _source(tmp_path)
    async with _panel(tmp_path / "server") as client:
        run = await _run(client, source, quality={"threshold": 0.99})
        view = await run.get()
        assert (view.state, view.reason) == ("failed", "gate-failed")
        assert set(await _digests(run)) == {"report.json", "report.html", "quarantine.jsonl"}


async def test_a_damaged_input_exports_what_is_left_and_fails(tmp_path: Path) -> None:
    """Reason `input-damaged`, and the rows before the damage are there."""
    source, _ = _source(tmp_path, compression="gzip")
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    async with _panel(tmp_path / "server") as client:
        run = await _run(client, source, export={"format": "alpaca", "container": "csv"}, quality={"gate": "off"})
        view = await run.get()
        assert (view.state, view.reason) == ("failed", "input-damaged")
        export = await run.output("export")
        assert [error["code"] for error in export["errors"]] == ["E_TRUNCATED"]
        train = next(file for file in export["files"] if file["name"] == "train.csv")
        text = (await client.artifacts.read(train["artifact"])).decode()
        assert len(list(csv.DictReader(text.splitlines(keepends=True)))) == train["rows"] > 0


@pytest.mark.parametrize(
    ("content", "params", "code"),
    [
        (b"", {}, "E_EMPTY"),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), {}, "E_BINARY"),
        (b'{"a": 1}\n', {"export": {"format": "klingon"}}, "invalid-options"),
        (b'{"a": 1}\n', {"quality": {"gait": "warn"}}, "invalid-options"),
    ],
)
async def test_a_bad_file_or_option_is_a_permanent_error(
    tmp_path: Path, content: bytes, params: dict[str, Any], code: str
) -> None:
    """One attempt, a stable code, and nothing after it."""
    source = tmp_path / "data.csv"
    source.write_bytes(content)
    async with _panel(tmp_path / "server") as client:
        run = await _run(client, source, **params)
        assert (await run.get()).state == "failed"
        (task,) = [task async for task in run.tasks()]
        assert task.failure is not None
        assert (task.failure.code, task.failure.error_class, task.attempt) == (code, "permanent", 1)
