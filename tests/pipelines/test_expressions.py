"""Expressions and templates: what they give, what they refuse, and what they may cost."""

import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_control.expressions.programs import ExpressionError
from mcp_control.pipelines.expressions import Expression, Scope
from mcp_control.pipelines.templates import Template

OUTPUTS = {
    "a": b'{"artifact": {"id": "art_1"}, "rows": [1, 2, 3], "score": 0.9, "nothing": null}',
    "a-b": b'{"x": 2}',
    "big": msgspec.json.encode({"l": list(range(5000)), "text": "x" * 300_000}),
}
PARAMS = {"name": b'"Bob"', "n": b"3", "deep": b'{"l": [{"k": "v"}, {"k": "w"}]}', "none": b"null"}


def scope(**more: object) -> Scope:
    return Scope(PARAMS, OUTPUTS.__getitem__, {"id": "run_1", "pipeline": "p", "version": 2}, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("params.name", "Bob"),
        ("params.deep.l[1].k", "w"),
        ("params.deep.l[*].k", ["v", "w"]),
        ("params", {"name": "Bob", "n": 3, "deep": {"l": [{"k": "v"}, {"k": "w"}]}, "none": None}),
        ("stages.a.output.artifact.id", "art_1"),
        ("stages.a.output.nothing", None),
        ('stages["a-b"].output.x', 2),
        ("stages['a-b'].output", {"x": 2}),
        ("run.version", 2),
        ("item", "it"),
        ("index", 4),
        ("items", [{"r": 1}, {"r": 2}]),
        ("items[*].r", [1, 2]),
        ("items[1].r", 2),
        ("output.ok", True),
        ("params.n + 1", 4),
        ("params.n > 2 && params.name.startsWith('B')", True),
        ("stages.a.output.score >= 0.7", True),
        ("stages.a.output.score >= 1", False),
        ("size(stages.a.output.rows)", 3),
        ("stages.a.output.rows.filter(r, r > 1)", [2, 3]),
        ("stages.a.output.rows.map(r, r * 2)", [2, 4, 6]),
        ("items.all(i, i.r > 0)", True),
        ("has(stages.a.output.missing) ? 1 : 2", 2),
        ("params.none == null", True),
        ("'stages.x is text'", "stages.x is text"),
        ("true", True),
        ("{'a': [params.n, 1.5]}", {"a": [3, 1.5]}),
    ],
)
def test_an_expression_gives_its_value_with_its_type(source: str, value: object) -> None:
    """Paths and CEL give JSON values; a path's text and its value are the same."""
    here = scope(item=b'"it"', index=4, items=[b'{"r":1}', b'{"r":2}'], output=b'{"ok":true}')
    expression = Expression(source)
    assert msgspec.json.decode(expression.raw(here)) == value
    assert expression.value(here) == value


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("", "empty"),
        ("1 +", "syntax error"),
        ("x" * 1001, "1000 characters"),
        ("nobody.there", "there is no `nobody`"),
        ("sleep(3)", "no function `sleep`"),
        ("stages", "stages.<id>.output"),
        ("stages.a", "stages.<id>.output"),
        ("size(stages)", "stages.<id>.output"),
        ("stages[params.name].output", "stages.<id>.output"),
        ("params.deep.l.map(x, x.k).map(y, y)", "at most one `map`"),
        ("params.deep.l.all(x, params.deep.l.all(y, true))", "do not nest"),
        ("params.deep.l.map(x, params.deep)", "element alone"),
        ("params.deep.l.all(item, true)", "has a meaning already"),
        ("params.deep.l" + ".filter(x, true)" * 5, "at most 4"),
        ("(" * 400 + "1" + ")" * 400, ""),
    ],
)
def test_what_cannot_be_evaluated_is_refused_beforehand(source: str, says: str) -> None:
    """Syntax, unknown names and functions, and everything too costly is refused when the definition is made."""
    with pytest.raises(ExpressionError) as refused:
        Expression(source)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("stages.a.output.missing", "there is no `missing`"),
        ("stages.a.output.rows[9]", "there is no [9]"),
        ("stages.a.output.rows.x", "needs an object for `.x`, got a list"),
        ("params.name[0]", "needs a list for [0], got text"),
        ("params.nothing", "no parameter `nothing`"),
        ("output", "has no value here"),
        ("params.n / 0", "division by zero"),
        ("params.name + 1", "Unsupported"),
        ("params.deep.zzz == 1", "there is no 'zzz'"),
        ("9223372036854775807 + params.n", "overflow"),
        ("size(stages.big.output.l)", "more than 256 KiB"),
    ],
)
def test_what_is_not_there_is_said_clearly(source: str, says: str) -> None:
    """An error names the expression and what was wrong with the value."""
    with pytest.raises(ExpressionError) as refused:
        Expression(source).raw(scope())
    assert source in str(refused.value)
    assert says in str(refused.value)


def test_a_macro_over_many_values_is_refused_before_it_costs() -> None:
    """CEL's macros cost the square of the list and more; they get up to a thousand values, paths with [*] any number."""
    many = scope(items=[b'{"r": 1}'] * 10_000)
    began = time.perf_counter()
    with pytest.raises(ExpressionError, match="up to 1000 values"):
        Expression("items.map(i, i.r)").raw(many)
    assert len(Expression("items[*].r").value(many)) == 10_000
    assert time.perf_counter() - began < 2


def test_a_plain_path_hands_on_the_text_that_stands_there() -> None:
    """Numbers keep their digits and objects their order, since nothing is decoded and encoded again."""
    text = b'{"v": {"b": 1.10, "a": 12345678901234567890, "c": [ ]}}'
    here = Scope({}, lambda _: text, {})
    assert bytes(Expression("stages.x.output.v").raw(here)) == b'{"b": 1.10, "a": 12345678901234567890, "c": [ ]}'


def test_references_are_known_without_evaluating() -> None:
    """Text that looks like a reference is none, an index in brackets is one."""
    expression = Expression("""stages.a.output.x == 'stages.b.output' || size(stages["c-d"].output) > params.n""")
    assert (expression.stages, expression.params, expression.roots) == ({"a", "c-d"}, {"n"}, {"stages", "params"})


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_a_whole_string_template_keeps_any_value(value: object) -> None:
    """Whatever JSON value a parameter has, `${{ params.x }}` puts exactly that into the payload."""
    here = Scope({"x": msgspec.json.encode(value)}, OUTPUTS.__getitem__, {})
    assert msgspec.json.decode(Template({"at": [{"x": "${{ params.x }}"}]}).render(here)) == {"at": [{"x": value}]}


@given(JSON)
def test_a_with_without_expressions_is_the_payload(value: object) -> None:
    """Constants come through unchanged."""
    payload = Template({"v": value}).render(scope())
    if "${{" not in str(value):
        assert msgspec.json.decode(payload) == {"v": value}


def test_embedded_expressions_become_text() -> None:
    """Strings stand as they are, other values as compact JSON, and `$${{` is a literal."""
    template = Template(
        {"t": "hi ${{ params.name }}: ${{ params.n }} ${{ params.deep.l }} ${{ params.none }} $${{ x }}"}
    )
    assert msgspec.json.decode(template.render(scope())) == {"t": 'hi Bob: 3 [{"k":"v"},{"k":"w"}] null ${{ x }}'}


def test_what_a_fan_out_adds_stands_beside_with() -> None:
    """`with` wins where it has a member of the same name."""
    assert msgspec.json.decode(Template({"a": 1, "item": 2}).render(scope(), {"item": b"9", "index": b"0"})) == {
        "a": 1,
        "item": 2,
        "index": 0,
    }
