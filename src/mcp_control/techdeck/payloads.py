"""What travels between the tasks of a techdeck run: ids of artifacts and counts, never rows.

Light on purpose: the agent process imports this module without the data libraries.
"""

from typing import Any

import msgspec

Counts = dict[str, int]


class PartRef(msgspec.Struct, frozen=True, kw_only=True):
    """A partition: the artifact that holds it and its rows."""

    artifact: str
    rows: int


class FileFault(msgspec.Struct, frozen=True, kw_only=True):
    """A fault of the whole input that still left readable rows."""

    code: str
    detail: str


class Rejected(msgspec.Struct, frozen=True, kw_only=True):
    """What an earlier run set aside: its id, the quarantine artifacts of its stages, and the corrected records where there are any."""

    run: str = ""
    fixed: str | None = None
    parts: list[list[str]] = []


class IngestionIn(msgspec.Struct, frozen=True, kw_only=True):
    """`input` is the artifact to read; `options` is a tree of `model.Options`, as far as it differs from the defaults.

    `rejected` keeps the rows that an earlier run of the same input set aside, unless corrected records are read in their place.
    """

    input: str
    rejected: Rejected = Rejected()
    options: dict[str, Any] = {}


class IngestionOut(msgspec.Struct, frozen=True, kw_only=True):
    """Raw partitions and the plan by which each of them is standardized."""

    partitions: list[PartRef]
    quarantine: list[str]
    plan: dict[str, Any]
    counts: Counts
    rejected_by_code: Counts
    errors: list[FileFault]


class PartIn(msgspec.Struct, frozen=True, kw_only=True):
    """One partition of a fan-out. `plan` is for standardization, `total_rows` (of the data set) for processing."""

    part: PartRef
    options: dict[str, Any] = {}
    plan: dict[str, Any] = {}
    total_rows: int | None = None


class PartOut(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one partition; `partition` is None when no row is left. `stats` and `signatures` are artifacts."""

    partition: PartRef | None = None
    quarantine: str | None = None
    counts: Counts
    rejected_by_code: Counts = {}
    by_format: Counts = {}
    warnings_by_code: Counts = {}
    stats: str | None = None
    signatures: str | None = None


class CombineIn(msgspec.Struct, frozen=True, kw_only=True):
    """The results of all partitions, in their order."""

    items: list[PartOut]
    options: dict[str, Any] = {}


class StageOut(msgspec.Struct, frozen=True, kw_only=True):
    """A fan-out stage as the next one sees it. `summary` of validation is an artifact with `ValidationSummary` as JSON."""

    partitions: list[PartRef]
    quarantine: list[str]
    counts: Counts
    rejected_by_code: Counts
    by_format: Counts = {}
    warnings_by_code: Counts = {}
    validation: str | None = None


class ProcessingOut(msgspec.Struct, frozen=True, kw_only=True):
    """Processed partitions, their signatures and the table that assigns duplicates and splits, as artifacts."""

    partitions: list[PartRef]
    signatures: list[str]
    assignments: str
    counts: Counts
    exact: int
    near: int
    clusters: int
    leaks: int
    splits: Counts
    kept: Counts


class StageRows(msgspec.Struct, frozen=True, kw_only=True):
    """Rows through a stage before this one."""

    name: str
    counts: Counts
    rejected_by_code: Counts = {}


class QualityIn(msgspec.Struct, frozen=True, kw_only=True):
    """All that the report shows. `quarantine` are the artifacts of all stages."""

    processing: ProcessingOut
    validation: str
    plan: dict[str, Any]
    stages: list[StageRows]
    quarantine: list[list[str]] = []
    options: dict[str, Any] = {}


class QualityOut(msgspec.Struct, frozen=True, kw_only=True):
    """`gate` is passed, failed, warned or off; `failed` names the conditions that do not hold."""

    score: float | None
    gate: str
    failed: list[str]
    report: str
    page: str
    quarantine: str | None
    counts: Counts
    summary: dict[str, Any]


class ExportIn(msgspec.Struct, frozen=True, kw_only=True):
    """What to write. `errors` are the input's, handed on so that the run ends failed with its files kept."""

    processing: ProcessingOut
    plan: dict[str, Any]
    stages: list[StageRows]
    score: float | None
    gate: str
    errors: list[FileFault] = []
    rejected: Rejected = Rejected()
    options: dict[str, Any] = {}


class ExportedRef(msgspec.Struct, frozen=True, kw_only=True):
    """A written file: its artifact, digest, and rows where it holds conversations."""

    name: str
    artifact: str
    sha256: str
    rows: int | None = None


class ExportOut(msgspec.Struct, frozen=True, kw_only=True):
    """The files of the run."""

    files: list[ExportedRef]
    counts: Counts
    duplicates: int
    errors: list[FileFault]
    summary: dict[str, Any]
