"""The report as one self-contained page: our own CSS and SVG, no script, no reference to anything outside.

Every value from the data is escaped. It reads in light and dark, prints, and works for screen readers: headings in
order, tables with captions and scopes, plots with descriptions.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

from mcp_control.techdeck.quality.labels import RELATIONS, SEVERITIES, coded, label
from mcp_control.techdeck.quality.plots import bars, columns, intervals, number, written
from mcp_control.techdeck.quality.style import STYLE

_VERDICTS = {
    "passed": ("good", "✓ Gate passed"),
    "failed": ("bad", "✗ Gate failed: nothing is exported"),
    "warned": ("warn", "! Gate failed, exported all the same: the run was told to warn only"),
    "off": ("warn", "! Gate off: nothing was judged"),
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
        _section("Languages", _ranked("Language of the user's text", report["languages"], "conversations", "No rows.")),
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
        f"<title>Quality report: {escape(report['dataset']['file'])}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f'<section aria-label="{escape(title)}"><h2>{escape(title)}</h2>{body}</section>'


def _value(value: float | None) -> str:
    return "not assessed" if value is None else written(value)


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> str:
    """A table; numbers are right-aligned, None reads "not assessed", "" is an empty cell, all text is escaped."""
    numeric = [
        bool(rows) and all(row[place] == "" or not isinstance(row[place], str) for row in rows)
        for place in range(len(heads))
    ]
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


def _plots(*figures: str) -> str:
    return f'<div class="plots">{"".join(figures)}</div>'


def _ranked(title: str, rows: Sequence[dict[str, Any]], unit: str, empty: str) -> str:
    if not rows:
        return f'<p class="soft">{escape(empty)}</p>'
    shown = [(row["name"], row["rows"]) for row in rows[:15]]
    rest = sum(row["rows"] for row in rows[15:])
    return _plots(bars(title, [*shown, ("others", rest)] if rest else shown, unit))


def _summary(report: dict[str, Any]) -> str:
    data, size = report["dataset"], report["size"]
    shape = data["format"] + (f" ({data['subformat']})" if data["subformat"] else "")
    cards = [
        ("conversations", number(size["rows"])),
        ("messages", number(size["turns"])),
        (f"tokens ({size['tokenizer']})", number(size["tokens"])),
        ("rows set aside", number(report["rejected"]["rows"])),
    ]
    warnings = ", ".join(coded(code) for code in data["warnings"])
    return (
        f"<header><h1>Quality report: {escape(data['file'])}</h1>{_verdict(report['quality'])}{_cards(cards)}"
        + (f"<p>Warnings of the file: {escape(warnings)}</p>" if warnings else "")
        + f'<p class="soft file">{escape(shape)}, {escape(data["container"])}, {escape(data["encoding"])}, compression '
        f"{escape(data['compression'])}; SHA-256 <code>{escape(data['sha256'])}</code></p></header>"
    )


def _verdict(quality: dict[str, Any]) -> str:
    """Score, verdict and why, at one glance."""
    tone, verdict = _VERDICTS[quality["gate"]]
    failed = [gate for gate in quality["gates"] if gate["passed"] is False]
    assessed = [part for part in quality["parts"] if part["score"] is not None]
    lines = [f"Not met: {_condition(gate)}, but it is {_value(gate['value'])}." for gate in failed]
    if not failed:
        lines.append(
            f"All {len(quality['gates'])} conditions are met; the score had to be {_limit(quality['gates'][0])}."
        )
    if assessed:
        weakest = min(assessed, key=lambda part: float(part["score"]))
        lines.append(f"Weakest part: {label(weakest['name'])}, {_value(weakest['score'])}.")
    score = _value(quality["score"])
    of = " <small>of 1</small>" if quality["score"] is not None else ""
    return (
        f'<div class="verdict {tone}"><span class="score">{score}{of}</span><div><strong>{escape(verdict)}</strong>'
        + "".join(f"<p>{escape(line)}</p>" for line in lines)
        + "</div></div>"
    )


def _limit(gate: dict[str, Any]) -> str:
    return f"{RELATIONS[gate['relation']]} {written(gate['limit'])}"


def _condition(gate: dict[str, Any]) -> str:
    return f"{label(gate['name'])} must be {_limit(gate)}"


def _scores(quality: dict[str, Any]) -> str:
    parts = [(label("overall"), quality["score"]), *((label(part["name"]), part["score"]) for part in quality["parts"])]
    rows = [
        [label(part["name"]), part["score"], f"{part['weight']:.0%}",
         ", ".join(f"{label(name).lower()} {_value(value)}" for name, value in part["of"].items())]
        for part in quality["parts"]
    ]  # fmt: skip
    return _plots(
        bars("Scores", parts, "score from 0 to 1, higher is better", most=1.0, mark=quality["threshold"])
    ) + _table("Parts of the overall score", ["Part", "Score", "Weight", "Mean of"], rows)


def _gates(gates: Sequence[dict[str, Any]]) -> str:
    words = {True: "✓\u00a0passed", False: "✗\u00a0failed", None: "not assessed"}
    rows = [[label(gate["name"]), _limit(gate), gate["value"], words[gate["passed"]]] for gate in gates]
    return _table("Every condition must be met", ["Gate", "Must be", "Is", "Result"], rows)


def _recommendations(items: Sequence[dict[str, Any]]) -> str:
    if not items:
        return '<p class="soft">Nothing to recommend.</p>'
    lines = [
        f"<li><p><b>{escape(item['text'])}</b></p><p class=soft>{escape(label(item['metric']))}: {_value(item['value'])}; "
        f"{number(item['rows'])} rows</p>{_command(item['command'])}</li>"
        for item in items
    ]
    return f'<ol class="advice">{"".join(lines)}</ol>'


def _command(command: str | None) -> str:
    return "" if command is None else f"<code>{escape(command)}</code>"


def _stages(report: dict[str, Any]) -> str:
    rows = [[stage["name"], stage["rows_in"], stage["rows_out"], stage["rejected"]] for stage in report["stages"]]
    codes = [[coded(row["name"]), row["rows"]] for row in report["rejected"]["by_code"]]
    return _table("Rows", ["Stage", "In", "Out", "Set aside"], rows) + (
        _table("Why rows were set aside; the quarantine file has each of them", ["Reason", "Rows"], codes)
        if codes
        else '<p class="soft">No row was set aside.</p>'
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
    return _plots(
        *(
            columns(titles[name], _bins(found["from"]), found["rows"], f"{unit} from this number up to the next")
            for name, unit, found in (
                (name, titles[name].partition(" ")[0].lower(), size["histograms"][name]) for name in titles
            )
        )
    )


def _feeling(report: dict[str, Any]) -> str:
    sentiment, emotion = report["sentiment"], report["emotion"]
    labels = [f"{bound:+.1f}" for bound in sentiment["from"]]
    rows = [
        [role, found["mean"], found["conversations"], found["vader_mean"], found["vader_sample"]]
        for role, found in sorted(sentiment["roles"].items(), reverse=True)
    ]
    plots = [
        columns(f"Sentiment of the {role}", labels, found["rows"], "from -1, negative, to +1, positive; steps of 0.2")
        for role, found in sorted(sentiment["roles"].items(), reverse=True)
    ]
    felt = bars("Emotion words", list(emotion["hits_per_100_words"].items()), "per 100 words")
    coverage = _value(emotion["coverage"])
    return (
        _plots(*plots, felt)
        + _table(
            "Mean over conversations, -1 to 1: lexicon on every turn, full VADER on a fixed sample of first turns",
            ["Role", "Lexicon", "Conversations", "VADER", "Sample"],
            rows,
        )
        + f'<p class="soft">The emotion lexicon knows a share of {escape(coverage)} of all words.</p>'
    )


def _validation(report: dict[str, Any]) -> str:
    found, reading = report["validation"], report["readability"]
    shares = [(label(name), found[name]) for name in ("structure_valid", "alternation", "content_ok")]
    rows = [
        ["Rows with warnings", found["rows_with_warnings"]],
        ["Repetitive rows", report["repetition"]["rows"]],
        ["Flesch reading ease (English)", reading["flesch"]],
        ["Flesch-Kincaid grade (English)", reading["grade"]],
        ["Rows below 30 in reading ease", reading["hard_to_read"]],
    ]
    findings = [
        [SEVERITIES[item["severity"]], item["text"], item["value"], "" if item["rows"] is None else item["rows"]]
        for item in found["findings"]
    ]
    flags = [[coded(row["name"]), row["rows"]] for row in report["flags"]]
    return (
        _plots(bars("Checks passed", shares, "share from 0 to 1, higher is better", most=1.0))
        + (_table("Findings", ["Severity", "Finding", "Value", "Rows"], findings) if findings else "")
        + _table("Text", ["Metric", "Value"], rows)
        + (_table("Flags", ["Flag", "Rows"], flags) if flags else '<p class="soft">No row carries a flag.</p>')
    )


def _privacy(privacy: dict[str, Any]) -> str:
    rows = [
        ["Rows with personal data", privacy["rows_with_personal_data"]],
        ["Places found", privacy["spans"]],
        ["Share of rows", privacy["rate"]],
        ["Rows with personal data left", privacy["residual_rows"]],
        ["Privacy score", privacy["score"]],
    ]
    done = "Found places were replaced by placeholders." if privacy["redacted"] else "Redaction was off."
    return (
        f"<p>{done}</p>"
        + _table("Personal data", ["Metric", "Value"], rows)
        + _ranked("Places by class", privacy["by_class"], "places", "No personal data was found.")
    )


def _bias(bias: dict[str, Any]) -> str:
    found = bias["categories"]
    least = min((row["low"] for row in found if row["low"] is not None), default=0.0)
    scores = [
        [label(row["category"]), row["score"], row["low"], row["high"], row["weighted"], row["hits"], row["excused"]]
        for row in found
    ]
    shares = [
        [label(row["category"]), group["group"], group["conversations"], group["share"], group["low"], group["high"]]
        for row in found
        for group in row["groups"]
        if group["conversations"]
    ]
    pairs = [
        [label(row["category"]), f"{pair['a']} / {pair['b']}", pair["difference"], pair["low"], pair["high"],
         "! look here" if pair["flagged"] else "no flag"]
        for row in found
        for pair in row["pairs"]
    ]  # fmt: skip
    words = [
        [
            label(row["category"]),
            f"{link['group']} and {link['attribute']}",
            link["log_odds"],
            link["z"],
            link["together"],
        ]
        for row in found
        for link in row["associations"]
    ]
    tables = [
        _plots(
            intervals(
                "Freedom from derogation",
                [(label(row["category"]), row["low"], row["score"], row["high"]) for row in found],
                "score and 95 % interval, higher is better",
                max((floor for floor in (0.0, 0.5, 0.9) if floor <= least), default=0.0),
            )
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
