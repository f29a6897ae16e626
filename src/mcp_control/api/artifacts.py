"""Routes of `/artifacts`: data in and out, streamed, with checked digests."""

import base64
import binascii
import ipaddress
import re
from hmac import compare_digest
from typing import Annotated, Final

import msgspec

from mcp_control.api.call import NO_CONTENT, Call, Reply, invalid, reply
from mcp_control.api.query import PageQuery, Query
from mcp_control.api.routing import Endpoint
from mcp_control.artifacts.model import ArtifactView, Role
from mcp_control.artifacts.service import ArtifactFilter, NewArtifact, view
from mcp_control.kernel.errors import LeaseSuperseded, Problem
from mcp_control.kernel.paging import Page
from mcp_control.security.model import SYSTEM

_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_DIGEST: Final = re.compile(r"sha-256=:([A-Za-z0-9+/=]+):")


class RangeNotSatisfiable(Problem):
    """The range lies outside the content."""

    code, status, title = "range-not-satisfiable", 416, "Range not satisfiable"


class UploadQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the bytes are. Run, stage and task belong to a lease, which an agent presents in `X-Lease-Token`."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=255)] = "artifact"
    media_type: Annotated[str, msgspec.Meta(max_length=127)] = "application/octet-stream"
    role: Role = "input"
    rows: Annotated[int, msgspec.Meta(ge=0, le=2**53)] | None = None
    run_id: str | None = None
    stage: str | None = None
    task_id: str | None = None


class ArtifactsQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Filters; all that are given must hold."""

    run: str | None = None
    name: str | None = None
    role: Role | None = None


class Location(msgspec.Struct, frozen=True, kw_only=True):
    """Where programs on the server's machine find the bytes; null where there is no such file."""

    path: str | None
    sha256: str
    size: int


_UPLOAD: Final = Query(UploadQuery)
_LIST: Final = Query(ArtifactsQuery)


def expected_digest(header: bytes | None) -> str | None:
    """Return the SHA-256 that a Content-Digest (RFC 9530) names, in hexadecimal. Raises Invalid where it names none."""
    if header is None:
        return None
    found = _DIGEST.search(header.decode("latin-1"))
    try:
        digest = base64.b64decode(found[1], validate=True) if found else b""
    except binascii.Error:
        digest = b""
    if len(digest) != 32:
        raise invalid("#/content-digest", "invalid-value", "Content-Digest is sha-256=:<base64 of 32 bytes>:")
    return digest.hex()


def content_digest(sha256: str) -> bytes:
    """Return a Content-Digest for a hexadecimal SHA-256."""
    return b"sha-256=:" + base64.b64encode(bytes.fromhex(sha256)) + b":"


def wanted_range(header: bytes | None, size: int) -> tuple[int, int] | None:
    """Return first and last byte of a range request (RFC 9110, section 14), None for the whole; several ranges get the whole.

    Raises:
        RangeNotSatisfiable: it begins behind the end.
    """
    found = None if header is None else _RANGE.fullmatch(header.decode("latin-1").strip())
    if found is None or found[1] == found[2] == "":
        return None
    if found[1] == "":
        first, last = max(0, size - int(found[2])), size - 1
        satisfiable = int(found[2]) > 0 and size > 0
    else:
        first, last = int(found[1]), min(int(found[2] or size - 1), size - 1)
        satisfiable = first < size
        if found[2] and int(found[2]) < first:
            return None
    if not satisfiable:
        raise RangeNotSatisfiable(f"there are {size} bytes", size=size)
    return first, last


async def _owned(call: Call, query: UploadQuery) -> NewArtifact:
    """Return what is known of an upload; an agent may only name the task it holds, and what that task belongs to."""
    new = NewArtifact(
        name=query.name,
        media_type=query.media_type,
        role=query.role,
        rows=query.rows,
        run_id=query.run_id,
        stage=query.stage,
        task_id=query.task_id,
    )
    if call.actor.kind != "agent" or (new.run_id is None and new.stage is None and new.task_id is None):
        return new
    if new.task_id is None:
        raise invalid("#/task_id", "missing-field", "an agent names the task it works on")
    # An agent may not read tasks; here the lease token decides.
    task = await call.services.tasks.one(msgspec.structs.replace(SYSTEM, tenant=call.actor.tenant), new.task_id)
    token = call.headers.get(b"x-lease-token", b"")
    if task.lease is None or not compare_digest(task.lease.token.encode(), token):
        raise LeaseSuperseded("the lease of this task is not the one presented")
    if (new.run_id or task.links.run_id, new.stage or task.links.stage) != (task.links.run_id, task.links.stage):
        raise invalid("#/run_id", "invalid-value", "the task belongs to another run or stage")
    return msgspec.structs.replace(new, run_id=task.links.run_id, stage=task.links.stage)


async def upload_artifact(call: Call) -> Reply:
    """Store a stream of bytes under a name; a Content-Digest is checked before it counts."""
    query = call.query(_UPLOAD)
    digest = expected_digest(call.headers.get(b"content-digest"))
    call.body_max = call.services.settings.limits.max_artifact_bytes
    artifact = await call.services.artifacts.upload(call.actor, await _owned(call, query), call.stream(), digest)
    return reply(view(artifact), 201, ((b"content-digest", content_digest(artifact.sha256)),))


async def list_artifacts(call: Call) -> Reply:
    """List artifacts: of a run in the order they were made, else newest first."""
    query = call.query(_LIST)
    return reply(await page_of(call, ArtifactFilter(run=query.run, name=query.name, role=query.role), query))


async def page_of(call: Call, wanted: ArtifactFilter, query: PageQuery) -> Page[ArtifactView]:
    """Return a page of artifacts as callers see them."""
    page = await call.services.artifacts.list(call.actor, wanted, limit=query.limit, cursor=query.cursor)
    return Page(items=[view(artifact) for artifact in page.items], next_cursor=page.next_cursor)


async def get_artifact(call: Call) -> Reply:
    """Return what is known of an artifact."""
    return reply(view(await call.services.artifacts.get(call.actor, call.params["artifact_id"])))


async def artifact_content(call: Call) -> Reply:
    """Return the bytes of an artifact, or a range of them."""
    artifact_id = call.params["artifact_id"]
    artifact = await call.services.artifacts.get(call.actor, artifact_id)
    tag = b'"' + artifact.sha256.encode() + b'"'
    headers = [(b"etag", tag), (b"accept-ranges", b"bytes"), (b"content-digest", content_digest(artifact.sha256))]
    if call.headers.get(b"if-none-match") == tag:
        return Reply(304, b"", headers)
    # A browser must not take what somebody uploaded for a page of this server.
    headers += [(b"content-type", artifact.media_type.encode()), (b"content-disposition", b"attachment")]
    wanted = wanted_range(call.headers.get(b"range"), artifact.size)
    first, last = wanted or (0, artifact.size - 1)
    headers.append((b"content-length", b"%d" % (last - first + 1)))
    if wanted is not None:
        headers.append((b"content-range", b"bytes %d-%d/%d" % (first, last, artifact.size)))
    _, chunks = await call.services.artifacts.content(call.actor, artifact_id, first, last - first + 1)
    return Reply(200 if wanted is None else 206, b"", headers, chunks)


async def artifact_location(call: Call) -> Reply:
    """Return the file that holds an artifact, for programs on the server's own machine."""
    artifact, path = await call.services.artifacts.location(call.actor, call.params["artifact_id"])
    near = call.scope["client"] is not None and ipaddress.ip_address(call.scope["client"][0]).is_loopback
    return reply(
        Location(path=str(path) if path is not None and near else None, sha256=artifact.sha256, size=artifact.size)
    )


async def delete_artifact(call: Call) -> Reply:
    """Remove an artifact, and its bytes when it was the last to name them."""
    await call.services.artifacts.delete(call.actor, call.params["artifact_id"])
    return NO_CONTENT


_ONE: Final = "/artifacts/{artifact_id}"

ENDPOINTS: Final = (
    Endpoint(
        method="POST", path="/artifacts", handler=upload_artifact, summary="Upload an artifact", tag="artifacts",
        weight="keep", query=_UPLOAD,
        returns=ArtifactView, status=201, body_type="application/octet-stream",
    ),
    Endpoint(
        method="GET", path="/artifacts", handler=list_artifacts, summary="List artifacts", tag="artifacts",
        query=_LIST, returns=Page[ArtifactView],
    ),
    Endpoint(method="GET", path=_ONE, handler=get_artifact, summary="Get an artifact", tag="artifacts", returns=ArtifactView),
    Endpoint(
        method="GET", path=f"{_ONE}/content", handler=artifact_content, summary="Download an artifact", tag="artifacts",
        produces=("application/octet-stream",), statuses=(206, 304), any_media=True,
    ),
    Endpoint(method="GET", path=f"{_ONE}/location", handler=artifact_location, summary="Locate an artifact", tag="artifacts",
        returns=Location),
    Endpoint(method="DELETE", path=_ONE, handler=delete_artifact, summary="Delete an artifact", tag="artifacts", status=204),
)  # fmt: skip
