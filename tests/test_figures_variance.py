"""The figures of the variance study: every word is inside the picture, and none lies on another."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, product
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from analysis.figures_variance import predicted_and_realised, rollouts_and_p_hat
from analysis.plotting import theme
from analysis.variance_allocators import NAMES, RULES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("mean only", "leave one out", "mean and std")


def allocations() -> Figure:
    rows = [("before RL", 8, name, p, n) for name in RULES for p, n in ((0.0, 4), (0.5, 10), (1.0, 4))]
    frame = pd.DataFrame(rows, columns=["checkpoint", "budget", "allocator", "p_hat", "n"])
    return rollouts_and_p_hat(frame, "before RL", 8)


def predictions() -> Figure:
    random = np.random.default_rng(0)
    rows = [
        (8, kind, name, 1 - 0.4 * random.random(), 1 - 0.4 * random.random()) for kind, name in product(KINDS, NAMES)
    ]
    return predicted_and_realised(
        pd.DataFrame(rows, columns=["budget", "advantage", "allocator", "predicted", "ratio"]), 8
    )


@pytest.mark.parametrize("draw", [allocations, predictions])
def test_words_stay_inside_and_apart(draw: Callable[[], Figure]) -> None:
    with theme():
        figure = draw()
        figure.set_dpi(rcParams["savefig.dpi"])  # as it is saved: sizes of letters are rounded
        FigureCanvasAgg(figure).draw()
        titles = [axis.get_title("left") for axis in figure.axes if axis.get_visible()]
        legend = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_text() in titles + legend]
        boxes = {text.get_text(): text.get_window_extent() for text in texts}
    assert len(boxes) >= len(KINDS)
    for words, box in boxes.items():
        assert figure.bbox.x0 <= box.x0, words
        assert box.x1 <= figure.bbox.x1, words
        assert box.y1 <= figure.bbox.y1, words
    for (one, first), (other, second) in combinations(boxes.items(), 2):
        assert not first.overlaps(second), f"{one} lies on {other}"
