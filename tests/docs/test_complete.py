"""The documentation names everything there is, and nothing else."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import pytest

from mcp_control.agents.model import AgentState
from mcp_control.agents.registration import TRANSITIONS as AGENT_TRANSITIONS
from mcp_control.configuration.settings import load
from mcp_control.kernel.breaker_rules import STATES as BREAKER_STATES
from mcp_control.kernel.breaker_rules import TRANSITIONS as BREAKER_TRANSITIONS
from mcp_control.pipelines.input_model import ApprovalState, CompensationState
from mcp_control.pipelines.model import RunState, StageState
from mcp_control.pipelines.schedule_model import ScheduleState
from mcp_control.pipelines.transitions import (
    APPROVAL_TRANSITIONS,
    COMPENSATION_TRANSITIONS,
    RUN_TRANSITIONS,
    SCHEDULE_TRANSITIONS,
    STAGE_TRANSITIONS,
    VERBS,
)
from mcp_control.tasks.group_model import GroupState
from mcp_control.tasks.grouping import GROUP_TRANSITIONS
from mcp_control.tasks.model import TaskState
from mcp_control.tasks.operation_model import OPERATION_TRANSITIONS, OperationState
from mcp_control.tasks.transitions import TRANSITIONS as TASK_TRANSITIONS
from mcp_control.techdeck.quality.scoring import WEIGHTS
from tests.docs.pages import PAGES, ROOT, generator, text_of

PACKAGE = ROOT / "src/mcp_control"
GENERATOR = generator()
HOW = "python docs/generate.py writes it anew"


def _sources(folder: str = "") -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted((PACKAGE / folder).rglob("*.py")))


def _missing(page: str, names: Iterable[str]) -> list[str]:
    text = text_of(page)
    return [name for name in sorted(set(names)) if f"`{name}`" not in text]


@pytest.mark.parametrize("name", GENERATOR.PARTS)
def test_what_the_code_decides_is_written_as_the_code_has_it(name: str) -> None:
    """Settings, commands, routes, problems, metrics, options and state diagrams are those of the code."""
    page, write = GENERATOR.PARTS[name]
    found = GENERATOR.part(name).findall(text_of(page))
    assert found == [f"\n{write()}\n\n"], HOW


def _drawn(page: str, place: int) -> set[tuple[str, str, str]]:
    diagram = re.findall(r"```mermaid\nstateDiagram-v2\n(.*?)```", text_of(page), re.DOTALL)[place]
    edges: set[tuple[str, str, str]] = set()
    for line in diagram.splitlines():
        source, target, labels = re.fullmatch(r" +(\S+) --> (\w+)(?:: (.+))?", line).groups()  # type: ignore[union-attr]  # no match fails the test
        if source != "[*]":
            edges |= {(source, target, label) for label in (labels or "").split(", ")}
    return edges


@pytest.mark.parametrize(
    ("page", "place", "table"),
    [
        ("agents.md", 0, AGENT_TRANSITIONS),
        ("tasks.md", 0, TASK_TRANSITIONS),
        ("groups.md", 0, GROUP_TRANSITIONS),
        ("approvals.md", 0, APPROVAL_TRANSITIONS),
        ("runs.md", 2, COMPENSATION_TRANSITIONS),
        ("schedules.md", 0, SCHEDULE_TRANSITIONS),
        ("failures.md", 0, OPERATION_TRANSITIONS),
    ],
    ids=["agents", "tasks", "groups", "approvals", "compensations", "schedules", "operations"],
)
def test_diagrams_by_verb_have_the_edges_of_the_transition_tables(
    page: str, place: int, table: Mapping[Any, Any]
) -> None:
    """Edge by edge: verb, from, to."""
    wanted = {(str(s), str(t), verb) for verb, moves in table.items() for s, targets in moves.items() for t in targets}
    assert _drawn(page, place) == wanted


@pytest.mark.parametrize(("place", "table"), [(0, RUN_TRANSITIONS), (1, STAGE_TRANSITIONS)], ids=["runs", "stages"])
def test_diagrams_of_runs_have_the_edges_of_the_transition_tables(place: int, table: Mapping[Any, Any]) -> None:
    """Edge by edge: from, to."""
    assert _drawn("runs.md", place) == {(s.value, t.value, "") for s, targets in table.items() for t in targets}


def test_the_diagram_of_breakers_has_the_edges_of_the_transition_table() -> None:
    """Edge by edge: verb, from, to."""
    wanted = {
        (s, t, verb) for verb, moves in BREAKER_TRANSITIONS.items() for s, targets in moves.items() for t in targets
    }
    assert _drawn("breakers.md", 0) == wanted


@pytest.mark.parametrize("name", GENERATOR.edges())
def test_pictures_have_the_arrows_of_the_transition_tables(name: str) -> None:
    """Every state and every arrow of a picture, as it lies in the folder."""
    file = text_of(f"{name}.svg")
    assert file == GENERATOR.pictures()[f"{name}.svg"], HOW
    edges = {(source, target) for source, target, _ in GENERATOR.edges()[name] if source != "[*]"}
    assert set(re.findall(r'data-from="(\w+)" data-to="(\w+)"', file)) == edges
    assert {state for edge in edges for state in edge} <= set(re.findall(r">(\w+)</text>", file))


def test_every_state_is_explained() -> None:
    """Each state of agents, tasks, groups, runs and stages stands on its page."""
    assert _missing("agents.md", AgentState) == []
    assert _missing("breakers.md", BREAKER_STATES) == []
    assert _missing("tasks.md", TaskState) == []
    assert _missing("groups.md", GroupState) == []
    assert _missing("runs.md", [*RunState, *StageState, *CompensationState]) == []
    assert _missing("approvals.md", ApprovalState) == []
    assert _missing("schedules.md", get_args(ScheduleState)) == []
    assert _missing("failures.md", get_args(OperationState)) == []


def test_the_verbs_of_runs_are_allowed_where_the_page_says() -> None:
    """The table of verbs names the states each starts from."""
    section = text_of("runs.md").partition("## Verbs")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([a-z_, ]+) \|", section, re.MULTILINE))
    assert {verb: set(states.split(", ")) for verb, states in rows.items()} == {
        verb: {state.value for state in states} for verb, states in VERBS.items()
    }


def test_every_event_type_is_listed() -> None:
    """Those written out in the code, and those made of a state."""
    nouns = "breaker|agent|task|run|stage|approval|compensation|pipeline|schedule|"
    nouns += "limit|artifact|user|token|credential|enrolment|store|group"
    written = {
        name
        for folder in ("agents", "tasks", "pipelines", "artifacts", "security", "archive")
        for name in re.findall(rf'"((?:{nouns})\.[a-z_]+)"', _sources(folder))
    }
    finals = ("completed", "failed", "cancelled")
    made = {f"{noun}.{state}" for noun in ("task", "run", "stage", "group") for state in finals}
    made |= {"task.scheduled", "task.blocked", "task.queued"}
    made |= {f"compensation.{state}" for state in ("started", "completed", "failed")}
    made |= {f"approval.{verb}" for verb in ("requested", *(state.value for state in ApprovalState))} - {
        "approval.pending"
    }
    made |= {"task.expired", "stage.skipped", *(f"agent.{state.value}" for state in AgentState)}
    listed = set(re.findall(rf"`((?:{nouns})\.[a-z_]+)`", text_of("events.md")))
    assert listed == (written | made) - {"pipeline.yaml"}


def test_every_code_of_techdeck_is_listed() -> None:
    """Each E_, W_, V_ and R_ code of the sources is in the table, and no other."""
    pattern = r"\b[EWVR]_[A-Z][A-Z_]+\b"
    in_code = set(re.findall(rf'"({pattern})"', _sources("techdeck")))
    assert len(in_code) > 50
    assert set(re.findall(pattern, text_of("techdeck.md"))) - {"R_"} == in_code


def test_the_weights_of_the_score_are_those_of_the_code() -> None:
    """Parts and percentages."""
    rows = dict(re.findall(r"^\| (\w+) \| (\d+) % \|", text_of("techdeck.md"), re.MULTILINE))
    assert {name: int(share) for name, share in rows.items()} == {
        name: int(share * 100) for name, share in WEIGHTS.items()
    }


def test_every_code_of_invalid_input_is_listed() -> None:
    """The codes that answers and definitions name place by place."""
    at_doors = "".join(_sources(folder) for folder in ("api", "kernel", "security", "pipelines", "agents"))
    at_doors += (PACKAGE / "tasks/submission.py").read_text(encoding="utf-8")
    codes = set(re.findall(r'FieldError\((?:[^()]|\([^()]*\))*?code="([a-z]+(?:-[a-z]+)+)"', at_doors))
    codes |= set(re.findall(r'(?:field_error|_error)\([^,()]+, "([a-z]+(?:-[a-z]+)+)"', at_doors))
    codes |= set(re.findall(r'invalid\("[^"]*", "([a-z-]+)"', at_doors))
    assert len(codes) > 10
    assert _missing("api.md", codes) == []


def test_every_code_of_an_explanation_is_listed() -> None:
    """`explain` gives no code that the page does not have."""
    source = (PACKAGE / "tasks/explain.py").read_text(encoding="utf-8")
    codes = set(re.findall(r'_because\(\s*task,\s*"([a-z-]+)"', source)) | set(
        re.findall(r'code = "([a-z-]+)"', source)
    )
    assert len(codes) > 6
    assert _missing("tasks.md", codes) == []


def test_every_frame_and_close_code_is_listed() -> None:
    """Both sockets: every op, every code a socket is closed with."""
    sockets = "".join((PACKAGE / name).read_text(encoding="utf-8") for name in ("api/websocket.py", "tasks/wire.py"))
    ops = set(re.findall(r'tag="(\w+)"', sockets))
    text = text_of("api.md")
    assert len(ops) > 15
    assert [op for op in sorted(ops) if f"`{op}`" not in text and f'"op": "{op}"' not in text] == []
    codes = set(re.findall(r"(?:Gone|close|_shut|finish)\((\d{4}), |code, reason = (\d{4})", _sources("api")))
    numbers = {number for pair in codes for number in pair if number}
    assert len(numbers) > 5
    assert [number for number in sorted(numbers) if number not in text] == []


def test_settings_that_pages_name_exist() -> None:
    """No page tells of a setting or an option of techdeck that is not there."""
    settings = {source.name for source in load(environ={}).sources()}
    groups = sorted({name.partition(".")[0] for name in settings if "." in name})
    options = set(re.findall(r"^\| `([a-z_.]+)` \|", GENERATOR.options(), re.MULTILINE))
    stages = sorted({name.partition(".")[0] for name in options})
    named = {
        name
        for page in PAGES
        for name in re.findall(rf"`((?:{'|'.join([*groups, *stages])})\.[a-z_]+)", page.read_text(encoding="utf-8"))
    }
    assert len(named) > 40
    assert {name for name in named - settings - options if not name.startswith("ingest.mapping")} == set()


def test_every_known_pain_has_tests_that_are_there() -> None:
    """Each row of the table names tests, file and function, that exist; the tests that name a pain stand in its row."""
    rows = {
        int(number): set(re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", shown))
        for number, shown in re.findall(
            r"^\| (\d+) \|.*\| ([^|]+) \|$",
            text_of("reliability.md").partition("## Known pains")[2].partition("\n## ")[0],
            re.MULTILINE,
        )
    }
    assert {2, 3, 4, 5, 6, 8, 9, 10, 12, 14, 17, 18} <= rows.keys()
    for number, tests in rows.items():
        assert tests, number
        for file, name in tests:
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"
    file = "tests/integration/test_acceptance.py"
    named = re.findall(
        r'def (test_\w+)\((?:[^)]*)\) -> None:\n    """Pain (\d+):', (ROOT / file).read_text(encoding="utf-8")
    )
    assert len(named) >= 6
    assert [name for name, number in named if (file, name) not in rows[int(number)]] == []
