"""Logs: one line per event, with its request, without secrets, whatever is thrown at them."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from mcp_control.monitoring.logs import REDACTED, clean, configure, encode_controls, redact, request_id

JWT = "eyJhbGciOiJFZDI1NTE5IiwidHlwIjoiYXQrand0In0.eyJzdWIiOiJ1c2VyXzEifQ.c2lnbmF0dXJl-_x"
TOKENS = [JWT, "mcpt_0123456789_secretsecret", "mcpa_0123456789_secretsecret", "mcpe_0123456789_secretsecret"]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What is logged as JSON; logging is set back afterwards."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    stream = io.StringIO()
    configure("debug", "json", stream)
    yield stream
    structlog.reset_defaults()
    root.handlers[:] = before
    root.setLevel(level)


def entries(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize(
    "form",
    [
        "{}",
        "got {} from client",
        "Authorization: Bearer {}",
        "/x?token={}&a=1",
        '{{"password": "{}"}}',
        "Bearer  {}",
        "a={}\r\nb",
    ],
)
def test_credentials_are_recognised_in_any_text(token: str, form: str) -> None:
    """Wherever a credential stands in a text, it is taken out."""
    text = redact(form.format(token))
    assert token not in text
    assert "secretsecret" not in text
    assert REDACTED in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("password=hunter2 user=bob", f"password={REDACTED} user=bob"),
        ('{"password":"hunter2 with spaces","a":1}', f'{{"password":{REDACTED},"a":1}}'),
        ("redis://user:hunter2@host:1/0", f"redis://user:{REDACTED}@host:1/0"),
        ("Basic aHVudGVyMg==", REDACTED),
        ("task_0123 completed in 3 s", "task_0123 completed in 3 s"),
        ("eyJ is short", "eyJ is short"),
        ("mcpctl up", "mcpctl up"),
    ],
)
def test_other_secrets_go_and_plain_text_stays(text: str, expected: str) -> None:
    """Key-value forms and URLs lose the secret only; what is no secret is untouched."""
    assert redact(text) == expected


@pytest.mark.parametrize(
    "key",
    [
        "password",
        "new_password",
        "Authorization",
        "cookie",
        "set-cookie",
        "jwt",
        "jwt_secret",
        "token",
        "access_token",
        "lease_token",
        "api_key",
        "X-Api-Key",
        "client_secret",
        "headers",
    ],
)
def test_secret_keys_hide_their_values_at_any_depth(key: str) -> None:
    """Whatever the value looks like, the key tells."""
    assert clean({"a": [{key: "canary"}]}) == {"a": [{key: REDACTED}]}
    assert "canary" not in str(clean({key: {"x": "canary"}}))


def test_plain_keys_stay_readable() -> None:
    """Redaction that hides everything would be turned off."""
    value = {
        "task_id": "task_1",
        "token_id": "tok",
        "tokens": 5,
        "state": "queued",
        "rows": 10,
        "ok": True,
        "at": 1.5,
        "none": None,
    }
    assert clean(value) == value


def test_input_cannot_forge_lines_or_steer_a_terminal() -> None:
    """CR, LF, escapes, C1 controls, separators and direction marks are written out."""
    for char in "\r\n\x1b\x00\x7f\x85\x9b\u2028\u2029\u202e\u2066\u200f":
        assert char not in encode_controls(f"a{char}b")
    assert encode_controls("a\r\n\u2028b é 🦊") == "a\\x0d\\x0a\\u2028b é 🦊"


def test_size_and_depth_are_bounded() -> None:
    """A huge, deep or binary value becomes a short one."""
    assert len(str(clean("x" * 10**6))) < 9000
    assert clean(b"secret bytes") == "<12 bytes>"
    assert len(clean(list(range(10**5)))) == 100  # type: ignore[arg-type] # a list goes in and comes out
    deep: object = "end"
    for _ in range(100):
        deep = {"a": deep, "b": [deep]}
    assert len(str(clean(deep))) < 2000


def test_events_carry_level_time_and_request(written: io.StringIO) -> None:
    """One JSON object per line, with what is needed to find the request again."""
    token = request_id.set("req-1")
    structlog.get_logger("mcp_control.x").info("task.queued", task="task_1", attempt=2)
    request_id.reset(token)
    structlog.get_logger().warning("later")
    first, second = entries(written)
    assert (first["event"], first["task"], first["attempt"], first["level"], first["request_id"]) == (
        "task.queued",
        "task_1",
        2,
        "info",
        "req-1",
    )
    assert first["logger"] == "mcp_control.x"
    assert str(first["timestamp"]).endswith("Z")
    assert "request_id" not in second


def test_planted_secrets_never_reach_the_log(written: io.StringIO) -> None:
    """In events, fields, nested values, traces and other libraries' records."""
    log = structlog.get_logger("mcp_control.x")
    for token in TOKENS:
        log.info(
            "bad credential %s",
            token,
            header=f"Bearer {token}",
            nested={"list": [token, {"password": "hunter2"}]},
            password="hunter2",
        )
        logging.getLogger("uvicorn.error").error(
            "GET /x?access_token=%s failed with %s", token, "hunter2-password=hunter2"
        )
        try:
            raise ValueError(f"cannot read {token}\x1b[2J")
        except ValueError:
            log.exception("failed")
            logging.getLogger("asyncio").exception("failed %s", token)
    text = written.getvalue()
    for token in TOKENS:
        assert token not in text
    assert "secretsecret" not in text
    assert "password=hunter2" not in text
    assert text.count("hunter2") == len(TOKENS) * text.split("\n")[1].count("hunter2")
    assert "\x1b" not in text
    assert len(entries(written)) == 16
    assert "ValueError" in text


def test_console_form_is_one_line_per_event_and_safe() -> None:
    """On a terminal people read; input still cannot move the cursor."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    stream = Terminal()
    try:
        configure("info", "auto", stream)
        configure("info", "auto", stream)
        structlog.get_logger().info("agent.registered", name="evil\x1b[2J\r\nINFO fake", token="canary")
        structlog.get_logger().debug("not this")
    finally:
        structlog.reset_defaults()
        root.handlers[:] = before
        root.setLevel(level)
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert "agent.registered" in text
    assert "evil\\x1b[2J\\x0d\\x0aINFO fake" in text.replace("\\\\", "\\")
    assert "canary" not in text
