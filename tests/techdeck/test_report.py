"""Stage 5: aggregates, the report document and the page."""

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
import pytest
from typing_extensions import override

from mcp_control.techdeck.model import Options, Plan, QualityOptions
from mcp_control.techdeck.quality.labels import coded, label
from mcp_control.techdeck.quality.page import render
from mcp_control.techdeck.quality.plots import number, written
from mcp_control.techdeck.quality.report import Quality, StageCount, assess_quality
from mcp_control.techdeck.validation.combine import CategoryBias, Finding, GroupShare, ValidationSummary
from mcp_control.techdeck.validation.combine import combine as combine_validation
from mcp_control.techdeck.validation.regard import Association, Pair
from tests.techdeck.conversations import Turns, combined, frame, processed, quiet, validated

NASTY = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"
PLAN = Plan(format="chatml", container="jsonl", file="a.jsonl", sha256="0" * 64)
CHECKS = msgspec.structs.replace(
    combine_validation([]),
    structure_valid=1.0,
    bias=0.9,
    categories=[
        CategoryBias(
            category="gender",
            mentions=4,
            groups=[GroupShare(group="women", conversations=4, share=0.1, low=0.05, high=0.2)],
            balance=None,
            hits=1,
            excused=2,
            weighted=1.0,
            sentences=1000,
            score=0.9,
            low=0.8,
            high=0.95,
            pairs=[
                Pair(
                    category="gender",
                    a="women",
                    b="men",
                    regard_a=0.1,
                    regard_b=0.4,
                    sentences_a=40,
                    sentences_b=50,
                    difference=-0.3,
                    low=-0.5,
                    high=-0.1,
                    p_holm=0.01,
                    flagged=True,
                ),
            ],
            associations=[
                Association(category="gender", group="women", attribute="nurse", together=12, log_odds=1.5, z=3.2),
            ],
        )
    ],
    pii_by_class={"EMAIL": 2},
    findings=[Finding(code="V_CONTENT", severity="warn", metric="content_ok", value=0.5, rows=3, text="broken")],
)
SECTIONS = [
    "Scores",
    "Gates",
    "Recommendations",
    "Rows through the stages",
    "Size",
    "Languages",
    "Sentiment and emotion",
    "Validation and readability",
    "Privacy",
    "Bias",
    "Duplicates and splits",
    "Conversations to look at first",
]


def _rows(count: int) -> list[Turns]:
    rng = random.Random(11)
    words = ["sad", "calm", "work", "home", "friend", "never", "the", "and", "of", "to", "that", "is", "you", "feel"]
    rows: list[Turns] = []
    for _ in range(count):
        texts = [" ".join(rng.choice(words) for _ in range(rng.randint(3, 70))) + "." for _ in range(4)]
        rows.append(list(zip(["user", "assistant"] * 2, texts, strict=True)))
    return rows + rows[: count // 10]


def _assess(
    data: pl.DataFrame,
    folder: Path,
    *,
    cuts: list[int] | None = None,
    options: Options | None = None,
    checks: ValidationSummary = CHECKS,
    plan: Plan = PLAN,
    rejected: int = 0,
) -> tuple[Quality, dict[str, Any]]:
    results = processed(data, folder, cuts, options)
    stages = [
        StageCount(
            name="ingestion",
            rows_in=data.height + rejected,
            rows_out=data.height,
            rejected=rejected,
            rejected_by_code={"E_JSON": rejected} if rejected else {},
        )
    ]
    result = assess_quality(
        [part.path for part in results],
        [part.signatures for part in results],
        combined(results, folder, options),
        checks,
        stages,
        plan,
        folder / "quality",
        options or Options(),
        quiet,
    )
    return result, json.loads(result.report.read_bytes())


class _Page(HTMLParser):
    """Collects headings and attributes, and checks that elements close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.headings: list[str] = []

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    @override
    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    @override
    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    @override
    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in {"h1", "h2"}:
            self.headings.append(data)


def _read(page: Path) -> _Page:
    parser = _Page()
    parser.feed(page.read_text(encoding="utf-8"))
    parser.close()
    assert parser.open == []
    return parser


def test_the_report_counts_what_is_there(tmp_path: Path) -> None:
    """Rows, copies, rejects and histograms equal the known truth."""
    _, report = _assess(validated(frame(_rows(50))), tmp_path, rejected=2)
    assert report["size"]["rows"] == 55
    assert report["duplicates"]["exact"] == 5
    assert report["rejected"] == {"rows": 2, "share": round(2 / 57, 6), "by_code": [{"name": "E_JSON", "rows": 2}]}
    assert sum(report["size"]["histograms"]["tokens"]["rows"]) == 55
    assert report["size"]["histograms"]["turns"]["rows"][3] == 55
    assert sum(report["sentiment"]["roles"]["user"]["rows"]) == 55
    parts = {part["name"]: part["score"] for part in report["quality"]["parts"]}
    assert parts["duplication"] == round(1 - 5 / 55, 4)
    assert parts["completeness"] == 1.0
    assert parts["bias"] == 0.9
    assert [row["reasons"] for row in report["worst"]][:5] == [["duplicate"]] * 5


def test_distinct_2_is_counted_on_kept_conversations_message_by_message(tmp_path: Path) -> None:
    """a b a b | b c holds ab, ba, ab, bc: three of four; its copy adds nothing."""
    rows: list[Turns] = [[("user", "a b a b"), ("assistant", "b c")]] * 2
    _, report = _assess(validated(frame(rows)), tmp_path)
    (diversity,) = (part for part in report["quality"]["parts"] if part["name"] == "diversity")
    assert diversity["of"]["distinct_2"] == 0.75


@pytest.mark.parametrize("cuts", [[1], [7, 20, 20, 41]])
def test_the_report_does_not_depend_on_partitions(tmp_path: Path, cuts: list[int]) -> None:
    """The same bytes, JSON and page, however the rows are divided."""
    data = validated(frame(_rows(40)))
    whole, _ = _assess(data, tmp_path / "whole")
    divided, _ = _assess(data, tmp_path / "divided", cuts=cuts)
    assert whole.report.read_bytes() == divided.report.read_bytes()
    assert whole.page.read_bytes() == divided.page.read_bytes()


def test_the_page_has_every_section_and_is_well_formed(tmp_path: Path) -> None:
    """Headings in order, elements closed, plots described, tables captioned."""
    result, _ = _assess(validated(frame(_rows(30))), tmp_path, rejected=1)
    page = _read(result.page)
    assert page.headings[0].startswith("Quality report")
    assert page.headings[1:] == SECTIONS
    assert page.tags.count("svg") == page.tags.count("figcaption") >= 8
    assert page.tags.count("table") == page.tags.count("caption")
    text = result.page.read_text()
    assert text.count('role="img"') == page.tags.count("svg")
    assert "prefers-color-scheme:dark" in text


def test_the_page_refers_to_nothing_outside(tmp_path: Path) -> None:
    """No script, link, image or address."""
    result, _ = _assess(validated(frame(_rows(10))), tmp_path)
    page = _read(result.page)
    assert not {"script", "link", "img", "iframe", "object", "a"} & set(page.tags)
    assert not {"src", "href", "xlink:href", "style", "onclick"} & {name for name, _ in page.attributes}
    text = result.page.read_text()
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_text_from_the_data_is_escaped(tmp_path: Path) -> None:
    """A hostile file name, id, warning or finding stays text."""
    data = validated(frame([*_rows(10), _rows(10)[0]])).with_columns(pl.lit(NASTY).alias("id"))
    plan = msgspec.structs.replace(PLAN, file=NASTY, warnings=[NASTY], encoding=NASTY)
    checks = msgspec.structs.replace(
        CHECKS,
        findings=[msgspec.structs.replace(CHECKS.findings[0], text=NASTY)],
        pii_by_class={NASTY: 1},
        categories=[msgspec.structs.replace(CHECKS.categories[0], category=NASTY)],
    )
    result, _ = _assess(data, tmp_path, plan=plan, checks=checks)
    page = _read(result.page)
    assert not {"script", "img"} & set(page.tags)
    assert "<script" not in result.page.read_text()
    assert "&lt;script&gt;" in result.page.read_text()


@pytest.mark.parametrize(("gate", "verdict"), [("enforce", "failed"), ("warn", "warned"), ("off", "off")])
def test_the_gate_option_says_what_a_failure_means(tmp_path: Path, gate: str, verdict: str) -> None:
    """Residual personal data fails the gate; only "enforce" stops the run."""
    options = Options(quality=msgspec.convert({"gate": gate}, QualityOptions))
    checks = msgspec.structs.replace(CHECKS, residual_rows=1)
    result, report = _assess(validated(frame(_rows(20))), tmp_path, options=options, checks=checks)
    assert result.gate == report["quality"]["gate"] == verdict
    assert result.failed == ["residual_pii"]
    assert result.stops is (verdict == "failed")


def test_an_empty_data_set_is_reported_as_not_assessed(tmp_path: Path) -> None:
    """No score, and no pass."""
    result, report = _assess(validated(frame([])), tmp_path, checks=combine_validation([]), rejected=3)
    assert result.score is None
    assert result.gate == "failed"
    assert report["size"]["rows"] == 0
    assert {part["score"] for part in report["quality"]["parts"]} == {None}
    _read(result.page)


def test_numbers_are_short_and_stable() -> None:
    """Thousands are grouped, fractions have three places, larger ones one."""
    assert [number(value) for value in (1234, 0.5, 12.345, 0.0, -3)] == ["1,234", "0.500", "12.3", "0", "-3"]


def test_scores_are_never_rounded_to_perfect_or_to_nothing() -> None:
    """What is not quite 1 or 0 does not read like it; counts stay whole."""
    assert [written(value) for value in (1.0, 0.9999, 0.0, 0.0004, 0.7)] == [
        "1.000",
        "0.999",
        "0.000",
        "under 0.001",
        "0.700",
    ]
    assert [written(value) for value in (1, 0, 4825, -0.25)] == ["1", "0", "4,825", "-0.250"]


def test_score_and_verdict_come_first_with_the_reason_in_words(tmp_path: Path) -> None:
    """Before any section: the score, a sign and a word for the verdict, and each condition that is not met."""
    _, report = _assess(validated(frame(_rows(20))), tmp_path, checks=msgspec.structs.replace(CHECKS, residual_rows=3))
    page = render(report)
    head = page[: page.index("<section")]
    assert 'class="verdict bad"' in head
    assert "✗ Gate failed: nothing is exported" in head
    assert "Not met: Rows with personal data left must be exactly 0, but it is 3." in head
    assert head.index('class="verdict') < head.index('class="cards"') < head.index("SHA-256")
    assert "✗\u00a0failed" in page
    assert "✓\u00a0passed" in page


def test_scores_are_alike_wherever_they_are_told(tmp_path: Path) -> None:
    """The score handed on, which the manifest holds, is the report's, of four places; the gate's value has more."""
    result, report = _assess(validated(frame(_rows(50))), tmp_path)
    (gate,) = [gate for gate in report["quality"]["gates"] if gate["name"] == "overall"]
    assert result.score == report["quality"]["score"] == round(gate["value"], 4) != gate["value"]


def test_a_finding_that_counts_places_has_no_rows(tmp_path: Path) -> None:
    """Its cell in the table is empty, and the numbers of the others stay numbers."""
    places = msgspec.structs.replace(CHECKS.findings[0], code="V_LOOKALIKES", rows=None, text="at 7 places")
    checks = msgspec.structs.replace(CHECKS, findings=[*CHECKS.findings, places])
    result, report = _assess(validated(frame(_rows(20))), tmp_path, checks=checks)
    assert [item["rows"] for item in report["validation"]["findings"]] == [3, None]
    row = next(line for line in result.page.read_text().split("<tr>") if "at 7 places" in line)
    assert row.count("</td>") == 4
    assert "not assessed" not in row


def test_codes_and_metric_names_are_told_in_plain_words(tmp_path: Path) -> None:
    """A reject code has its meaning beside it, a gate its everyday name; an unknown name stays itself."""
    result, _ = _assess(validated(frame(_rows(20))), tmp_path, rejected=2)
    text = result.page.read_text()
    assert "not valid JSON (E_JSON)" in text
    assert "Groups of copies across splits" in text
    assert "split_leak" not in text
    assert (coded("E_UNHEARD_OF"), label("klingon")) == ("E_UNHEARD_OF", "klingon")


def test_every_plot_has_a_title_a_unit_and_a_description(tmp_path: Path) -> None:
    """Screen readers hear what the bars show, and everybody reads what they measure."""
    result, _ = _assess(validated(frame(_rows(20))), tmp_path)
    plots = re.findall(r"<svg.*?</svg>", result.page.read_text(), re.DOTALL)
    assert len(plots) >= 8
    for plot in plots:
        assert re.search(r'role="img" .*?aria-label="[^":]+: [^"]+"><title>[^<]+</title>', plot)
        assert re.search(r'class="tick" [^>]*text-anchor="middle">[^<]*[a-z]{5}', plot)


def test_no_partitions_at_all_give_a_report(tmp_path: Path) -> None:
    """Every row rejected: the report says so."""
    stages = [StageCount(name="ingestion", rows_in=3, rows_out=0, rejected=3, rejected_by_code={"E_JSON": 3})]
    result = assess_quality(
        [], [], combined([], tmp_path), combine_validation([]), stages, PLAN, tmp_path, Options(), quiet
    )
    assert result.failed == ["overall", "rejected"]
