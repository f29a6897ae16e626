"""Bad input gets a clear problem with a stable code and changes nothing. Numbers are rows of the list of bad input in the design."""

import json

import httpx2
import pytest

from mcp_control.testing.server import RunningServer

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEEP = b"[" * 100_000 + b"]" * 100_000
TASK = "/api/v1/tasks"
AGENT = "/api/v1/agents/register"
LOGIN = "/api/v1/auth/login"
PIPELINES = "/api/v1/pipelines"
SCHEDULES = "/api/v1/schedules"


def with_payload(payload: bytes) -> bytes:
    return b'{"type":"echo","payload":' + payload + b"}"


def nested(depth: int) -> bytes:
    return with_payload(b"[" * depth + b"]" * depth)


def spec(**fields: object) -> bytes:
    return json.dumps({"type": "echo", **fields}).encode()


def agent(**fields: object) -> bytes:
    return json.dumps({"name": "a1", **fields}).encode()


def pipeline(*stages: dict[str, object]) -> bytes:
    return json.dumps(
        {"metadata": {"name": "p"}, "spec": {"stages": [{"uses": "echo", **stage} for stage in stages]}}
    ).encode()


def schedule(**when: object) -> bytes:
    return json.dumps({"name": "s", "task": {"type": "echo"}, **when}).encode()


def chain(length: int) -> bytes:
    return pipeline(*[{"id": f"s{n}", "needs": [f"s{n - 1}"] if n else []} for n in range(length)])


BODIES = [
    ("1 truncated", TASK, b'{"type":"echo"', 400, "malformed-json"),
    ("2 trailing bytes", TASK, b'{"type":"echo"} x', 400, "malformed-json"),
    ("3 NaN", TASK, with_payload(b"NaN"), 400, "malformed-json"),
    ("3 Infinity", TASK, with_payload(b"Infinity"), 400, "malformed-json"),
    ("3 minus Infinity", TASK, with_payload(b"-Infinity"), 400, "malformed-json"),
    ("3 1e999", TASK, with_payload(b"1e999"), 400, "malformed-json"),
    ("4 byte order mark", TASK, b"\xef\xbb\xbf" + spec(), 400, "malformed-json"),
    ("5 invalid UTF-8", TASK, with_payload(b'"\xff"'), 400, "malformed-json"),
    ("6 lone surrogate", TASK, with_payload(b'"\\ud800"'), 400, "malformed-json"),
    ("7 nested arrays", TASK, DEEP, 400, "too-deep"),
    ("7 nested arrays in a payload", TASK, with_payload(DEEP), 400, "too-deep"),
    ("7 payload of 33 levels", TASK, nested(33), 400, "too-deep"),
    ("7 objects and arrays in turn", TASK, with_payload(b'{"a":[' * 17 + b"]}" * 17), 400, "too-deep"),
    (
        "8 integer of 64 bits",
        TASK,
        b'{"type":"echo","retry":{"max_attempts":9223372036854775808}}',
        422,
        "out-of-range",
    ),
    ("9 integer of 5000 digits", TASK, b'{"type":"echo","priority":' + b"9" * 5000 + b"}", 400, "malformed-json"),
    ("10 NUL in a string", TASK, b'{"type":"ec\\u0000ho"}', 422, "invalid-character"),
    ("10 NUL in a key", TASK, b'{"type":"echo","labels":{"a\\u0000":"b"}}', 422, "invalid-character"),
    ("10 NUL in a payload", TASK, with_payload(b'{"a":["\\u0000"]}'), 422, "invalid-character"),
    ("11 key with a dollar", TASK, spec(labels={"$gt": "x"}), 422, "invalid-character"),
    ("11 key with a dot", TASK, spec(labels={"a.b": "x"}), 422, "invalid-character"),
    ("12 object where a string is needed", AGENT, b'{"name":{"$gt":""}}', 422, "wrong-type"),
    ("13 duplicate key on login", LOGIN, b'{"username":"a","username":"b","password":"c"}', 400, "duplicate-key"),
    ("19 unknown field", TASK, spec(colour="red"), 422, "unknown-field"),
    ("19 unknown field inside", TASK, spec(retry={"tries": 1}), 422, "unknown-field"),
    ("19 state", TASK, spec(state="completed"), 422, "read-only-field"),
    ("19 tenant", TASK, spec(tenant="other"), 422, "read-only-field"),
    ("19 epoch", TASK, spec(epoch=3), 422, "read-only-field"),
    ("20 empty body", TASK, b"", 422, "wrong-type"),
    ("20 array for an object", TASK, b"[]", 422, "wrong-type"),
    ("20 null for an object", TASK, b"null", 422, "wrong-type"),
    ("20 bool for a number", TASK, spec(priority=True), 422, "wrong-type"),
    ("20 bool for an integer", TASK, spec(retry={"max_attempts": True}), 422, "wrong-type"),
    ("20 string for a number", TASK, spec(timeout="5"), 422, "wrong-type"),
    ("20 number for a string", TASK, b'{"type":5}', 422, "wrong-type"),
    ("20 missing", TASK, b"{}", 422, "missing-field"),
    ("21 negative priority", TASK, spec(priority=-1), 422, "out-of-range"),
    ("21 huge priority", TASK, spec(priority=101), 422, "out-of-range"),
    ("21 text for 5", TASK, spec(priority="5"), 422, "out-of-range"),
    ("21 timeout zero", TASK, spec(timeout=0), 422, "out-of-range"),
    ("21 negative timeout", TASK, spec(timeout=-1), 422, "out-of-range"),
    ("21 huge timeout", TASK, spec(timeout=1e12), 422, "out-of-range"),
    ("21 no attempts", TASK, spec(retry={"max_attempts": 0}), 422, "out-of-range"),
    ("21 a million attempts", TASK, spec(retry={"max_attempts": 1_000_000}), 422, "out-of-range"),
    ("21 enrolment for ever", "/api/v1/agents/enrolment-tokens", b'{"ttl_seconds":99999}', 422, "out-of-range"),
    ("21 lease too short", AGENT, agent(lease_seconds=0), 422, "out-of-range"),
    ("22 no zone", TASK, spec(run_at="2030-01-01T00:00:00"), 422, "invalid-timestamp"),
    ("22 year 1", TASK, spec(run_at="0001-01-01T00:00:00Z"), 422, "invalid-timestamp"),
    ("22 year 9999", TASK, spec(run_at="9999-12-31T23:59:59-10:00"), 422, "invalid-timestamp"),
    ("22 30 February", TASK, spec(run_at="2030-02-30T00:00:00Z"), 422, "invalid-timestamp"),
    ("22 leap second", TASK, spec(run_at="2016-12-31T23:59:60Z"), 422, "invalid-timestamp"),
    ("23 minute 61", SCHEDULES, schedule(cron="61 * * * *"), 422, "invalid-schedule"),
    ("23 negative interval in cron", SCHEDULES, schedule(cron="@every -1s"), 422, "invalid-schedule"),
    ("23 negative interval", SCHEDULES, schedule(every=-1), 422, "invalid-schedule"),
    ("23 never", SCHEDULES, schedule(cron="0 0 30 2 *"), 422, "invalid-schedule"),
    ("23 past", SCHEDULES, schedule(at="2001-01-01T00:00:00Z"), 422, "invalid-schedule"),
    ("23 far away", SCHEDULES, schedule(every=60, starts_at="9000-01-01T00:00:00Z"), 422, "invalid-schedule"),
    ("23 no such zone", SCHEDULES, schedule(cron="* * * * *", timezone="../etc/passwd"), 422, "invalid-schedule"),
    ("23 nothing", SCHEDULES, schedule(), 422, "invalid-schedule"),
    ("24 cycle", PIPELINES, pipeline({"id": "a", "needs": ["b"]}, {"id": "b", "needs": ["a"]}), 422, "dag-cycle"),
    ("25 unknown node", PIPELINES, pipeline({"id": "a", "needs": ["zz"]}), 422, "dag-unknown-node"),
    ("26 self-edge", PIPELINES, pipeline({"id": "a", "needs": ["a"]}), 422, "dag-cycle"),
    ("27 deeper than 100", PIPELINES, chain(102), 422, "limit-exceeded"),
    ("28 id in a body", TASK, spec(needs={"agent": "../x"}), 422, "invalid-character"),
    ("37 key of 256 characters", TASK, spec(idempotency_key="k" * 256), 400, "idempotency-key-invalid"),
    ("45 line break in a name", AGENT, agent(name="a\r\nb"), 422, "invalid-character"),
    ("45 escape in a name", AGENT, agent(name="a\x1b[31m"), 422, "invalid-character"),
    ("45 markup in a name", AGENT, agent(name="<script>"), 422, "invalid-character"),
    ("45 right-to-left override", AGENT, agent(name="a\u202eb"), 422, "invalid-character"),
    (
        "46 10000 capabilities",
        AGENT,
        agent(capabilities=[{"name": f"c{n}"} for n in range(10_000)]),
        422,
        "limit-exceeded",
    ),
]


@pytest.mark.parametrize(
    ("path", "body", "status", "code"), [case[1:] for case in BODIES], ids=[case[0] for case in BODIES]
)
async def test_a_bad_body_is_refused_with_its_code_and_changes_nothing(
    server: RunningServer, client: httpx2.AsyncClient, path: str, body: bytes, status: int, code: str
) -> None:
    """A bad body gets a problem document with the exact status and code; no fact comes of it."""
    before = server.services.broadcaster.newest
    answer = await client.post(path, content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == status
    assert answer.json()["instance"] == "urn:request:" + answer.headers["x-request-id"]
    assert server.services.broadcaster.newest == before


ACCEPTED = [
    ("7 payload of 32 levels", nested(32)),
    ("10 an escaped backslash before u0000", with_payload(b'"\\\\u0000"')),
    ("11 operators inside a payload", with_payload(b'{"$gt":"","a.b":{"$where":1}}')),
    ("12 a string that looks like an operator", spec(labels={"a": "$secret"}, payload="$$ROOT")),
    ("13 duplicate keys elsewhere", b'{"type":"first","type":"echo"}'),
    ("9 a long number inside a payload", with_payload(b"123456789012345678901234567890")),
]


@pytest.mark.parametrize("body", [case[1] for case in ACCEPTED], ids=[case[0] for case in ACCEPTED])
async def test_what_only_looks_dangerous_is_stored_literally(client: httpx2.AsyncClient, body: bytes) -> None:
    """Payloads are opaque: they come back as they were sent."""
    made = await client.post(TASK, content=body, headers={"content-type": "application/json"})
    assert made.status_code == 201, made.text
    found = (await client.get(f"{TASK}/{made.json()['id']}")).json()
    sent = json.loads(body)
    assert found["type"] == "echo"
    assert found.get("payload") == sent.get("payload")
    assert found.get("labels", {}) == sent.get("labels", {})


async def test_all_errors_are_named_at_once(client: httpx2.AsyncClient) -> None:
    """Every wrong place is listed with its pointer, not only the first."""
    answer = await client.post(TASK, json={"type": 5, "colour": 1, "retry": {"factor": "x"}, "state": "queued"})
    found = {(error["pointer"], error["code"]) for error in answer.json()["errors"]}
    assert found == {
        ("#/type", "wrong-type"),
        ("#/colour", "unknown-field"),
        ("#/retry/factor", "wrong-type"),
        ("#/state", "read-only-field"),
    }


MEDIA = [
    ("no content type", {}, 415),
    ("plain text", {"content-type": "text/plain"}, 415),
    ("multipart", {"content-type": "multipart/form-data; boundary=x"}, 415),
    ("other charset", {"content-type": "application/json; charset=latin-1"}, 415),
    ("gzip", {"content-type": "application/json", "content-encoding": "gzip"}, 415),
    ("nothing acceptable", {"content-type": "application/json", "accept": "image/png"}, 406),
]


@pytest.mark.parametrize(("headers", "status"), [case[1:] for case in MEDIA], ids=[case[0] for case in MEDIA])
async def test_media_types_are_checked(client: httpx2.AsyncClient, headers: dict[str, str], status: int) -> None:
    """Rows 14 and 15: only JSON in UTF-8 is read, and only JSON is written."""
    answer = await client.post(TASK, content=spec(), headers=headers)
    assert answer.status_code == status, answer.text
    assert answer.json()["code"] == {415: "unsupported-media-type", 406: "not-acceptable"}[status]


async def test_json_with_utf8_named_is_read(client: httpx2.AsyncClient) -> None:
    """The charset parameter may say what is the case."""
    answer = await client.post(TASK, content=spec(), headers={"content-type": 'application/json; charset="UTF-8"'})
    assert answer.status_code == 201


async def test_a_large_body_is_refused_by_its_length_and_while_it_comes(client: httpx2.AsyncClient) -> None:
    """Row 15: more than 1 MiB is 413 and ends the connection, with a stated length and without one."""
    big = with_payload(b'"' + b"a" * (1 << 20) + b'"')

    async def pieces() -> object:
        for at in range(0, len(big), 65536):
            yield big[at : at + 65536]

    for content in (big, pieces()):
        answer = await client.post(TASK, content=content, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["code"]) == (413, "payload-too-large")
        assert answer.headers["connection"] == "close"


PATHS = [
    ("28 dots", "GET", f"{TASK}/..%2F..%2Fetc", 404, "not-found"),
    ("28 percent 00", "GET", f"{TASK}/a%00b", 404, "not-found"),
    ("28 look-alike", "GET", f"{TASK}/t%D0%B0sk", 404, "not-found"),
    ("28 too long", "GET", f"{TASK}/{'a' * 65}", 404, "not-found"),
    ("28 blank name", "GET", "/api/v1/agents/%20", 404, "not-found"),
    ("30 unknown route", "GET", "/api/v1/nothing", 404, "not-found"),
    ("30 trailing slash", "GET", f"{TASK}/", 404, "not-found"),
    ("30 wrong method", "DELETE", TASK, 405, "method-not-allowed"),
    ("32 token in the query", "GET", f"{TASK}?access_token=mcpt_x", 400, "token-in-url"),
    ("32 token on an unknown route", "GET", "/api/v1/nothing?token=x", 400, "token-in-url"),
    ("12 operator in a filter", "GET", f"{TASK}?state[$ne]=x", 400, "unknown-parameter"),
    ("40 unknown filter", "GET", f"{TASK}?colour=red", 400, "unknown-parameter"),
    ("40 unknown sort", "GET", "/api/v1/agents?sort=size", 422, "invalid-value"),
    ("40 unknown state", "GET", f"{TASK}?state=done", 422, "invalid-value"),
    ("40 limit 0", "GET", f"{TASK}?limit=0", 422, "out-of-range"),
    ("40 limit -1", "GET", f"{TASK}?limit=-1", 422, "out-of-range"),
    ("40 limit 10^9", "GET", f"{TASK}?limit=1000000000", 422, "out-of-range"),
    ("40 limit as words", "GET", f"{TASK}?limit=ten", 422, "wrong-type"),
    ("40 bad cursor", "GET", f"{TASK}?cursor=nonsense", 400, "invalid-cursor"),
    ("40 cursor of another list", "GET", f"{TASK}?cursor=kqZhZ2VudHORoWE", 400, "invalid-cursor"),
    ("40 events after nonsense", "GET", "/api/v1/events?after=nonsense", 400, "invalid-cursor"),
    ("40 events after the future", "GET", "/api/v1/events?after=evt_99999999", 410, "cursor-expired"),
    ("wait too long", "GET", f"{TASK}/task_1?wait=61", 422, "out-of-range"),
    ("unknown task", "GET", f"{TASK}/task_1", 404, "not-found"),
    ("cancel an unknown task", "POST", f"{TASK}/task_1/cancel", 404, "not-found"),
    ("explain an unknown task", "GET", f"{TASK}/task_1/explain", 404, "not-found"),
    ("logs of an unknown task", "GET", f"{TASK}/task_1/logs", 404, "not-found"),
    ("unknown run", "GET", "/api/v1/runs/run_1", 404, "not-found"),
    ("unknown pipeline", "GET", f"{PIPELINES}/nope", 404, "not-found"),
    ("unknown artifact", "GET", "/api/v1/artifacts/art_1", 404, "not-found"),
    ("38 edit without If-Match", "PATCH", f"{TASK}/task_1", 428, "precondition-required"),
    ("36 claim without a session", "POST", "/api/v1/agents/session/inst_1/claim", 409, "lease-superseded"),
]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"), [case[1:] for case in PATHS], ids=[case[0] for case in PATHS]
)
async def test_a_bad_address_is_refused_with_its_code(
    client: httpx2.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    """Rows 12, 28, 30, 32, 38 and 40: what the address or its parameters get wrong."""
    answer = await client.request(method, path)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text


async def test_a_wrong_method_is_told_the_right_ones(client: httpx2.AsyncClient) -> None:
    """Row 30: 405 comes with Allow."""
    answer = await client.delete(TASK)
    assert answer.headers["allow"] == "GET, HEAD, POST"


CREDENTIALS = [
    ("none", None, "unauthenticated"),
    ("no scheme", "mcpt_x", "invalid-token"),
    ("basic", "Basic YTpi", "invalid-token"),
    ("garbage", "Bearer garbage", "invalid-token"),
    ("forged API token", f"Bearer mcpt_{'0' * 36}_{'0' * 64}", "invalid-token"),
    ("enrolment token elsewhere", f"Bearer mcpe_{'0' * 36}_{'0' * 64}", "invalid-token"),
    ("unsigned JWT", "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIn0.", "invalid-token"),
    ("9 KiB", "Bearer " + "a" * 9000, "invalid-token"),
]


@pytest.mark.parametrize(("header", "code"), [case[1:] for case in CREDENTIALS], ids=[case[0] for case in CREDENTIALS])
async def test_a_bad_credential_is_refused_without_a_reason(
    server: RunningServer, header: str | None, code: str
) -> None:
    """Row 31: 401 with WWW-Authenticate; the detail is the same for all that is invalid."""
    async with httpx2.AsyncClient(base_url=server.url) as nobody:
        answer = await nobody.get(TASK, headers={} if header is None else {"authorization": header})
    assert (answer.status_code, answer.json()["code"]) == (401, code)
    assert answer.headers["www-authenticate"] == "Bearer"
    if code == "invalid-token":
        assert answer.json()["detail"] == "Invalid credential"


async def test_an_idempotency_key_repeats_the_answer_and_refuses_another_request(client: httpx2.AsyncClient) -> None:
    """Row 37: same key and body is 200 with the same task; another body 422; a bad key 400."""
    headers = {"Idempotency-Key": "order-17"}
    first = await client.post(TASK, json={"type": "echo", "payload": 1}, headers=headers)
    again = await client.post(TASK, json={"type": "echo", "payload": 1}, headers=headers)
    other = await client.post(TASK, json={"type": "echo", "payload": 2}, headers=headers)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"]
    assert (other.status_code, other.json()["code"]) == (422, "idempotency-mismatch")
    for key in ("", "k" * 256):
        bad = await client.post(TASK, json={"type": "echo"}, headers={"Idempotency-Key": key})
        assert (bad.status_code, bad.json()["code"]) == (400, "idempotency-key-invalid")


async def test_an_edit_names_the_version_it_was_based_on(client: httpx2.AsyncClient) -> None:
    """Row 38: stale 412, current 200 with the next ETag."""
    made = await client.post(TASK, json={"type": "echo"})
    path, tag = f"{TASK}/{made.json()['id']}", made.headers["etag"]
    edited = await client.patch(path, json={"priority": 80}, headers={"If-Match": tag})
    assert edited.status_code == 200
    assert edited.json()["priority"] == 80
    assert edited.headers["etag"] != tag
    for stale in (tag, '"0"', "*", "garbage"):
        answer = await client.patch(path, json={"priority": 10}, headers={"If-Match": stale})
        assert (answer.status_code, answer.json()["code"]) == (412, "version-conflict")
    assert (await client.get(path)).headers["etag"] == edited.headers["etag"]


async def test_a_verb_that_does_not_fit_the_state_says_so(client: httpx2.AsyncClient) -> None:
    """Row 39: cancelling a finished task and retrying one that has not ended are 409 with the state."""
    task_id = (await client.post(TASK, json={"type": "echo"})).json()["id"]
    early = await client.post(f"{TASK}/{task_id}/retry")
    assert (early.status_code, early.json()["code"], early.json()["state"]) == (409, "invalid-transition", "queued")
    assert (await client.post(f"{TASK}/{task_id}/cancel", json={"reason": "no"})).json()["state"] == "cancelled"
    late = await client.post(f"{TASK}/{task_id}/cancel")
    assert (late.status_code, late.json()["code"], late.json()["state"]) == (409, "invalid-transition", "cancelled")
    assert late.json()["allowed"] == []
    assert (await client.post(f"{TASK}/{task_id}/retry")).status_code == 201


async def test_a_batch_refuses_only_what_is_wrong(client: httpx2.AsyncClient) -> None:
    """Each submission of a batch stands alone; a batch that cannot be decoded is refused as a whole."""
    answer = await client.post(
        f"{TASK}/batch", json={"tasks": [{"type": "echo"}, {"type": "echo", "priority": 900}, {"type": "b"}]}
    )
    items = answer.json()["items"]
    assert [item.get("state") for item in items] == ["queued", None, "queued"]
    assert items[1]["problem"]["code"] == "out-of-range"
    whole = await client.post(f"{TASK}/batch", json={"tasks": [{"type": "echo"}, {"type": 5}]})
    assert (whole.status_code, whole.json()["errors"][0]["pointer"]) == (422, "#/tasks/1/type")
    assert (await client.post(f"{TASK}/batch", json={"tasks": []})).json()["code"] == "out-of-range"
