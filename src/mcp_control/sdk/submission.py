"""From what a program says to what is sent: task specs with their idempotency keys, and pipeline definitions."""

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal, TypedDict

import msgspec

from mcp_control.pipelines.builder import PipelineBuilder
from mcp_control.pipelines.definition_model import PipelineSpec
from mcp_control.tasks.budget_model import Budget
from mcp_control.tasks.model import Fairness, Needs, RetryPolicy, TaskSpec

YAML: Final = "application/yaml"
BATCH_TASKS: Final = 500
BATCH_BYTES: Final = 768 * 1024

encode_json: Final = msgspec.json.Encoder().encode


class SubmitOptions(TypedDict, total=False):
    """What may be said about a submission beside type and payload.

    priority: 0 to 100, or critical, high, medium, low. key: idempotency key; submitting it again returns the first task. run_at: a
    time, or seconds from now. timeout: seconds one attempt may take. deadline: a time, or seconds from now. retries: attempts after
    the first one (a short form of `retry`). fairness: whose share of the slots it takes. budget: what it, and what is done for it, may use.
    """

    priority: int | str
    fairness: Fairness
    key: str
    labels: Mapping[str, str]
    needs: Needs
    run_at: datetime | timedelta | float
    timeout: float
    deadline: datetime | timedelta | float
    retry: RetryPolicy
    retries: int
    type_version: str
    context_id: str
    parent_id: str
    trust: Literal["trusted", "external", "tainted"]
    on_unroutable: Literal["accept", "reject"]
    budget: Budget


class RunOptions(TypedDict, total=False):
    """What may be said about a run beside its parameters."""

    version: int
    labels: Mapping[str, str]
    priority: int
    key: str
    budget: Budget
    no_cache: bool


def fresh_key() -> str:
    """Return a key that makes one submission repeatable."""
    return secrets.token_hex(16)


def make_spec(type: str, payload: object, options: SubmitOptions) -> TaskSpec:
    """Return the spec of a task. One without a key gets a fresh one, so that sending it twice makes one task.

    Raises:
        TypeError: the payload has no JSON form, or an option is unknown.
    """
    known: dict[str, Any] = dict(options)
    retries = known.pop("retries", None)
    if retries is not None:
        known["retry"] = msgspec.structs.replace(known.get("retry") or RetryPolicy(), max_attempts=retries + 1)
    known["idempotency_key"] = known.pop("key", None) or fresh_key()
    for name in ("run_at", "deadline"):
        if name in known:
            known[name] = _moment(known[name])
    if "labels" in known:
        known["labels"] = dict(known["labels"])
    raw = payload if isinstance(payload, msgspec.Raw) else msgspec.Raw(encode_json(payload))
    return TaskSpec(type=type, payload=raw, **known)


def keyed(spec: TaskSpec) -> TaskSpec:
    """Return the spec with an idempotency key."""
    return spec if spec.idempotency_key else msgspec.structs.replace(spec, idempotency_key=fresh_key())


def _moment(value: datetime | timedelta | float) -> datetime:
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise TypeError("a time needs a time zone")
        return value
    return datetime.now(UTC) + (value if isinstance(value, timedelta) else timedelta(seconds=value))


def batches(encoded: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Cut encoded specs into batches of at most 500 tasks and about 768 KiB; a bigger one goes alone."""
    batch: list[bytes] = []
    size = 0
    for item in encoded:
        if batch and (len(batch) >= BATCH_TASKS or size + len(item) > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += len(item)
    if batch:
        yield batch


def batch_body(encoded: Sequence[bytes]) -> bytes:
    """Return the body of a batch request."""
    return b'{"tasks":[' + b",".join(encoded) + b"]}"


Definition = PipelineBuilder | PipelineSpec | Mapping[str, Any] | str | Path


class DefinitionText(msgspec.Struct, frozen=True):
    """A definition as it is sent: as it was written where it was written, so that the server can name lines."""

    text: bytes
    media_type: str = "application/json"


def definition_text(source: Definition) -> DefinitionText:
    """Return a definition as text. Strings are YAML (or JSON) text, paths are files of it.

    Raises:
        OSError: the file cannot be read.
    """
    if isinstance(source, PipelineBuilder):
        source = source.build()
    if isinstance(source, Path):
        media_type = "application/json" if source.suffix == ".json" else YAML
        return DefinitionText(source.read_bytes(), media_type)
    if isinstance(source, str):
        return DefinitionText(source.encode(), YAML)
    return DefinitionText(encode_json(source))
