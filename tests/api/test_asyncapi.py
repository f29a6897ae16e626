"""The document of the sockets is complete and true."""

import json
from typing import Any, get_args

import jsonschema_rs
import msgspec
import pytest

from mcp_control import __version__
from mcp_control.api.asyncapi import build
from mcp_control.api.websocket import (
    ClientFrame,
    OneEvent,
    Pong,
    Reread,
    SomeEvents,
    Subscribed,
    Trouble,
)
from mcp_control.tasks.wire import AgentFrame, ServerFrame, decode_agent_frame, decode_server_frame

DOCUMENT: dict[str, Any] = json.loads(build(__version__))
READERS = {
    ("events", "receive"): msgspec.json.Decoder(ClientFrame).decode,
    ("events", "send"): msgspec.json.Decoder(OneEvent | SomeEvents | Subscribed | Reread | Pong | Trouble).decode,
    ("agents", "receive"): decode_agent_frame,
    ("agents", "send"): decode_server_frame,
}


def resolved(reference: dict[str, str]) -> Any:
    """Return what a reference leads to."""
    found: Any = DOCUMENT
    for part in reference["$ref"].removeprefix("#/").split("/"):
        found = found[part]
    return resolved(found) if set(found) == {"$ref"} else found


def directions() -> dict[tuple[str, str], set[str]]:
    """Return the ops of each channel and direction, answers included."""
    found: dict[tuple[str, str], set[str]] = {key: set() for key in READERS}
    for operation in DOCUMENT["operations"].values():
        channel = operation["channel"]["$ref"].rpartition("/")[2]
        found[channel, operation["action"]] |= {resolved(each)["name"] for each in operation["messages"]}
        answers = operation.get("reply", {}).get("messages", [])
        found[channel, "send"] |= {resolved(each)["name"] for each in answers}
    return found


def test_every_frame_is_documented_in_its_direction() -> None:
    """The operations hold exactly the frames that the decoders of each side know, and no message is left over."""
    expected = {
        ("events", "receive"): get_args(ClientFrame),
        ("events", "send"): (OneEvent, SomeEvents, Subscribed, Reread, Pong, Trouble),
        ("agents", "receive"): get_args(AgentFrame),
        ("agents", "send"): get_args(ServerFrame),
    }
    assert directions() == {key: {kind.__struct_config__.tag for kind in kinds} for key, kinds in expected.items()}
    for channel, each in DOCUMENT["channels"].items():
        assert set(each["messages"]) == directions()[channel, "receive"] | directions()[channel, "send"]


@pytest.mark.parametrize(("channel", "action"), READERS)
def test_every_example_is_what_the_product_reads(channel: str, action: str) -> None:
    """Examples pass the product's decoders and the documented schema, and each message has text and one example."""
    for op in directions()[channel, action]:
        message = DOCUMENT["components"]["messages"][f"{channel}.{op}"]
        (example,) = message["examples"]
        assert message["summary"]
        READERS[channel, action](json.dumps(example["payload"]))
        schema = {**message["payload"], "components": DOCUMENT["components"]}
        jsonschema_rs.Draft202012Validator(schema).validate(example["payload"])


def test_every_reference_leads_somewhere() -> None:
    """Channels, messages, schemas and security schemes that are named exist."""

    def references(value: Any) -> list[dict[str, str]]:
        if isinstance(value, dict):
            own = [value] if isinstance(value.get("$ref"), str) else []
            return own + [found for item in value.values() for found in references(item)]
        return [found for item in value for found in references(item)] if isinstance(value, list) else []

    found = references(DOCUMENT)
    assert len(found) > 50
    for each in found:
        resolved({"$ref": each["$ref"]})


def test_the_sockets_are_told_with_address_credential_and_close_codes() -> None:
    """Both paths, the bearer header on each handshake and server, and what every close code means."""
    assert DOCUMENT["asyncapi"] == "3.0.0"
    assert {each["address"] for each in DOCUMENT["channels"].values()} == {"/ws", "/ws/agent"}
    for channel in DOCUMENT["channels"].values():
        assert channel["bindings"]["ws"]["headers"]["required"] == ["Authorization"]
        assert {"1003", "1007", "1008", "1009", "1012", "1013", "4401"} <= set(channel["x-close-codes"])
        assert all(f"`{code}`" in channel["description"] for code in channel["x-close-codes"])
    assert "4409" in DOCUMENT["channels"]["agents"]["x-close-codes"]
    assert all(resolved(server["security"][0])["scheme"] == "bearer" for server in DOCUMENT["servers"].values())
