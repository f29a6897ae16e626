"""Stage 6: every format in every container reads back as the same conversations."""

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mcp_control.techdeck.export.export import Exported, export
from mcp_control.techdeck.export.formats import convert
from mcp_control.techdeck.model import ExportOptions, Options, Plan
from mcp_control.techdeck.processing.metrics import METRICS
from mcp_control.techdeck.quality.report import StageCount
from tests.techdeck.conversations import Turns, combined, frame, processed, quiet

PLAN = Plan(format="chatml", container="jsonl", file="a.jsonl", sha256="0" * 64)
ODD = 'He said: "no, never";\n\n\ttab, comma, \u2028 line, \U0001f642 é | {"a": [1]} \\ end'
FORMATS = ["chatml", "sharegpt", "alpaca"]
CONTAINERS = ["jsonl", "csv", "parquet"]


def _talks(count: int) -> list[Turns]:
    rows: list[Turns] = []
    for number in range(count):
        talk: Turns = [("system", f"prompt {number}")] if number % 3 == 0 else []
        for turn in range(1 + number % 3):
            talk += [("user", f"question {number} {turn} {ODD}"), ("assistant", f"answer {number} {turn} {ODD}")]
        rows.append(talk)
    return rows


def _export(
    data: pl.DataFrame | None, folder: Path, form: str, container: str, cuts: list[int] | None = None
) -> tuple[Exported, dict[str, Any]]:
    options = Options(export=msgspec.convert({"format": form, "container": container}, ExportOptions))
    results = [] if data is None else processed(data, folder, cuts)
    result = export(
        [part.path for part in reversed(results)],
        combined(results, folder).assignments,
        {"score": 0.9, "gate": "passed"},
        [StageCount(name="ingestion", rows_in=0, rows_out=0, rejected=0)],
        PLAN,
        folder / "export",
        options,
        quiet,
    )
    return result, json.loads(result.manifest.read_bytes())


def _rows(path: Path, container: str) -> list[dict[str, Any]]:
    if container == "parquet":
        return pl.read_parquet(path).to_dicts()
    if container == "jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    with path.open(encoding="utf-8", newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    for row in rows:
        for name in {"messages", "conversations", "history"} & row.keys():
            row[name] = json.loads(row[name])
        row["tokens"] = int(row["tokens"])
    return rows


def _turns(row: dict[str, Any], form: str) -> Turns:
    """The conversation an exported row holds."""
    if form == "chatml":
        return [(message["role"], message["content"]) for message in row["messages"]]
    if form == "sharegpt":
        back = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool"}
        return [(back[message["from"]], message["value"]) for message in row["conversations"]]
    talk: Turns = [("system", row["system"])] if row["system"] else []
    for question, answer in [*row["history"], [row["instruction"], row["output"]]]:
        talk += [("user", question), ("assistant", answer)]
    return talk


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("form", FORMATS)
def test_what_is_written_reads_back_as_the_same_conversations(tmp_path: Path, form: str, container: str) -> None:
    """Quotes, line breaks, emoji and JSON inside texts survive; every row has the same fields."""
    talks = _talks(40)
    meta: list[dict[str, object]] = [{"n": number, "odd": ODD} for number in range(40)]
    result, _ = _export(frame(talks, meta=meta), tmp_path, form, container)
    found = {row["id"]: row for file in result.files for row in _rows(file.path, container)}
    assert {name: _turns(row, form) for name, row in found.items()} == {f"c{n}": talk for n, talk in enumerate(talks)}
    assert len({tuple(row) for row in found.values()}) == 1
    assert json.loads(found["c7"]["meta"]) == {"n": 7, "odd": ODD}
    assert json.loads(found["c7"]["labels"]) == []
    assert found["c7"]["tokens"] > 0


@pytest.mark.parametrize("container", CONTAINERS)
def test_files_do_not_depend_on_partitions(tmp_path: Path, container: str) -> None:
    """The same bytes for any division, given in any order, and twice."""
    data = frame(_talks(30))
    digests = [
        [file.sha256 for file in _export(data, tmp_path / str(number), "chatml", container, cuts)[0].files]
        for number, cuts in enumerate([None, None, [10], [3, 3, 29]])
    ]
    assert digests[0] == digests[1] == digests[2] == digests[3]


def test_the_manifest_names_every_file_with_its_digest(tmp_path: Path) -> None:
    """Rows, bytes and SHA-256 equal those of the files; counts add up; copies are left out and counted."""
    talks = _talks(20)
    result, manifest = _export(frame([*talks, talks[0], talks[1]]), tmp_path, "chatml", "jsonl")
    for file in manifest["files"]:
        data = (tmp_path / "export" / file["name"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert file["rows"] == data.count(b"\n")
    assert sum(file["rows"] for file in manifest["files"]) == manifest["counts"]["rows"] == result.rows_out == 20
    assert manifest["counts"]["duplicates"] == result.duplicates == 2
    assert result.rows_in == result.rows_out + result.duplicates + result.rejected


def test_the_card_has_front_matter_from_the_manifest(tmp_path: Path) -> None:
    """Languages, size and data files as the hub reads them; a hostile file name stays text."""
    result, manifest = _export(frame(_talks(20)), tmp_path, "sharegpt", "parquet")
    text = result.card.read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["size_categories"] == ["n<1K"]
    assert [item["path"] for item in values["configs"][0]["data_files"]] == [
        file["name"] for file in manifest["files"] if file["rows"]
    ]
    assert values["language"] == [item["name"] for item in manifest["languages"] if item["name"] != "und"] or ["und"]
    assert all(file["sha256"] in body for file in manifest["files"])
    assert all(f"| {file['rows']:,} | {file['bytes']:,} |" in body for file in manifest["files"])
    assert "Overall score 0.9000, gate passed" in body


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("form", FORMATS)
def test_an_empty_data_set_exports(tmp_path: Path, form: str, container: str) -> None:
    """Three readable files without rows, a manifest and a card."""
    result, manifest = _export(None, tmp_path, form, container)
    assert [file.rows for file in result.files] == [0, 0, 0]
    assert all(_rows(file.path, container) == [] for file in result.files)
    assert manifest["counts"]["rows"] == 0
    assert "size_categories" in result.card.read_text()


def _alpaca(*talks: Turns) -> list[dict[str, Any]]:
    metrics = pl.lit(None, dtype=pl.Struct(METRICS)).alias("metrics")
    return convert(frame(list(talks)).with_columns(metrics), "alpaca").frame.to_dicts()


def test_alpaca_joins_neighbours_and_keeps_earlier_turns_as_history() -> None:
    """Two questions in a row become one; an answer before any question gets an empty question."""
    (row,) = _alpaca(
        [
            ("system", "s"),
            ("assistant", "hello"),
            ("user", "a"),
            ("user", "b"),
            ("assistant", "c"),
            ("user", "d"),
            ("assistant", "e"),
        ]
    )
    assert (row["instruction"], row["input"], row["output"], row["system"]) == ("d", "", "e", "s")
    assert row["history"] == [["", "hello"], ["a\n\nb", "c"]]


def test_what_alpaca_cannot_say_is_counted() -> None:
    """Tool messages and talks without an answer are left out, a last open question is cut."""
    metrics = pl.lit(None, dtype=pl.Struct(METRICS)).alias("metrics")
    talks: list[Turns] = [
        [("user", "a"), ("tool", "t"), ("assistant", "b")],
        [("user", "a")],
        [("user", "a"), ("assistant", "b"), ("user", "c")],
        [("user", "a"), ("assistant", "b")],
    ]
    done = convert(frame(talks).with_columns(metrics), "alpaca")
    assert (done.dropped, done.trimmed) == (2, 1)
    assert done.frame["id"].to_list() == ["c2", "c3"]
    assert done.frame["history"].to_list() == [[], []]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.text(min_size=1, max_size=12), st.text(min_size=1, max_size=12)), min_size=1, max_size=3),
        max_size=5,
    )
)
def test_alpaca_keeps_every_alternating_talk(pairs: list[list[tuple[str, str]]]) -> None:
    """History and the last pair give the talk back, for any text."""
    talks: list[Turns] = [
        [turn for question, answer in talk for turn in (("user", question), ("assistant", answer))] for talk in pairs
    ]
    assert [_turns(row, "alpaca") for row in _alpaca(*talks)] == talks
