"""The colours of the pages, which are CSS variables in a light and a dark version; the plots use them, too.

c0..c4 ink, muted, grid, full W and truncated W; q0..q7 categories; r0..r15 ranks, low to high; t0..t15
rounds, early to late.
"""

from __future__ import annotations

RAMPS = {
    "light": {
        "r": ("#2fa79c", "#2a7fbd", "#4350b0", "#4a1c74"),
        "t": ("#bd9136", "#dd8636", "#b3432a", "#641a22"),
        "c": ("#1b2430", "#5a6676", "#dfe3e8", "#1f62d0", "#c9650a"),
    },
    "dark": {
        "r": ("#2b8f88", "#3f9fe0", "#93a0ff", "#e2bdff"),
        "t": ("#92703f", "#b8681f", "#f0984c", "#ffe2b0"),
        "c": ("#e8ecf1", "#9ca8b6", "#2e3743", "#6ba6ff", "#ffa552"),
    },
}
CATEGORIES = (
    "#4a86d8",
    "#e0a13f",
    "#4f9d7c",
    "#c8604d",
    "#9274b5",
    "#8b7468",
    "#b7a04c",
    "#8a96a5",
)
STEPS = 16  # colours in each ramp


def step(index: int, count: int) -> int:
    """The position of item `index` of `count` on a ramp of STEPS colours, ends included."""
    return STEPS - 1 if count <= 1 else round(index * (STEPS - 1) / (count - 1))


def mix(anchors: tuple[str, ...], position: float) -> str:
    """The colour at `position` in [0, 1] of a ramp through `anchors`, straight in RGB."""
    place = position * (len(anchors) - 1)
    i = min(int(place), len(anchors) - 2)
    pairs = (
        (int(anchors[i][k : k + 2], 16), int(anchors[i + 1][k : k + 2], 16)) for k in (1, 3, 5)
    )
    return "#" + "".join(f"{round(a + (b - a) * (place - i)):02x}" for a, b in pairs)


def variables(scheme: str) -> dict[str, str]:
    """{name of the CSS variable: its colour}, in the "light" or the "dark" scheme."""
    ramps = RAMPS[scheme]
    found = {f"c{i}": value for i, value in enumerate(ramps["c"])}
    found |= {f"q{i}": value for i, value in enumerate(CATEGORIES)}
    for family in ("r", "t"):
        found |= {f"{family}{i}": mix(ramps[family], i / (STEPS - 1)) for i in range(STEPS)}
    return found
