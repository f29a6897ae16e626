"""The report as one self-contained page: our own CSS and SVG, no script, no reference to anything outside.

Every value from the data is escaped. It reads in light and dark, prints, and works for screen readers: headings in
order, tables with captions and scopes, plots with descriptions.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

from mcp_control.techdeck.quality.plots import bars, columns, intervals, number

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#566273;--page:#fbfbfa;--card:#fff;--line:#dde1e6;--bar:#3b6fb6;
--good:#1d7a46;--bad:#b3261e;--warn:#8a5a00}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ee;--soft:#a3adba;--page:#14181e;--card:#1c222a;--line:#323a45;
--bar:#7aa7e6;--good:#6fcf97;--bad:#ff8a80;--warn:#f0c36d}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:62rem;margin:0 auto;padding:2rem 1.25rem 4rem}h1{font-size:1.7rem;margin:0 0 .25rem}
h2{font-size:1.2rem;margin:2.5rem 0 .75rem;border-bottom:1px solid var(--line);padding-bottom:.3rem}
p{max-width:45rem}.soft{color:var(--soft)}.score{font-size:2.6rem;font-weight:650;line-height:1.1}
.good{color:var(--good)}.bad{color:var(--bad)}.warn{color:var(--warn)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.75rem;margin:1.25rem 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.75rem 1rem}
.card b{display:block;font-size:1.35rem}.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;margin:.75rem 0;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);padding-bottom:.3rem}
th,td{text-align:left;padding:.35rem .6rem;border-bottom:1px solid var(--line);vertical-align:top;overflow-wrap:anywhere}
td.n,th.n{text-align:right;white-space:nowrap}code{font-size:.88em;overflow-wrap:anywhere}
figure{margin:1rem 0;background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.75rem 1rem}
figcaption{font-weight:600;margin-bottom:.5rem}svg{width:100%;height:auto;max-width:46rem}
svg text{fill:var(--ink);font:12px system-ui,sans-serif}svg .tick{fill:var(--soft)}.bar{fill:var(--bar)}
.axis{stroke:var(--line)}.mark{stroke:var(--bad);stroke-width:2;stroke-dasharray:4 3}
.range{stroke:var(--bar);stroke-width:3}.dot{fill:var(--bar)}
@media print{body{background:#fff}figure,.card{break-inside:avoid}}
"""
_VERDICTS = {
    "passed": ("good", "The gate passed."),
    "failed": ("bad", "The gate failed: nothing is exported."),
    "warned": ("warn", "The gate failed, but the run was told to go on."),
    "off": ("warn", "The gate is off."),
}


def render(report: dict[str, Any]) -> str:
    """The page for the document of `report.build`."""
    sections = [
        _summary(report),
        _section("Scores", _scores(report["quality"])),
        _section("Gates", _gates(report["quality"]["gates"])),
        _section("Recommendations", _recommendations(report["quality"]["recommendations"])),
        _section("Rows through the stages", _stages(report)),
        _section("Size", _size(report["size"])),
        _section("Languages", _ranked("Language of the user's text", report["languages"], "No rows.")),
        _section("Sentiment and emotion", _feeling(report)),
        _section("Validation and readability", _validation(report)),
        _section("Privacy", _privacy(report["privacy"])),
        _section("Bias", _bias(report["bias"])),
        _section("Duplicates and splits", _duplicates(report)),
        _section("Conversations to look at first", _worst(report["worst"])),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Quality report: {escape(report['dataset']['file'])}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f'<section aria-label="{escape(title)}"><h2>{escape(title)}</h2>{body}</section>'


def _value(value: float | None) -> str:
    return "not assessed" if value is None else number(value)


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> str:
    """A table; numbers are right-aligned, None reads "not assessed", all text is escaped."""
    numeric = [bool(rows) and all(not isinstance(row[place], str) for row in rows) for place in range(len(heads))]
    head = "".join(
        f'<th scope="col"{" class=n" if right else ""}>{escape(name)}</th>'
        for name, right in zip(heads, numeric, strict=True)
    )
    lines = []
    for row in rows:
        cells = [
            f"<td>{escape(cell)}</td>" if isinstance(cell, str) else f"<td class=n>{_value(cell)}</td>" for cell in row
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}"><table><caption>{escape(caption)}'
        f"</caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cards(cards: Sequence[tuple[str, str]]) -> str:
    return (
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{escape(value)}</b>{escape(name)}</div>' for name, value in cards)
        + "</div>"
    )


def _ranked(title: str, rows: Sequence[dict[str, Any]], empty: str) -> str:
    if not rows:
        return f'<p class="soft">{escape(empty)}</p>'
    shown = [(row["name"], row["rows"]) for row in rows[:15]]
    rest = sum(row["rows"] for row in rows[15:])
    return bars(title, [*shown, ("others", rest)] if rest else shown)


def _summary(report: dict[str, Any]) -> str:
    data, quality, size = report["dataset"], report["quality"], report["size"]
    tone, verdict = _VERDICTS[quality["gate"]]
    shape = data["format"] + (f" ({data['subformat']})" if data["subformat"] else "")
    cards = [
        ("conversations", number(size["rows"])),
        ("messages", number(size["turns"])),
        (f"tokens ({size['tokenizer']})", number(size["tokens"])),
        ("rows set aside", number(report["rejected"]["rows"])),
    ]
    warnings = f"<p>Warnings of the file: {escape(', '.join(data['warnings']))}</p>" if data["warnings"] else ""
    return (
        f"<header><h1>Quality report: {escape(data['file'])}</h1>"
        f'<p class="soft">{escape(shape)}, {escape(data["container"])}, {escape(data["encoding"])}, compression '
        f"{escape(data['compression'])}; SHA-256 <code>{escape(data['sha256'])}</code></p>"
        f'<p class="score {tone}">{_value(quality["score"])}</p><p class="{tone}">{escape(verdict)} '
        f"Threshold {number(quality['threshold'])}.</p>{warnings}{_cards(cards)}</header>"
    )


def _scores(quality: dict[str, Any]) -> str:
    parts = [("overall", quality["score"]), *((part["name"], part["score"]) for part in quality["parts"])]
    rows = [
        [part["name"], part["score"], part["weight"], part["rows"],
         ", ".join(f"{name} {_value(value)}" for name, value in part["of"].items())]
        for part in quality["parts"]
    ]  # fmt: skip
    return bars("Scores, 0 to 1, higher is better", parts, most=1.0, mark=quality["threshold"]) + _table(
        "Parts of the overall score", ["Part", "Score", "Weight", "Rows", "Mean of"], rows
    )


def _gates(gates: Sequence[dict[str, Any]]) -> str:
    words = {True: "passed", False: "failed", None: "not assessed"}
    rows = [
        [gate["name"], gate["value"], f"{gate['relation']} {number(gate['limit'])}", words[gate["passed"]]]
        for gate in gates
    ]
    return _table("Every gate must pass", ["Gate", "Value", "Condition", "Result"], rows)


def _recommendations(items: Sequence[dict[str, Any]]) -> str:
    if not items:
        return '<p class="soft">Nothing to recommend.</p>'
    rows = [[item["text"], item["metric"], item["value"], item["rows"], item["command"]] for item in items]
    return _table("What to do next", ["Advice", "Metric", "Value", "Rows", "Command"], rows)


def _stages(report: dict[str, Any]) -> str:
    rows = [[stage["name"], stage["rows_in"], stage["rows_out"], stage["rejected"]] for stage in report["stages"]]
    return _table("Rows", ["Stage", "In", "Out", "Rejected"], rows) + _ranked(
        "Rejected rows by code", report["rejected"]["by_code"], "No row was rejected."
    )


def _bins(bounds: Sequence[float]) -> list[str]:
    """Labels of bins that begin at `bounds`; the last one is open."""
    named = [f"{bound // 1024}k" if bound >= 1024 else f"{bound:g}" for bound in bounds]
    return [*named[:-1], f"{named[-1]}+"]


def _size(size: dict[str, Any]) -> str:
    titles = {
        "turns": "Messages per conversation",
        "tokens": "Tokens per conversation",
        "chars": "Characters per conversation",
    }
    return "".join(
        columns(f"{titles[name]} (bins from)", _bins(found["from"]), found["rows"])
        for name, found in sorted(size["histograms"].items(), key=lambda item: list(titles).index(item[0]))
    )


def _feeling(report: dict[str, Any]) -> str:
    sentiment, emotion = report["sentiment"], report["emotion"]
    labels = [f"{bound:+.1f}" for bound in sentiment["from"]]
    rows = [
        [role, found["mean"], found["conversations"], found["vader_mean"], found["vader_sample"]]
        for role, found in sorted(sentiment["roles"].items(), reverse=True)
    ]
    plots = "".join(
        columns(f"Sentiment of the {role} (bins from)", labels, found["rows"])
        for role, found in sorted(sentiment["roles"].items(), reverse=True)
    )
    coverage = _value(emotion["coverage"])
    return (
        plots
        + _table(
            "Mean over conversations, -1 to 1: lexicon on every turn, full VADER on a fixed sample of first turns",
            ["Role", "Lexicon", "Conversations", "VADER", "Sample"],
            rows,
        )
        + bars("Emotion words per 100 words", list(emotion["hits_per_100_words"].items()))
        + f'<p class="soft">The emotion lexicon knows a share of {escape(coverage)} of all words.</p>'
    )


def _validation(report: dict[str, Any]) -> str:
    found, reading = report["validation"], report["readability"]
    shares = [(name, found[name]) for name in ("structure_valid", "alternation", "content_ok")]
    rows = [
        ["rows with warnings", found["rows_with_warnings"]],
        ["repetitive rows", report["repetition"]["rows"]],
        ["Flesch reading ease (English)", reading["flesch"]],
        ["Flesch-Kincaid grade (English)", reading["grade"]],
        ["rows below 30 in reading ease", reading["hard_to_read"]],
    ]
    findings = [[item["severity"], item["text"], item["value"], item["rows"]] for item in found["findings"]]
    return (
        bars("Shares of rows or pairs, 0 to 1", shares, most=1.0)
        + (_table("Findings", ["Severity", "Finding", "Value", "Rows"], findings) if findings else "")
        + _table("Text", ["Metric", "Value"], rows)
        + _ranked("Flags", report["flags"], "No row carries a flag.")
    )


def _privacy(privacy: dict[str, Any]) -> str:
    rows = [
        ["rows with personal data", privacy["rows_with_personal_data"]],
        ["places found", privacy["spans"]],
        ["share of rows", privacy["rate"]],
        ["rows with personal data left", privacy["residual_rows"]],
        ["privacy score", privacy["score"]],
    ]
    done = "Found places were replaced by placeholders." if privacy["redacted"] else "Redaction was off."
    return (
        f"<p>{done}</p>"
        + _table("Personal data", ["Metric", "Value"], rows)
        + _ranked("Places by class", privacy["by_class"], "No personal data was found.")
    )


def _bias(bias: dict[str, Any]) -> str:
    found = bias["categories"]
    scores = [
        [row["category"], row["score"], row["low"], row["high"], row["weighted"], row["hits"], row["excused"]]
        for row in found
    ]
    shares = [
        [row["category"], group["group"], group["conversations"], group["share"], group["low"], group["high"]]
        for row in found
        for group in row["groups"]
        if group["conversations"]
    ]
    pairs = [
        [row["category"], f"{pair['a']} / {pair['b']}", pair["difference"], pair["low"], pair["high"],
         "look here" if pair["flagged"] else "no flag"]
        for row in found
        for pair in row["pairs"]
    ]  # fmt: skip
    words = [
        [row["category"], f"{link['group']} and {link['attribute']}", link["log_odds"], link["z"], link["together"]]
        for row in found
        for link in row["associations"]
    ]
    tables = [
        intervals(
            "Derogation score by category with 95 % interval",
            [(row["category"], row["low"], row["score"], row["high"]) for row in found],
        ),
        _table(
            f"Derogation in {number(bias['sentences'])} sentences",
            ["Category", "Score", "Low", "High", "Weighted hits", "Hits", "Quoted, reported or denied"],
            scores,
        ),
        _table(
            "Conversations that mention a group, share with 95 % interval; descriptive, without a target",
            ["Category", "Group", "Conversations", "Share", "Low", "High"],
            shares,
        )
        if shares
        else '<p class="soft">No group is mentioned.</p>',
        _table(
            "Tone of assistants towards groups: difference with 95 % interval",
            ["Category", "Groups", "Difference", "Low", "High", "Flag"],
            pairs,
        )
        if pairs
        else "",
        _table(
            "Words that go together unusually often or seldom",
            ["Category", "Pair", "Log odds", "z", "Conversations"],
            words,
        )
        if words
        else "",
    ]
    return (
        f"<p>Score: <b>{_value(bias['score'])}</b>, the least of the assessed categories. Mentions describe, they are "
        "never penalised. A flag means: look here. It is no proof.</p>"
        + ("".join(tables) if found else '<p class="soft">No category was assessed.</p>')
        + f'<p class="soft">Not assessed: {escape(", ".join(bias["not_assessed"]))}.</p>'
    )


def _duplicates(report: dict[str, Any]) -> str:
    found, splits = report["duplicates"], report["splits"]
    cards = [
        ("exact copies", number(found["exact"])),
        ("near copies", number(found["near"])),
        ("clusters", number(found["clusters"])),
        ("groups across splits", number(splits["leaks"])),
    ]
    rows = [[name, splits["rows"][name], splits["kept"][name]] for name in ("train", "validation", "test")]
    return _cards(cards) + _table("Splits", ["Split", "Rows", "Rows without copies"], rows)


def _worst(worst: Sequence[dict[str, Any]]) -> str:
    if not worst:
        return '<p class="soft">Every conversation passes every row check.</p>'
    rows = [[row["id"], row["row"], row["score"], ", ".join(row["reasons"])] for row in worst]
    return _table("Least share of row checks passed", ["Id", "Row", "Score", "Reasons"], rows)
