"""Bodies: numbers beyond 64 bits and keys that look like operators are found wherever a shape is typed, and nowhere else."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_control.api.decode import Body
from mcp_control.kernel.errors import Invalid
from mcp_control.tasks.model import TaskSpec

SPEC = Body(TaskSpec, envelope=1)
BATCH = Body(list[TaskSpec])
BEFORE = st.sampled_from(["", " ", "\t", "\n", "\r\n  "])


def refused(raw: str, body: Body[TaskSpec] | Body[list[TaskSpec]] = SPEC) -> list[tuple[str, str]]:
    """Return where and under which codes a body is refused; nothing where it is not."""
    try:
        body.decode(raw.encode())
    except Invalid as problem:
        return [(error.pointer, error.code) for error in problem.errors]
    return []


@given(st.integers(-(2**80), 2**80), BEFORE)
def test_a_number_beyond_64_bits_is_found_whatever_stands_before_it(number: int, before: str) -> None:
    """Exactly the integers that do not fit are out of range, with any white space that JSON allows."""
    found = refused(f'{{"type":"x","retry":{{"max_attempts":{before}{number}}}}}')
    assert found == ([] if -(2**63) <= number < 2**63 else [("#/retry/max_attempts", "out-of-range")])


@given(st.integers(2**64, 2**80), BEFORE)
def test_long_numbers_in_payloads_and_texts_are_left_alone(number: int, before: str) -> None:
    """What is opaque or text may hold as many digits as it likes."""
    assert refused(f'{{"type":"x","payload":[{before}{number}],"labels":{{"a":"{before.strip()}{number}"}}}}') == []


@pytest.mark.parametrize("key", ["$where", "a.b", "."])
def test_a_key_that_looks_like_an_operator_is_named_by_its_path(key: str) -> None:
    """Every such key in a typed place is told, in lists and inside of members; in capabilities and payloads it may be."""
    plain = {"type": "x", "payload": {key: 1}, "needs": {"capabilities": {"a.b": "*"}}}
    bad = {"type": "x", "labels": {key: "1", "fine": "2"}, "needs": {"labels": {key: "3"}}}
    found = refused(json.dumps([plain, bad]), BATCH)
    assert sorted(found) == [(f"#/1/{place}/{key}", "invalid-character") for place in ("labels", "needs/labels")]
    assert refused(json.dumps(plain)) == []
