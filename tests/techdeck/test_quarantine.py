"""The file of rejected rows that people read."""

import json
from pathlib import Path

import pytest

from mcp_control.techdeck.model import quarantine_frame, reject, write_parquet
from mcp_control.techdeck.quality import quarantine
from mcp_control.techdeck.quality.quarantine import write_quarantine


def _part(path: Path, stage: str, rows: list[int]) -> Path:
    raw = b'{"text": "write to jane.roe@private-mail.org"'
    rejects = [reject(row, row, "E_JSON", f"row {row}", raw) for row in rows]
    write_parquet(quarantine_frame("a.jsonl", stage, rejects), path)
    return path


def test_rejected_rows_are_in_order_and_without_personal_data(tmp_path: Path) -> None:
    """Rows of all stages sorted by row, whatever the order of the parts; addresses are replaced."""
    parts = [_part(tmp_path / "1.parquet", "validation", [4, 1]), _part(tmp_path / "0.parquet", "ingestion", [2])]
    outs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert [write_quarantine(order, out, ["US"]) for order, out in zip((parts, parts[::-1]), outs, strict=True)] == [
        3,
        3,
    ]
    assert outs[0].read_bytes() == outs[1].read_bytes()
    rows = [json.loads(line) for line in outs[0].read_text().splitlines()]
    assert [row["row"] for row in rows] == [1, 2, 4]
    assert "jane.roe" not in outs[0].read_text()
    assert "[EMAIL_1]" in rows[0]["raw"]


def test_the_file_is_bounded_and_empty_without_rejects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rows only; no rejects, no lines."""
    monkeypatch.setattr(quarantine, "LIMIT", 2)
    parts = [_part(tmp_path / "0.parquet", "ingestion", [3, 2, 1])]
    assert write_quarantine(parts, tmp_path / "a.jsonl", ["US"]) == 2
    assert [json.loads(line)["row"] for line in (tmp_path / "a.jsonl").read_text().splitlines()] == [1, 2]
    assert write_quarantine([], tmp_path / "b.jsonl", ["US"]) == 0
    assert (tmp_path / "b.jsonl").read_bytes() == b""
