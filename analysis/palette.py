"""One look per arm in every figure: a colour, a marker and a line style.

No two arms share a colour, and no two share a pair of marker and line style, so that arms stay apart in grey
print and for readers who see few colours. The colours are those of Okabe and Ito and of Paul Tol's muted
scheme, darkened where they would be faint on white. Where markers stand alone, `FILLS` stands for the line style.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Dash = tuple[float, tuple[float, ...]]

SOLID: Dash = (0, ())
DASHED: Dash = (0, (4, 1.5))
DOTTED: Dash = (0, (1, 1.2))
DASH_DOT: Dash = (0, (4, 1.2, 1, 1.2))


@dataclass(frozen=True)
class Style:
    """How an arm is drawn: hex colour, matplotlib marker, dash pattern (offset, on-off lengths)."""

    colour: str
    marker: str
    dash: Dash


FILLS: dict[Dash, Literal["full", "none", "left", "top"]] = {
    SOLID: "full",
    DASHED: "none",
    DOTTED: "left",
    DASH_DOT: "top",
}
"""How the marker of an arm is filled where there is no line to carry its dash: pairs of both stay unique."""

ARMS = {
    "grpo": Style("#595959", "o", SOLID),
    "dr_grpo": Style("#332288", "^", SOLID),
    "rloo": Style("#2A9D8F", "v", SOLID),
    "dapo": Style("#0072B2", "s", SOLID),
    "clip_higher": Style("#3B93C6", "s", DASHED),
    "entropy_loss": Style("#117733", "P", SOLID),
    "fork_tokens": Style("#8A8A1F", "X", SOLID),
    "entropy_advantage": Style("#00A87A", "P", DASHED),
    "clip_cov": Style("#882255", "<", SOLID),
    "kl_cov": Style("#AA4499", ">", SOLID),
    "w_reinforce": Style("#7F4F24", "v", DASHED),
    "dynamo": Style("#D55E00", "D", SOLID),
    "dynamo_allocation": Style("#CC8400", "D", DASHED),
    "dynamo_modulation": Style("#CC6677", "D", DOTTED),
    "dynamo_compensation": Style("#C9609B", "D", DASH_DOT),
    "dynamo_stabilisation": Style("#A08433", "o", DASH_DOT),
    "dynamo_readme": Style("#E0523D", "d", SOLID),
    "dynamo_gradient": Style("#7A6FF0", "8", SOLID),
    "dynamo_released": Style("#9E2A2B", "d", DASHED),
}
"""The arms of the shipped studies. An arm that is not here takes one of SPARE."""

_SPARE_COLOURS = (
    "#5E4FA2", "#1F78B4", "#33802C", "#B15928", "#6A3D9A", "#C51B7D", "#01796F", "#A6761D",
    "#666699", "#B2182B", "#3F8FA0", "#8C6BB1", "#4D7A21", "#A0522D", "#45628F", "#993366",
    "#708238", "#CD5C5C", "#2F4F6F", "#9A6FB0", "#6B5B3E", "#3B7D5A", "#B0537A", "#54708C",
    "#7D4B7F", "#A3732D", "#3C6E47", "#8F5E99", "#AD5D4E", "#4F6D9C",
)  # fmt: skip
_SPARE_MARKERS = ("h", "p", "*", "8", "H", "o", "^", "<")
_SPARE_DASHES = (DASHED, DOTTED, DASH_DOT, SOLID)
_USED = {(style.marker, style.dash) for style in ARMS.values()}
_FREE = [(m, d) for m in _SPARE_MARKERS for d in _SPARE_DASHES if (m, d) not in _USED]
SPARE = tuple(Style(colour, *look) for colour, look in zip(_SPARE_COLOURS, _FREE, strict=False))


def styles(arms: Sequence[str]) -> dict[str, Style]:
    """The look of each arm of a study; give all arms of its plan, so that a missing cell changes no colour.

    An arm of `ARMS` looks the same everywhere. The others take the looks of `SPARE` in their order here.
    """
    unknown = [arm for arm in dict.fromkeys(arms) if arm not in ARMS]
    spare = {arm: SPARE[place % len(SPARE)] for place, arm in enumerate(unknown)}
    return {arm: ARMS.get(arm) or spare[arm] for arm in arms}


PHASES = {
    "decode": "#33608F",
    "verify": "#8CC3E0",
    "forward": "#5E7F22",
    "backward": "#D9C65B",
    "optimiser": "#A9443A",
    "other": "#B0B0B0",
    "evaluate": "#E2E2E2",
}
"""Colours of the phases of a step, dark and light in turn for grey print; an unknown phase is drawn like `other`."""
