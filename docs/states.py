"""State diagrams as pictures: states at given places, an arrow for each pair of states that a table connects."""

from collections.abc import Iterable, Mapping
from math import hypot
from typing import Final

Place = tuple[float, float]
PLACES: Final[Mapping[str, Mapping[str, Place]]] = {
    "agent-states": {
        "offline": (0, 0),
        "online": (1, 0),
        "busy": (2, 0),
        "stalled": (3, 0),
        "draining": (0.35, 1.5),
        "quarantined": (2.65, 1.5),
        "retired": (1.5, 2.7),
    },
    "breaker-states": {"closed": (0, 0), "open": (2, 0), "half_open": (1, 1)},
    "task-states": {
        "scheduled": (0, 0),
        "queued": (1, 0),
        "assigned": (2, 0),
        "running": (3, 0),
        "blocked": (-0.25, 0.8),
        "input_required": (-0.25, 1.6),
        "expired": (0.9, 2.4),
        "cancelled": (1.75, 2.4),
        "failed": (2.6, 2.4),
        "completed": (3.45, 2.4),
        "rejected": (-0.25, 2.4),
    },
    "group-states": {
        "open": (0, 0),
        "sealed": (1.5, 0),
        "cancelling": (3, 0),
        "completed": (0.5, 1.8),
        "failed": (1.75, 1.8),
        "cancelled": (3, 1.8),
    },
    "approval-states": {"pending": (1, 0), "answered": (0, 1.2), "expired": (1, 1.2), "withdrawn": (2, 1.2)},
    "compensation-states": {"pending": (0, 0), "running": (1.5, 0), "failed": (0, 1.2), "completed": (1.5, 1.2)},
    "operation-states": {"running": (0.75, 0), "completed": (0, 1.2), "cancelled": (1.5, 1.2)},
    "schedule-states": {"active": (0, 0), "paused": (1.5, 0), "finished": (0.75, 1.2)},
    "run-states": {
        "pending": (0, 0),
        "running": (1.5, 0),
        "paused": (3, 0),
        "input_required": (4.5, 0),
        "completed": (0, 1.8),
        "failed": (1.5, 1.8),
        "cancelled": (3, 1.8),
    },
    "stage-states": {
        "pending": (0, 0),
        "ready": (1.5, 0),
        "running": (3, 0),
        "input_required": (4.5, 0),
        "skipped": (0, 1.8),
        "cancelled": (1, 1.8),
        "failed": (2, 1.8),
        "completed": (3, 1.8),
    },
}
"""Where each state stands, in steps to the right and down."""

STEP_X, STEP_Y, WIDTH, HEIGHT = 190.0, 115.0, 126.0, 38.0
STYLE: Final = """
  .paper { fill: #ffffff; stroke: #c9d1d9 } .state { fill: #e3effc; stroke: #1f6feb } .final { fill: #e6f4ea; stroke: #1a7f37 }
  .line { fill: none; stroke: #57606a; stroke-width: 1.3; marker-end: url(#tip) } .tip { fill: #57606a } text { fill: #1f2328 }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #161b22; stroke: #444c56 } .state { fill: #14304f; stroke: #539bf5 } .final { fill: #15331f; stroke: #57ab5a }
    .line { stroke: #8b949e } .tip { fill: #8b949e } text { fill: #e6edf3 }
  }
"""


def picture(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Return a diagram as SVG. `pairs` are from and to; a state that nothing leaves is drawn as final."""
    moves = sorted(set(pairs))
    places = PLACES[name]
    left = min(x for x, _ in places.values())
    centre = {state: (90 + (x - left) * STEP_X, 110 + y * STEP_Y) for state, (x, y) in places.items()}
    width = max(x for x, _ in centre.values()) + 90
    height = max(y for _, y in centre.values()) + 50
    going = {source for source, _ in moves}
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img"'
        ' font-family="system-ui, sans-serif" font-size="14">',
        f"<title>{name.replace('-', ' ')}</title>",
        f"<style>{STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="tip" d="M0 0 10 5 0 10z"/></marker></defs>',
        f'<rect class="paper" x="1" y="1" width="{width - 2:g}" height="{height - 2:g}" rx="12"/>',
    ]
    lines += [_arrow(source, target, centre[source], centre[target]) for source, target in moves]
    for state, (x, y) in centre.items():
        kind = "state" if state in going else "final"
        box = f'x="{x - WIDTH / 2:g}" y="{y - HEIGHT / 2:g}" width="{WIDTH:g}" height="{HEIGHT:g}"'
        lines.append(
            f'<rect class="{kind}" {box} rx="8"/><text x="{x:g}" y="{y + 5:g}" text-anchor="middle">{state}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


def _arrow(source: str, target: str, start: Place, end: Place) -> str:
    """A curve that keeps to the left of its direction, so that the way back is another one."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    distance = hypot(dx, dy)
    beside = dy == 0
    bow = 0.04 * distance if not beside else 0.0 if abs(dx) <= STEP_X * 1.6 else 0.26 * distance
    if beside and not bow:
        bow = 14.0
    middle = ((start[0] + end[0]) / 2 + bow * dy / distance, (start[1] + end[1]) / 2 - bow * dx / distance)
    if beside and dx < 0 and abs(dx) > STEP_X * 1.6:
        middle = (middle[0], start[1] - bow)
    first, last = _border(start, middle), _border(end, middle)
    points = f"M{first[0]:.0f} {first[1]:.0f} Q{middle[0]:.0f} {middle[1]:.0f} {last[0]:.0f} {last[1]:.0f}"
    return f'<path class="line" data-from="{source}" data-to="{target}" d="{points}"/>'


def _border(centre: Place, towards: Place) -> Place:
    """Where the way from a state's centre leaves its box."""
    dx, dy = towards[0] - centre[0], towards[1] - centre[1]
    across = min(
        (WIDTH / 2 + 1) / abs(dx) if dx else float("inf"),
        (HEIGHT / 2 + 1) / abs(dy) if dy else float("inf"),
    )
    return centre[0] + dx * across, centre[1] + dy * across
