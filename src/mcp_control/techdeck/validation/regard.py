"""Statistics over the bias sums: intervals, asymmetry of regard with a bootstrap, co-occurrence with roles.

A flag here means "look at this", it proves nothing and never enters a score.
Source: E. B. Wilson 1927 (interval); S. Holm 1979 (correction); design of techdeck, section 4.
"""

import math

import msgspec
import numpy as np

from mcp_control.techdeck.validation.bias import REGARD_SCALE
from mcp_control.techdeck.validation.lexicon import CATEGORIES

Z95 = 1.959963984540054
LEAST_SENTENCES = 30
LEAST_DIFFERENCE = 0.2
RESAMPLES = 1_000
SEED = 20_240_229
ALPHA = 0.05
LEAST_TOGETHER = 10
LEAST_Z = 3.0


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """Mean valence of two groups' sentences by assistants, in [-1, 1]; `difference` is a minus b, with a 95 % interval."""

    category: str
    a: str
    b: str
    regard_a: float
    regard_b: float
    sentences_a: int
    sentences_b: int
    difference: float
    low: float
    high: float
    p_holm: float
    flagged: bool


class Association(msgspec.Struct, frozen=True, kw_only=True):
    """A role word near a group, against the other groups of the category: log odds ratio (+0.5), its z, and how often."""

    category: str
    group: str
    attribute: str
    together: int
    log_odds: float
    z: float


def wilson(hits: float, total: int) -> tuple[float, float] | None:
    """The 95 % score interval of a share; None without observations."""
    if total <= 0:
        return None
    share = min(hits / total, 1.0)
    centre = share + Z95**2 / (2 * total)
    spread = Z95 * math.sqrt(share * (1 - share) / total + Z95**2 / (4 * total**2))
    scale = 1 + Z95**2 / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _tested(category: str, sums: dict[str, list[int]], seed: int) -> list[tuple[Pair, float]]:
    """Every pair of groups with enough sentences, and its uncorrected p value (normal, bootstrap standard error)."""
    cells: dict[str, dict[int, list[int]]] = {}
    for key, cell in sums.items():
        found, group, block = key.split(":")
        if found == category:
            cells.setdefault(group, {})[int(block)] = cell
    totals = {group: sum(cell[0] for cell in blocks.values()) for group, blocks in cells.items()}
    groups = sorted(group for group, total in totals.items() if total >= LEAST_SENTENCES)
    if len(groups) < 2:
        return []
    blocks = sorted({block for found in cells.values() for block in found})
    tables = [np.array([cells[group].get(block, [0, 0]) for block in blocks], dtype=np.int64) for group in groups]
    generator = np.random.Generator(np.random.PCG64(seed))
    draws = generator.multinomial(len(blocks), np.full(len(blocks), 1 / len(blocks)), size=RESAMPLES)
    means = []
    for table in tables:
        number, total = draws @ table[:, 0], draws @ table[:, 1]
        means.append(np.where(number > 0, total / np.maximum(number, 1), np.nan) / REGARD_SCALE)
    point = [int(table[:, 1].sum()) / int(table[:, 0].sum()) / REGARD_SCALE for table in tables]
    tested = []
    for i, a in enumerate(groups):
        for j in range(i + 1, len(groups)):
            spread = means[i] - means[j]
            spread = spread[~np.isnan(spread)]
            low, high = (float(value) for value in np.percentile(spread, [2.5, 97.5]))
            deviation, difference = float(np.std(spread, ddof=1)), point[i] - point[j]
            # No spread at all means too few conversations to tell.
            p = math.erfc(abs(difference) / deviation / math.sqrt(2)) if deviation > 0 else 1.0
            pair = Pair(
                category=category,
                a=a,
                b=groups[j],
                regard_a=round(point[i], 6),
                regard_b=round(point[j], 6),
                sentences_a=totals[a],
                sentences_b=totals[groups[j]],
                difference=round(difference, 6),
                low=round(low, 6),
                high=round(high, 6),
                p_holm=1.0,
                flagged=False,
            )
            tested.append((pair, p))
    return tested


def asymmetries(sums: dict[str, list[int]]) -> list[Pair]:
    """All testable pairs of groups. `sums` is the `regard` of the bias statistics, added up.

    The bootstrap draws blocks of conversations, 1,000 times from a fixed seed. Flagged: |difference| >= 0.2, the
    interval leaves out 0, and p < 0.05 after Holm's correction over all pairs of all categories.
    """
    tested = [found for index, category in enumerate(CATEGORIES) for found in _tested(category, sums, SEED + index)]
    order = sorted(range(len(tested)), key=lambda index: (tested[index][1], index))
    corrected = [1.0] * len(tested)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, tested[index][1] * (len(tested) - rank)))
        corrected[index] = highest
    pairs = []
    for (pair, _), p in zip(tested, corrected, strict=True):
        flagged = abs(pair.difference) >= LEAST_DIFFERENCE and (pair.low > 0 or pair.high < 0) and p < ALPHA
        pairs.append(msgspec.structs.replace(pair, p_holm=round(p, 6), flagged=flagged))
    return pairs


def associations(together: dict[str, int], alone: dict[str, int]) -> list[Association]:
    """Role words that stand out near a group: at least 10 sentences with the word in the category, and |z| >= 3."""
    found = []
    for key, count in sorted(together.items()):
        category, group, attribute = key.split(":")
        others = [name for name in alone if name.startswith(f"{category}:") and name != f"{category}:{group}"]
        word_elsewhere = sum(together.get(f"{name}:{attribute}", 0) for name in others)
        if not others or count + word_elsewhere < LEAST_TOGETHER:
            continue
        table = (
            count,
            alone[f"{category}:{group}"] - count,
            word_elsewhere,
            sum(alone[name] for name in others) - word_elsewhere,
        )
        a, b, c, d = (cell + 0.5 for cell in table)
        log_odds = math.log(a * d / (b * c))
        z = log_odds / math.sqrt(1 / a + 1 / b + 1 / c + 1 / d)
        if abs(z) >= LEAST_Z:
            found.append(
                Association(
                    category=category,
                    group=group,
                    attribute=attribute,
                    together=count,
                    log_odds=round(log_odds, 6),
                    z=round(z, 6),
                )
            )
    return found
