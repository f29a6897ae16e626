"""Results of tasks that are kept for later runs with the same input."""

from hashlib import sha256
from typing import Final

import msgspec

from mcp_control.kernel.changes import Field, Index, Kind

_SEPARATOR: Final = b"\x1f"


class StageResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A result that is kept, or only the note that a run is still needed by another that used a result of it.

    Attributes:
        id: of a result, the digest of all that decided it; see `key_of`.
        run_id: the run that made it; it and its artifacts stay as long as this does.
        until: when it is forgotten, wall milliseconds.
    """

    id: str
    run_id: str
    until: int


def key_of(tenant: str, type: str, version: str, code: str, payload: bytes) -> str:
    """Return the id of a result: the digest of the task's type and the range of its version, the code's version, and the input."""
    head = _SEPARATOR.join(part.encode() for part in (tenant, type, version, code))
    return f"result_{sha256(head + _SEPARATOR + payload).hexdigest()}"


def combine_of(stage_id: str) -> str:
    """Return the name under which the code versions of a stage's combining task are known; no stage has it."""
    return f"{stage_id}/combine"


STAGE_RESULT_KIND: Final = Kind(
    name="stage_result",
    fields=(Field("run"), Field("until", "int")),
    indexes=(Index("stage_result_run", ("run", "id")), Index("stage_result_until", ("until", "id"))),
    cold=("result",),
)
