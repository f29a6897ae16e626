"""Plots as SVG text: no script, no font, no reference to anything outside. Colours come from the page's CSS variables.

Every plot has a role, a title and a description for screen readers, and every bar a tooltip. All text is escaped here.
"""

from collections.abc import Sequence
from html import escape

_WIDTH = 640
_LABEL = 170
_ROW = 26


def number(value: float) -> str:
    """Short decimal form: 1,234 · 0.873 · 12.5; the same on every machine."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.1f}"


def _figure(title: str, height: int, body: str, described: str) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg role="img" viewBox="0 0 {_WIDTH} {height}" '
        f'aria-label="{escape(title)}: {escape(described)}">{body}</svg></figure>'
    )


def columns(title: str, labels: Sequence[str], values: Sequence[int]) -> str:
    """A histogram: one column per bin, its count above it."""
    top, base, height = 24, 170, 200
    most = max(values, default=0) or 1
    step = _WIDTH / max(len(values), 1)
    body = [f'<line class="axis" x1="0" y1="{base}" x2="{_WIDTH}" y2="{base}"/>']
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
    title: str, rows: Sequence[tuple[str, float | None]], *, most: float | None = None, mark: float | None = None
) -> str:
    """Horizontal bars with their values; `most` is the value of a full bar, `mark` draws a threshold."""
    full = most or max((value or 0.0 for _, value in rows), default=0.0) or 1.0
    space = _WIDTH - _LABEL - 80
    height = _ROW * max(len(rows), 1) + 6
    body: list[str] = []
    for place, (label, value) in enumerate(rows):
        y = place * _ROW + 4
        shown = "not assessed" if value is None else number(value)
        size = space * min(max((value or 0.0) / full, 0.0), 1.0)
        body.append(
            f'<text class="label" x="{_LABEL - 8}" y="{y + 14}" text-anchor="end">{escape(_short(label))}</text>'
            f'<rect class="bar" x="{_LABEL}" y="{y}" width="{size:.1f}" height="18">'
            f"<title>{escape(label)}: {shown}</title></rect>"
            f'<text class="value" x="{_LABEL + size + 6:.1f}" y="{y + 14}">{shown}</text>'
        )
    if mark is not None:
        x = _LABEL + space * mark / full
        body.append(
            f'<line class="mark" x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{height}"><title>{number(mark)}</title></line>'
        )
    described = ", ".join(f"{label}: {'not assessed' if value is None else number(value)}" for label, value in rows)
    return _figure(title, height, "".join(body), described)


def intervals(title: str, rows: Sequence[tuple[str, float | None, float | None, float | None]]) -> str:
    """One line per row on the scale 0..1: (label, low, value, high); a dot for the value on its interval."""
    space = _WIDTH - _LABEL - 80
    height = _ROW * max(len(rows), 1) + 24
    body = [
        f'<text class="tick" x="{_LABEL + space * tick / 4:.1f}" y="{height - 4}" text-anchor="middle">{tick / 4:.2f}</text>'
        for tick in range(5)
    ]
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
        left, dot, right = (_LABEL + space * min(max(point, 0.0), 1.0) for point in (low, value, high))
        told = f"{label}: {number(value)} ({number(low)} to {number(high)})"
        said.append(told)
        body.append(
            f'<line class="range" x1="{left:.1f}" y1="{y}" x2="{right:.1f}" y2="{y}"/>'
            f'<circle class="dot" cx="{dot:.1f}" cy="{y}" r="5"><title>{escape(told)}</title></circle>'
            f'<text class="value" x="{_LABEL + space + 8}" y="{y + 4}">{number(value)}</text>'
        )
    return _figure(title, height, "".join(body), "; ".join(said))


def _short(label: str) -> str:
    return label if len(label) <= 26 else label[:25] + "…"
