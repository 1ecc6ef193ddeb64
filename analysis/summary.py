"""The result of a study in a paragraph, and how its numbers were made."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.comparisons import AVERAGE, Difference, Scores
from analysis.formatting import interval, metric_name, points
from analysis.statistics import RESAMPLES, holm
from analysis.table_scores import detectable_sentence, is_clear

METHOD = f"""\
- pass@k is the unbiased estimate 1 - C(n-c, k) / C(n, k) of the final evaluation, the last point of a run; no
  checkpoint is picked. Averages give every family the same weight.
- Arms are paired: seed s has the same starting policy, prompt order and random streams in every arm, and all are
  evaluated on the same problems.
- Intervals are 95 % percentile intervals of a two-level bootstrap, {RESAMPLES:,} resamples of seeds and, within
  families, of problems, each independent of the other since every seed sees every problem. The seed part is widened
  as a t interval is (the plain bootstrap of five seeds covers 84 %, not 95 %), and the problem part holds only
  differences between problems that the seeds agree on, so that noise is not counted twice. **The interval is what
  decides**: it says what other seeds and other problems of the same families would give.
- p-values come from {RESAMPLES:,} random swaps of the two arms' labels in (seed, problem) cells. The statistic is the
  mean difference divided by its standard error over seeds and problems. The null hypothesis is that labels mean
  nothing in any cell. Without that division a lucky training run would count as an effect; with it the test also
  keeps its level, approximately, where two methods are equal on average and their runs differ by luck. Flipping
  whole seeds (`p_seeds` in the CSV files) needs no approximation, but with S seeds cannot fall below 2 / 2^S.
- Holm's correction is over the cells of the table in which a p-value stands. The detectable effect is that of a
  two-sided t-test over seeds with the standard error found here.
"""
"""For REPORT.md, in Markdown."""


def headline(scores: Scores, differences: Sequence[Difference]) -> str:
    """Who is ahead, who is tied with it, which arms differ from the reference, and what was detectable.

    Args:
        differences: to the reference; only averages of the primary metric are read.
    """
    study = scores.study
    best, tied = scores.best_and_tied(study.metric, AVERAGE)
    mean = float(scores.estimate(scores.final(best, study.metric)).mean)
    ties = [arm for arm in study.arms if arm in tied]
    others = listed(ties) or "no other arm"
    sentences = [f"Highest {metric_name(study.metric)}: {best} with {points(mean)} %, tied with {others}."]
    shown = [d for d in differences if (d.family, d.metric) == (AVERAGE, study.metric)]
    if not shown:
        return sentences[0]
    return " ".join([*sentences, standing(study.reference, shown), detectable_sentence(shown)])


def standing(reference: str, differences: Sequence[Difference]) -> str:
    """Which arms are clearly above and below the reference, Holm over the differences given."""
    adjusted = holm([d.p for d in differences])
    clear = [d for d, q in zip(differences, adjusted, strict=True) if is_clear(d, float(q))]
    sentences = []
    for words, sign in (("above", 1), ("below", -1)):
        found = sorted((d for d in clear if d.mean * sign > 0), key=lambda d: -abs(d.mean))
        names = [f"{d.arm} ({points(d.mean, sign=True)} {interval(d.low, d.high)})" for d in found]
        sentences.append(f"Clearly {words} {reference}, after Holm's correction: {listed(names) or 'no arm'}.")
    return " ".join(sentences)


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: a, b and c."""
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)
