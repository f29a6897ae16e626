"""Plots as SVG text: no script, no font, no reference to anything outside. Colours come from the page's CSS variables.

Every plot has a role, a title and a description for screen readers, and every bar a tooltip. All text is escaped here.
"""

from collections.abc import Sequence
from html import escape

# About the width at which a plot is shown, so that its text keeps its size on narrow and on wide screens.
_WIDTH = 460
_LABEL = 160
_VALUE = 74
_ROW = 28


def number(value: float) -> str:
    """Short decimal form: 1,234 · 0.873 · 12.5; the same on every machine."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.1f}"


def written(value: float) -> str:
    """A value as the page shows it: counts grouped, scores and shares with three places, never rounded up to 1 or down to 0."""
    if isinstance(value, int) or not 0 <= value <= 1:
        return number(value)
    if 0 < value < 0.001:
        return "under 0.001"
    return f"{min(value, 0.999) if value < 1 else value:.3f}"


def _figure(title: str, height: int, body: str, described: str) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg role="img" viewBox="0 0 {_WIDTH} {height}" '
        f'aria-label="{escape(title)}: {escape(described)}"><title>{escape(title)}</title>{body}</svg></figure>'
    )


def columns(title: str, labels: Sequence[str], values: Sequence[int], across: str) -> str:
    """A histogram of conversations: one column per bin, its count above it; `across` names the unit of the bins."""
    top, base, height = 46, 190, 236
    most = max(values, default=0) or 1
    step = _WIDTH / max(len(values), 1)
    body = [
        '<text class="tick" x="0" y="14">conversations</text>',
        f'<line class="axis" x1="0" y1="{base}" x2="{_WIDTH}" y2="{base}"/>',
        f'<text class="tick" x="{_WIDTH / 2:.0f}" y="{height - 8}" text-anchor="middle">{escape(across)}</text>',
    ]
    for place, (label, value) in enumerate(zip(labels, values, strict=True)):
        size = (base - top) * value / most
        left, middle = place * step + step * 0.1, place * step + step / 2
        body.append(
            f'<rect class="bar" x="{left:.1f}" y="{base - size:.1f}" width="{step * 0.8:.1f}" height="{size:.1f}">'
            f"<title>{escape(label)}: {number(value)}</title></rect>"
            f'<text class="tick" x="{middle:.1f}" y="{base + 18}" text-anchor="middle">{escape(label)}</text>'
        )
        if value:
            body.append(
                f'<text class="value" x="{middle:.1f}" y="{base - size - 6:.1f}" text-anchor="middle">'
                f"{number(value)}</text>"
            )
    described = ", ".join(f"{label}: {number(value)}" for label, value in zip(labels, values, strict=True))
    return _figure(title, height, "".join(body), described)


def bars(
    title: str,
    rows: Sequence[tuple[str, float | None]],
    unit: str,
    *,
    most: float | None = None,
    mark: float | None = None,
) -> str:
    """Horizontal bars with their values; `unit` names them under the plot.

    `most` is the value of a full bar, `mark` draws the threshold of the first bar.
    """
    full = most or max((value or 0.0 for _, value in rows), default=0.0) or 1.0
    space = _WIDTH - _LABEL - _VALUE
    top = 22 if mark is not None else 0
    base = top + _ROW * max(len(rows), 1)
    body = [f'<line class="axis" x1="{_LABEL}" y1="{top}" x2="{_LABEL}" y2="{base}"/>']
    values: list[str] = []  # above the threshold's line, so that they stay readable
    told: list[str] = []
    for place, (label, value) in enumerate(rows):
        y = top + place * _ROW + 4
        text = "not assessed" if value is None else written(value)
        told.append(f"{label}: {text}")
        size = space * min(max((value or 0.0) / full, 0.0), 1.0)
        body.append(
            f'<text class="label" x="{_LABEL - 8}" y="{y + 15}" text-anchor="end">{escape(_short(label))}</text>'
            f'<rect class="bar" x="{_LABEL}" y="{y}" width="{size:.1f}" height="20">'
            f"<title>{escape(told[-1])}</title></rect>"
        )
        values.append(f'<text class="value" x="{_LABEL + size + 6:.1f}" y="{y + 15}">{text}</text>')
    if mark is not None:
        x = _LABEL + space * mark / full
        body.append(
            f'<line class="mark" x1="{x:.1f}" y1="{top - 4}" x2="{x:.1f}" y2="{top + _ROW}"/>'
            f'<text class="tick" x="{x:.1f}" y="{top - 8}" text-anchor="middle">needed: {written(mark)}</text>'
        )
    body += [*values, _under(unit, base + 18)]
    return _figure(title, base + 26, "".join(body), ", ".join(told))


def _under(unit: str, y: int) -> str:
    middle = _LABEL + (_WIDTH - _LABEL - _VALUE) / 2
    return f'<text class="tick" x="{middle:.0f}" y="{y}" text-anchor="middle">{escape(unit)}</text>'


def intervals(
    title: str, rows: Sequence[tuple[str, float | None, float | None, float | None]], unit: str, floor: float = 0.0
) -> str:
    """One line per row on the scale `floor`..1: (label, low, value, high); a dot for the value on its interval."""
    space = _WIDTH - _LABEL - _VALUE
    base = _ROW * max(len(rows), 1)
    body = []
    for tick in range(3):
        x, at = _LABEL + space * tick / 2, floor + (1 - floor) * tick / 2
        body.append(
            f'<line class="axis" x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{base}"/>'
            f'<text class="tick" x="{x:.1f}" y="{base + 18}" text-anchor="middle">{at:.2f}</text>'
        )
    body.append(_under(unit, base + 38))
    said: list[str] = []
    for place, (label, low, value, high) in enumerate(rows):
        y = place * _ROW + 13
        body.append(
            f'<text class="label" x="{_LABEL - 8}" y="{y + 4}" text-anchor="end">{escape(_short(label))}</text>'
        )
        if value is None or low is None or high is None:
            body.append(f'<text class="value" x="{_LABEL}" y="{y + 4}">not assessed</text>')
            said.append(f"{label}: not assessed")
            continue
        left, dot, right = (
            _LABEL + space * min(max((point - floor) / (1 - floor), 0.0), 1.0) for point in (low, value, high)
        )
        told = f"{label}: {written(value)} ({written(low)} to {written(high)})"
        said.append(told)
        body.append(
            f'<line class="range" x1="{left:.1f}" y1="{y}" x2="{right:.1f}" y2="{y}"/>'
            f'<circle class="dot" cx="{dot:.1f}" cy="{y}" r="5"><title>{escape(told)}</title></circle>'
            f'<text class="value" x="{_LABEL + space + 10}" y="{y + 4}">{written(value)}</text>'
        )
    return _figure(title, base + 46, "".join(body), "; ".join(said))


def _short(label: str) -> str:
    return label if len(label) <= 22 else label[:21] + "…"
