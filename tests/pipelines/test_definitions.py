"""Definitions: three ways to write one, and everything that is refused, with its code and place."""

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_control.kernel.errors import (
    DuplicateKey,
    Invalid,
    InvalidPipeline,
    MalformedJson,
    PayloadTooLarge,
    Problem,
    TooDeep,
)
from mcp_control.pipelines.builder import PipelineBuilder
from mcp_control.pipelines.definition import from_data, from_json, from_yaml, parse_yaml, to_json
from mcp_control.pipelines.definition_model import Combine, FanOut, Gate, PipelineSpec, Stage
from mcp_control.pipelines.places import located
from mcp_control.pipelines.schema import definition_schema
from mcp_control.pipelines.validate import further, validate
from mcp_control.tasks.model import Needs, RetryPolicy

YAML = """
apiVersion: mcp-control/v1
kind: Pipeline
metadata: {name: nightly, description: every night, labels: {team: data}}
spec:
  deadline_seconds: 3600
  params:
    source: {type: artifact}
    day: {default: 2026-01-02}
    options: {type: object, default: {gate: warn}}
  stages:
    - id: ingest
      uses: dataset.ingest
      with: {input: "${{ params.source }}", day: "${{ params.day }}"}
    - id: clean
      uses: dataset.clean
      needs: [ingest]
      fan_out:
        over: stages.ingest.output.parts
        combine: {uses: dataset.join, timeout: 60}
      with: {part: "${{ item }}"}
      retry: {max_attempts: 5}
      requires: {capabilities: {gpu: ">=1"}}
    - id: score
      uses: dataset.score
      needs: [clean]
      gate: {check: "output.score >= 0.7", reason: too-low}
"""


def built() -> PipelineSpec:
    p = PipelineBuilder("nightly", description="every night", labels={"team": "data"}, deadline_seconds=3600)
    source = p.param("source", "artifact")
    day = p.param("day", default="2026-01-02")
    p.param("options", "object", default={"gate": "warn"})
    raw = p.stage("ingest", "dataset.ingest", with_={"input": source, "day": day})
    clean = p.stage(
        "clean",
        "dataset.clean",
        needs=[raw],
        fan_out=FanOut(over="stages.ingest.output.parts", combine=Combine(uses="dataset.join", timeout=60)),
        with_={"part": "${{ item }}"},
        retry=RetryPolicy(max_attempts=5),
        requires=Needs(capabilities={"gpu": ">=1"}),
    )
    p.stage("score", "dataset.score", needs=[clean], gate=Gate(check="output.score >= 0.7", reason="too-low"))
    return p.build()


def test_yaml_json_and_python_give_the_same_definition() -> None:
    """Whichever way it is written, the definition is equal, valid, and encodes to the same bytes."""
    written = from_yaml(YAML)
    assert written == built() == from_json(to_json(built()))
    assert to_json(written) == to_json(built())
    assert validate(written) == []
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(written), type=PipelineSpec) == written


def test_dates_stay_text_in_yaml() -> None:
    """YAML says no more than JSON can: an unquoted date is the text that stands there."""
    assert from_yaml(YAML).spec.params["day"].default == "2026-01-02"


def test_all_errors_of_a_text_are_told_at_once() -> None:
    """Each wrong stage, parameter and field has its own pointer and code."""
    text = """
    metadata: {name: 3}
    spec:
      stages: [{id: 1, uses: x}, {uses: y}, {id: b, uses: c, retry: {max_attempts: x}}, {id: c, uses: d, shape: round}]
      params: {p: {type: text}}
      speed: 1
    more: 1
    """
    with pytest.raises(Invalid) as refused:
        from_yaml(text)
    assert {(error.pointer, error.code) for error in refused.value.errors} == {
        ("#/spec/stages/0/id", "wrong-type"),
        ("#/spec/stages/1/id", "missing-field"),
        ("#/spec/stages/2/retry/max_attempts", "wrong-type"),
        ("#/spec/stages/3/shape", "unknown-field"),
        ("#/spec/params/p/type", "invalid-value"),
        ("#/spec/speed", "unknown-field"),
        ("#/metadata/name", "wrong-type"),
        ("#/more", "unknown-field"),
    }


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{level}: &a{level} [{','.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "problem", "code"),
    [
        ("", Invalid, "wrong-type"),
        ("a: [", Invalid, "malformed-yaml"),
        ("a: *nobody", Invalid, "malformed-yaml"),
        ("a: !!python/object/apply:os.system [true]", Invalid, "malformed-yaml"),
        ("a: &a [*a]", TooDeep, ""),
        ("a: 1\na: 2", DuplicateKey, ""),
        ("1: a", Invalid, "wrong-type"),
        ("a: .inf", Invalid, "out-of-range"),
        ("a: 99999999999999999999", Invalid, "out-of-range"),
        ("[a, b]", Invalid, "wrong-type"),
        (BOMB, Invalid, "limit-exceeded"),
        ("[" * 5000, TooDeep, ""),
        ("- " * 50000, TooDeep, ""),
        ("a" * (1 << 20) + "a", PayloadTooLarge, ""),
    ],
    ids=lambda value: value[:16] if isinstance(value, str) else "",
)  # fmt: skip
def test_yaml_that_is_no_definition_is_refused(text: str, problem: type[Problem], code: str) -> None:
    """Broken, hostile and oversized YAML ends in a clear problem, whatever it wanted to do."""
    with pytest.raises(problem) as refused:
        from_yaml(text)
    assert not code or refused.value.errors[0].code == code


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", MalformedJson),
        ('{"a": NaN}', MalformedJson),
        ('{"a":1,"a":2}', DuplicateKey),
        ("[" * 100_000, TooDeep),
        ("[1]", Invalid),
        (b"\xff", MalformedJson),
    ],
)  # fmt: skip
def test_json_that_is_no_definition_is_refused(text: str | bytes, problem: type[Problem]) -> None:
    """The same for JSON."""
    with pytest.raises(problem):
        from_json(text)


def stages(*ids_and_needs: tuple[str, list[str]]) -> PipelineSpec:
    p = PipelineBuilder("graph")
    for name, needs in ids_and_needs:
        p.stage(name, "work", needs=needs)
    return p.build()


def one(**parts: object) -> PipelineSpec:
    p = PipelineBuilder("one")
    p.param("known")
    p.stage("before", "work")
    p.stage("beside", "work")
    p.stage("s", "work", needs=["before"], **parts)  # type: ignore[arg-type]
    return p.build()


def wide(count: int) -> PipelineSpec:
    spec = stages(("a", []))
    many = [Stage(id=f"s{number}", uses="work") for number in range(count)]
    return msgspec.structs.replace(spec, spec=msgspec.structs.replace(spec.spec, stages=many))


def deep(length: int) -> PipelineSpec:
    return stages(*((f"s{number}", [f"s{number - 1}"] if number else []) for number in range(length)))


REFUSED: list[tuple[str, Callable[[], PipelineSpec], str, str]] = [
    ("cycle", lambda: stages(("a", ["c"]), ("b", ["a"]), ("c", ["b"])), "dag-cycle", ""),
    ("self-edge", lambda: stages(("a", ["a"])), "dag-cycle", "#/spec/stages/0/needs"),
    ("unknown node", lambda: stages(("a", ["b"])), "dag-unknown-node", "#/spec/stages/0/needs/0"),
    ("duplicate node", lambda: stages(("a", []), ("a", [])), "dag-unknown-node", "#/spec/stages/1/id"),
    ("need named twice", lambda: stages(("a", []), ("b", ["a", "a"])), "dag-unknown-node", "#/spec/stages/1/needs/1"),
    ("too many", lambda: wide(10_001), "limit-exceeded", "#/spec/stages"),
    ("too deep", lambda: deep(101), "limit-exceeded", "#/spec/stages/100"),
    ("no stage", stages, "out-of-range", "#/spec/stages"),
    ("id with a dot", lambda: stages(("a.b", [])), "invalid-character", "#/spec/stages/0/id"),
    ("syntax", lambda: one(with_={"x": {"y": ["${{ 1 + }}"]}}), "expression-invalid", "#/spec/stages/2/with/x/y/0"),
    ("open braces", lambda: one(with_={"x": "${{ params.known"}), "expression-invalid", "#/spec/stages/2/with/x"),
    ("unknown function", lambda: one(with_={"x": "${{ open('/etc/passwd') }}"}), "expression-invalid", "#/spec/stages/2/with/x"),
    ("unknown parameter", lambda: one(with_={"x": "${{ params.other }}"}), "unknown-reference", "#/spec/stages/2/with/x"),
    ("unknown stage", lambda: one(with_={"x": "${{ stages.nope.output }}"}), "unknown-reference", "#/spec/stages/2/with/x"),
    ("stage beside", lambda: one(with_={"x": "${{ stages.beside.output }}"}), "unknown-reference", "#/spec/stages/2/with/x"),
    ("itself", lambda: one(with_={"x": "${{ size(stages.s.output) }}"}), "unknown-reference", "#/spec/stages/2/with/x"),
    ("item without fan-out", lambda: one(with_={"x": "${{ item }}"}), "unknown-reference", "#/spec/stages/2/with/x"),
    ("output in over", lambda: one(fan_out="output"), "unknown-reference", "#/spec/stages/2/fan_out/over"),
    ("gate", lambda: one(gate="output.score >"), "expression-invalid", "#/spec/stages/2/gate/check"),
    ("timeout", lambda: one(timeout=0), "out-of-range", "#/spec/stages/2/timeout"),
    ("timeout of years", lambda: one(timeout=1e9), "out-of-range", "#/spec/stages/2/timeout"),
    ("retries", lambda: one(retry=RetryPolicy(max_attempts=0)), "out-of-range", "#/spec/stages/2/retry/max_attempts"),
    ("priority", lambda: one(priority=101), "out-of-range", "#/spec/stages/2/priority"),
    ("version range", lambda: one(version="newest"), "invalid-version", "#/spec/stages/2/version"),
    ("name", lambda: PipelineBuilder("a/b").build(), "invalid-character", "#/metadata/name"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "code", "pointer"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_a_definition_that_cannot_run_is_refused(make: Callable[[], PipelineSpec], code: str, pointer: str) -> None:
    """Each fault has its stable code and names its place."""
    with pytest.raises(InvalidPipeline) as refused:
        validate(make())
    assert refused.value.status == 422
    assert refused.value.errors[0].code == code
    assert not pointer or refused.value.errors[0].pointer == pointer


def test_a_cycle_is_shown_as_a_path() -> None:
    """The path begins and ends with the same stage, and every step of it is a need."""
    spec = stages(("a", ["c"]), ("b", ["a"]), ("c", ["b"]), ("d", []))
    with pytest.raises(InvalidPipeline) as refused:
        validate(spec)
    path = refused.value.data["cycle"]
    assert isinstance(path, list)
    assert path[0] == path[-1]
    needs = {stage.id: stage.needs for stage in spec.spec.stages}
    assert all(later in needs[earlier] for earlier, later in pairwise(path))


def test_the_largest_definition_is_accepted() -> None:
    """10,000 stages, and 100 in a row, are within the limits."""
    assert validate(wide(10_000)) == []
    assert validate(deep(100)) == []


def test_faults_are_listed_together_and_bounded() -> None:
    """All stages are looked at, and never more than fifty faults are told."""
    p = PipelineBuilder("many")
    for number in range(80):
        p.stage(f"s{number}", "work", timeout=-1, priority=1000)
    with pytest.raises(InvalidPipeline) as refused:
        validate(p.build())
    assert len(refused.value.errors) == 50


def test_impossible_capabilities_are_warnings() -> None:
    """An agent may come later, so a task type or capability that nobody offers now does not refuse the definition."""
    assert validate(built(), {"dataset.ingest", "dataset.clean", "dataset.join", "gpu"}) == [
        "stage `score`: no registered agent offers `dataset.score`"
    ]


def test_the_schema_names_the_fields_as_they_are_written() -> None:
    """The JSON Schema for editors has the wire names, such as `with` and `apiVersion`."""
    schema = definition_schema()
    assert {"$ref", "$defs", "$schema"} <= set(schema)
    assert "with" in schema["$defs"]["Stage"]["properties"]
    assert "apiVersion" in schema["$defs"]["PipelineSpec"]["properties"]


MANY: Final = """\
apiVersion: mcp-control/v1
kind: Pipeline
metadata: {name: many}
spec:
  stages:
    - id: a
      uses: t
      needs: [b]
    - id: b
      uses: t
      needs: [a]
    - id: c
      uses: 5
      speed: fast
      needs: [nobody]
    - id: d
      uses: t
      needs: [c]
      with:
        x: ${{ stages.z.output }}
        y: ${{ size( }}
  wrong: 1
"""


def test_faults_of_shape_and_of_meaning_are_told_together_with_their_lines() -> None:
    """A wrong type in one stage hides neither a cycle nor bad expressions elsewhere; each has its line and column."""
    data = parse_yaml(MANY)
    with pytest.raises(Invalid) as refused:
        from_data(data)
    found = located(MANY, [*refused.value.errors, *further(data)])
    assert {(error.code, error.pointer, error.line, error.column) for error in found} == {
        ("wrong-type", "#/spec/stages/2/uses", 13, 7),
        ("unknown-field", "#/spec/stages/2/speed", 14, 7),
        ("unknown-field", "#/spec/wrong", 22, 3),
        ("dag-cycle", "#/spec/stages/0/needs", 8, 7),
        ("dag-unknown-node", "#/spec/stages/2/needs/0", 15, 15),
        ("unknown-reference", "#/spec/stages/3/with/x", 20, 9),
        ("expression-invalid", "#/spec/stages/3/with/y", 21, 9),
    }


def test_what_cannot_be_known_is_not_called_wrong() -> None:
    """Where a stage's id cannot be read, nobody is told that the stage they need is not there."""
    text = MANY.replace("id: c", "id: [c]").replace("needs: [nobody]", "needs: []")
    found = {error.code for error in further(parse_yaml(text))}
    assert found == {"dag-cycle", "expression-invalid"}


KEYS: Final = st.sampled_from(["id", "uses", "needs", "with", "a", "x/~y"])


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text("ab${ }.", max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
        max_leaves=20,
    )
)
def test_whatever_is_given_as_a_definition_is_looked_through_without_failing(data: object) -> None:
    """Looking for further faults never raises, and every fault is found in the text again."""
    text = json.dumps({"metadata": data, "spec": {"stages": [data, {"id": "a", "uses": "t", "with": data}]}})
    again = parse_yaml(text)
    for error in located(text, further(again)):
        assert error.line == 1
        assert error.column is not None
