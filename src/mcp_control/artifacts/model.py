"""Artifacts as they are stored and as callers see them."""

from datetime import datetime
from typing import Final, Literal

import msgspec

from mcp_control.kernel.changes import Field, Index, Kind
from mcp_control.security.model import DEFAULT_TENANT

Role = Literal["input", "intermediate", "output", "report"]


class Artifact(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The stored artifact: a name for a blob. Several artifacts may share one blob; the blob goes with the last of them."""

    id: str
    version: int
    tenant: str = DEFAULT_TENANT
    name: str
    sha256: str
    size: int
    media_type: str = "application/octet-stream"
    role: Role = "intermediate"
    rows: int | None = None
    run_id: str | None = None
    stage: str | None = None
    task_id: str | None = None
    created_at: int
    created_by: str = ""


class ArtifactView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An artifact as callers see it; its bytes are at `/artifacts/{id}/content`."""

    id: str
    name: str
    sha256: str
    size: int
    media_type: str
    role: Role
    rows: int | None = None
    run_id: str | None = None
    stage: str | None = None
    task_id: str | None = None
    created_at: datetime


ARTIFACT_KIND: Final = Kind(
    name="artifact",
    fields=(Field("tenant"), Field("sha256"), Field("run"), Field("name"), Field("created", "int")),
    indexes=(
        Index("artifact_sha", ("sha256", "id")),
        Index("artifact_run", ("run", "id")),
        Index("artifact_created", ("tenant", "created", "id")),
        Index("artifact_name", ("tenant", "name", "created", "id")),
    ),
)
