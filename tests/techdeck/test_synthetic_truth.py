"""Stages 1 and 2 agree with the truth of generated files, whatever the shape, the container and the compression."""

import hashlib
from pathlib import Path

import polars as pl
import pytest

from mcp_control.techdeck.ingestion import ingest
from mcp_control.techdeck.model import IngestOptions, Options
from mcp_control.techdeck.standardization import standardize
from mcp_control.techdeck.synthetic import Compression, Container, Shape, generate
from mcp_control.techdeck.validation.detectors import CLASSES
from mcp_control.techdeck.validation.stage import validate
from tests.techdeck.stages import quiet, run_path

SHAPES: list[Shape] = ["messages", "alpaca", "sharegpt", "qa", "transcript"]
CONTAINERS: list[Container] = ["jsonl", "json", "csv", "parquet"]
COMPRESSIONS: list[Compression] = ["none", "gzip", "zstd"]
FORMAT = {"messages": "chatml"}
CONTAINER = {"json": "json_array"}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_counts_and_rejects_equal_the_truth(
    shape: Shape, container: Container, compression: Compression, tmp_path: Path
) -> None:
    """Every planted fault is found in its row with its code, and no other row is lost."""
    path = tmp_path / "data.bin"
    truth = generate(path, seed=7, n=300, shape=shape, container=container, compression=compression)

    outcome = run_path(path, tmp_path / "out", Options(ingest=IngestOptions(partition_bytes=100_000)))

    plan = outcome.ingested.plan
    assert (plan.format, plan.container, plan.compression) == (
        FORMAT.get(shape, shape),
        CONTAINER.get(container, container),
        compression,
    )
    assert outcome.ingested.rows_in == truth.rows == 300
    assert len(outcome.ingested.partitions) > 1
    assert outcome.rejected("ingestion") == truth.rejected_rows("ingestion")
    assert outcome.rejected("standardization") == truth.rejected_rows("standardization")
    assert len(outcome.conversations) == truth.accepted("ingestion", "standardization")


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_planted_text_arrives(shape: Shape, container: Container, tmp_path: Path) -> None:
    """Personal data stands in the message the truth names, copies equal their originals, blanks are left alone."""
    path = tmp_path / "data.bin"
    truth = generate(path, seed=3, n=200, shape=shape, container=container)
    by_row = {item["source"]["row"]: item for item in run_path(path, tmp_path / "out").conversations}

    assert len(truth.pii) == 8
    assert all(planted.value in by_row[planted.row]["messages"][planted.message]["content"] for planted in truth.pii)
    assert len(truth.exact) == len(truth.near) == 6
    assert all(by_row[copy]["messages"] == by_row[original]["messages"] for copy, original in truth.exact)
    assert all(by_row[copy]["messages"][1:] == by_row[original]["messages"][1:] for copy, original in truth.near)
    assert all(by_row[copy]["messages"][0] != by_row[original]["messages"][0] for copy, original in truth.near)
    for row, code in truth.rejected_rows("validation").items():
        assert code == "E_EMPTY_CONTENT"
        assert not by_row[row]["messages"][-1]["content"].strip()
    assert [row for row, item in by_row.items() if "W_ENCODING_MIXED" in item["flags"]] == truth.departing


@pytest.mark.parametrize("shape", SHAPES)
def test_validation_equals_the_truth(shape: Shape, tmp_path: Path) -> None:
    """Stage 3 sets the blank rows aside, finds the classes of planted personal data row by row, and nothing else."""
    path = tmp_path / "data.bin"
    truth = generate(path, seed=11, n=600, shape=shape)
    ingested = ingest(path, "data", tmp_path / "raw", Options(), quiet)
    done = standardize(ingested.partitions[0].path, ingested.plan, tmp_path / "standard", Options(), quiet)
    assert done.conversations is not None

    validated = validate(done.conversations, tmp_path / "valid", Options(), quiet)

    assert validated.conversations is not None
    assert validated.quarantine is not None
    quarantine = pl.read_parquet(validated.quarantine)
    assert dict(zip(quarantine["row"], quarantine["code"], strict=True)) == truth.rejected_rows("validation")
    rows = pl.read_parquet(validated.conversations).select("source", "validation").to_dicts()
    found = {row["source"]["row"]: row["validation"]["pii_classes"] for row in rows}
    planted = {planted.row: [planted.kind] for planted in truth.pii}
    assert {row: classes for row, classes in found.items() if classes} == planted
    assert {kind for (kind,) in planted.values()} == set(CLASSES)
    assert sorted(row["source"]["row"] for row in rows if row["validation"]["same_role_pairs"]) == truth.same_role


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_equal_seeds_give_equal_bytes(container: Container, compression: Compression, tmp_path: Path) -> None:
    """The generator depends on its arguments alone; another seed gives another file."""
    digests = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        generate(tmp_path / name, seed=seed, n=80, shape="sharegpt", container=container, compression=compression)
        digests.append(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]


def test_equal_input_gives_equal_output_bytes(tmp_path: Path) -> None:
    """Two runs in different folders write the same partitions, conversations and quarantine, byte for byte."""
    generate(tmp_path / "data", seed=5, n=400)
    options = Options(ingest=IngestOptions(partition_bytes=200_000))
    outputs = []
    for folder in ("first", "second"):
        run_path(tmp_path / "data", tmp_path / folder, options)
        files = sorted(path for path in (tmp_path / folder).rglob("*.parquet"))
        outputs.append({path.relative_to(tmp_path / folder): path.read_bytes() for path in files})
    assert len(outputs[0]) > 6
    assert outputs[0] == outputs[1]
