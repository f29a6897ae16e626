"""The AsyncAPI 3.0 document of the two WebSockets, made from the Structs that decode and encode their frames.

Each frame is written down once, as an example; its Struct gives name, text and schema.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal

import msgspec

from mcp_control.agents.model import AgentSpec, Beat, Capability
from mcp_control.api import websocket as client
from mcp_control.api.json_schema import any_json
from mcp_control.configuration.settings import Settings
from mcp_control.events.model import Event
from mcp_control.tasks import wire
from mcp_control.tasks.budget_model import Spent
from mcp_control.tasks.model import Failure, LogLine

_TASK: Final = "task_06h09s2bje1u5ikneltrvpo1bjh7un2n0b20"
_PROOF: Final = "0Zr1c3Yh5Xk"
_EVENT: Final = Event(
    id="evt_13",
    type="task.completed",
    source="/tasks",
    subject=_TASK,
    time=datetime(2026, 1, 1, tzinfo=UTC),
    tenant="default",
    actor="agent_06h09panqvpjbsheehotdvrq3u0l15i7gebg",
    data=msgspec.Raw(b'{"type":"mail.send","state":"completed","attempt":1}'),
)
_TO_EVENTS: Final = (
    client.Subscribe(id="mine", types=["task.*"], after="evt_12"),
    client.Unsubscribe(id="mine"),
    client.Ping(),
    client.Renewal(credential="a fresh credential"),
)
_FROM_EVENTS: Final = (
    client.Subscribed(id="mine", after="evt_12"),
    client.OneEvent(sub="mine", event=_EVENT),
    client.SomeEvents(sub="mine", events=[_EVENT, msgspec.structs.replace(_EVENT, id="evt_14")]),
    client.Reread(sub="mine"),
    client.Pong(),
    client.Trouble(code="invalid-cursor", detail="not the id of an event", sub="mine"),
)
_TO_AGENTS: Final = (
    wire.Hello(agent=AgentSpec(name="mailer", capabilities=[Capability(name="mail.send")], slots=4)),
    wire.Heartbeat(beat=Beat(tick=41, cpu_percent=12.5, memory_mb=80.0, free_slots=3, running=[_TASK])),
    wire.Report(
        id=7,
        started=[wire.Started(task_id=_TASK, lease_token=_PROOF)],
        progress=[wire.Progress(task_id=_TASK, lease_token=_PROOF, fraction=0.5, message="half of the recipients")],
        logs=[
            wire.Logged(task_id=_TASK, lease_token=_PROOF, lines=[LogLine(at=1_767_225_600_000, message="connected")])
        ],
        done=[
            wire.Done(
                task_id=_TASK,
                lease_token=_PROOF,
                outcome="failed",
                failure=Failure(error_class="temporary", code="mail-server-busy", message="try again later"),
            )
        ],
    ),
    wire.Report(id=9, used=[wire.Used(task_id=_TASK, lease_token=_PROOF, spent=Spent(number=2, calls=1, tokens=850))]),
    wire.Bye(step="drain"),
    wire.Renew(credential="a fresh credential"),
)
_FROM_AGENTS: Final = (
    wire.Welcome(protocol=1, agent_id="agent_1", instance_id="inst_1", lease_ms=30_000, beat_ms=10_000),
    wire.Tasks(
        tasks=[
            wire.Assignment(
                task_id=_TASK,
                lease_token=_PROOF,
                type="mail.send",
                attempt=1,
                fence="1.1",
                payload=msgspec.Raw(b'{"to":"ada@example.org"}'),
            )
        ]
    ),
    wire.Ack(id=7),
    wire.BeatAck(lease_ms=30_000, cancel=[_TASK]),
    wire.Cancel(task_ids=[_TASK], reason="no longer needed"),
    wire.Order(order="drain", note="maintenance"),
    wire.Trouble(code="hello-expected", detail="the first frame of a connection is hello"),
)
_CLOSED: Final = {
    "1003": "a binary frame",
    "1007": "a frame that is not JSON",
    "1008": "ten frames that were not understood or not allowed",
    "1009": "a frame above the size limit (`limits.max_frame_bytes`)",
    "1011": "a mistake of the server; reconnect with backoff",
    "1012": "the server restarts; reconnect with jitter",
    "1013": "frames were not taken fast enough; reconnect and read the current state",
    "4401": "the credential expired or was revoked; connect with a fresh one",
}
_CLOSED_AGENTS: Final = _CLOSED | {
    "1000": "after `bye` with step `leave`",
    "1008": "no `hello` within 15 s, a refused `hello`, or ten frames that were not understood or not allowed",
    "4409": "the same instance connected anew, or its lease is over",
}
_Direction = Literal["receive", "send"]


class _Operation(msgspec.Struct, frozen=True):
    """What goes one way on a channel, and the frames that answer it, by their `op`."""

    name: str
    channel: Literal["events", "agents"]
    action: _Direction
    summary: str
    frames: tuple[str, ...]
    answers: tuple[str, ...] = ()


_OPERATIONS: Final = (
    _Operation("follow", "events", "receive", "Follow events, resume after one", ("subscribe",), ("subscribed",)),
    _Operation("unfollow", "events", "receive", "Stop following", ("unsubscribe",)),
    _Operation("checkEvents", "events", "receive", "See whether the server is there", ("ping",), ("pong",)),
    _Operation("renewEvents", "events", "receive", "Stay connected beyond the credential's end", ("renew",)),
    _Operation("deliver", "events", "send", "Events of the subscriptions", ("event", "events", "reread")),
    _Operation("refuseEvents", "events", "send", "Say that a frame was refused", ("problem",)),
    _Operation("open", "agents", "receive", "Open or resume a session; the first frame", ("hello",), ("welcome",)),
    _Operation("beat", "agents", "receive", "Renew the session's lease, every `beat_ms`", ("beat",), ("beat_ack",)),
    _Operation("report", "agents", "receive", "Say what happened to tasks", ("report",), ("ack",)),
    _Operation("leave", "agents", "receive", "Drain or leave", ("bye",)),
    _Operation("renewAgents", "agents", "receive", "Go on with a fresh credential", ("renew",)),
    _Operation("work", "agents", "send", "Give work, take it back, order the agent", ("tasks", "cancel", "order")),
    _Operation("refuseAgents", "agents", "send", "Say that a frame was refused", ("problem",)),
)
_INTRODUCTION: Final = (
    "JSON text frames; `op` says which. `/ws` is for programs that follow events, `/ws/agent` for agents that take work. "
    "Send `Authorization: Bearer` with the handshake; never put a credential into the address. A refused handshake is "
    "answered with a problem document (401, 403, 503). Everything else is described by `/openapi.json`."
)
_REF: Final = "#/components/schemas/{name}"


def build(version: str) -> bytes:
    """Return the document as JSON."""
    address = ":".join(str(Settings.model_fields[name].default) for name in ("host", "port"))
    frames: dict[str, Sequence[msgspec.Struct]] = {
        "events": (*_TO_EVENTS, *_FROM_EVENTS),
        "agents": (*_TO_AGENTS, *_FROM_AGENTS),
    }
    types = [type(frame) for each in frames.values() for frame in each]
    references, schemas = msgspec.json.schema_components(types, schema_hook=any_json, ref_template=_REF)
    by_type = dict(zip(types, references, strict=True))
    messages = {
        _key(channel, frame): _message(channel, frame, by_type[type(frame)])
        for channel, each in frames.items()
        for frame in each
    }
    document = {
        "asyncapi": "3.0.0",
        "id": "urn:mcp-control:sockets",
        "defaultContentType": "application/json",
        "info": {
            "title": "MCP Server (Management Control Panel): WebSockets",
            "version": version,
            "description": _INTRODUCTION,
            "license": {"name": "MIT"},
        },
        "servers": {
            name: {
                "host": "{address}",
                "protocol": protocol,
                "description": text,
                "variables": {"address": {"default": address, "description": "Host and port of the server"}},
                "security": [{"$ref": "#/components/securitySchemes/bearer"}],
            }
            for name, protocol, text in (
                ("plain", "ws", "On the same machine"),
                ("encrypted", "wss", "With TLS, on a network"),
            )
        },
        "channels": {
            "events": _channel("events", "/ws", "Events, filtered and resumable", frames["events"], _CLOSED),
            "agents": _channel("agents", "/ws/agent", "Sessions of agents", frames["agents"], _CLOSED_AGENTS),
        },
        "operations": {operation.name: _operation(operation) for operation in _OPERATIONS},
        "components": {
            "schemas": schemas,
            "messages": messages,
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Access token or API token (`mcpt_…`); on `/ws/agent` an agent's credential (`mcpa_…`)",
                }
            },
        },
    }
    return msgspec.json.encode(document)


def _op(frame: msgspec.Struct) -> str:
    return str(frame.__struct_config__.tag)


def _key(channel: str, frame: msgspec.Struct) -> str:
    return f"{channel}.{_op(frame)}"


def _message(channel: str, frame: msgspec.Struct, schema: dict[str, Any]) -> dict[str, object]:
    text = " ".join((type(frame).__doc__ or "").split())
    shown: dict[str, object] = {
        "name": _op(frame),
        "title": f"{_op(frame)} ({channel})",
        "summary": text,
        "contentType": "application/json",
        "payload": schema,
        "examples": [{"name": _op(frame), "payload": msgspec.json.decode(wire.encode_frame(frame))}],
    }
    if isinstance(frame, wire.Report | wire.Ack):
        shown["correlationId"] = {"location": "$message.payload#/id"}
    return shown


def _channel(
    name: str, path: str, title: str, frames: Sequence[msgspec.Struct], closed: dict[str, str]
) -> dict[str, object]:
    codes = "\n".join(f"- `{code}`: {text}" for code, text in sorted(closed.items()))
    return {
        "address": path,
        "title": title,
        "description": f"Close codes:\n\n{codes}",
        "messages": {_op(frame): {"$ref": f"#/components/messages/{_key(name, frame)}"} for frame in frames},
        "bindings": {
            "ws": {
                "method": "GET",
                "headers": {
                    "type": "object",
                    "required": ["Authorization"],
                    "properties": {"Authorization": {"type": "string", "pattern": "^Bearer .+$"}},
                },
                "bindingVersion": "0.1.0",
            }
        },
        "x-close-codes": closed,
    }


def _operation(operation: _Operation) -> dict[str, object]:
    channel = f"#/channels/{operation.channel}"

    def references(ops: tuple[str, ...]) -> list[dict[str, str]]:
        return [{"$ref": f"{channel}/messages/{op}"} for op in ops]

    shown: dict[str, object] = {
        "action": operation.action,
        "channel": {"$ref": channel},
        "summary": operation.summary,
        "messages": references(operation.frames),
    }
    if operation.answers:
        shown["reply"] = {"channel": {"$ref": channel}, "messages": references(operation.answers)}
    return shown
