"""Captions: what each figure shows, and for a paper, where no report stands around it, how each mark is to be read."""

from __future__ import annotations

from analysis.comparisons import Scores
from analysis.formatting import currency_name, metric_name
from analysis.plotting import CROWDED

READING = {
    "final_accuracy": "Markers are means over seeds; intervals resample training seeds and problems, so they hold the "
    "choice of problems that all arms share: compare arms by their paired differences. The number is the mean.",
    "differences": "Paired by seed and problem: luck that both arms share cancels. Not adjusted for the many arms.",
    "probability_of_improvement": "A tie counts one half. Not paired over problems.",
    "learning_curves": "The line is the mean over seeds of pass@1 over the task families, "
    "interpolated between evaluated points. Bands resample seeds only, not problems.",
    "pareto": "The bars hold the luck of the seeds only, not that of the problems, which all arms share. Arms on the "
    "front, which none beats in both, are named; markers differ in form and filling.",
    "pass_at_k": "Estimated without bias from all samples of the final evaluation, mean over task families.",
    "performance_profiles": "A curve that lies above another at every value is better at every level of difficulty.",
    "entropy_and_gradient_norm": "The entropy is the mean over sampled tokens, the norm that of the gradient before "
    "clipping; logarithmic where arms differ by more than a factor of ten.",
    "rollouts_per_prompt": "The darkest colour holds larger shares as well (the end of the bar). Arms that read a "
    "history give every prompt the same until it has come back; the last step is cut to the budget. Where one arm "
    "goes far beyond the others, the scale is one of doublings and its lowest row is 0.",
    "spend_by_phase": "The number is the sum, with the evaluation.",
    "gradient_variance": "Markers are ratios, lines their 95 % intervals; the line at 1 is uniform allocation.",
    "difficulty": "Final pass@1 by success before training: on top the level of the reference, below it the paired "
    "difference of each arm to it in points. Bold: the 95 % interval over seeds and problems of the bin excludes 0, "
    "not adjusted for their number. Colours reach at least 10 points; stronger differences have the colour of the end.",
    "step_histograms": "How entropy, the largest ratio and the KL estimate of a step are spread over the steps of all "
    "runs of an arm. {cells}",
    "token_entropy": "Entropy of the policy at traced tokens, at the first and the last update, all runs of an arm "
    "together; tokens below 0.001 nats count in the first cell. {cells}",
    "token_ratio": "Ratio pi / pi_old of traced tokens as their first update in the step met them, at the first and "
    "the last update, all runs of an arm together; those of a step's first minibatch have ratio 1, a cell's middle. "
    "{cells}",
}
"""For a paper: what bars, bands, ticks and colours are, by figure."""
CELLS = (
    "A row is an arm, darker is a larger share; the darkest grey holds larger shares as well. The orange tick is the "
    "median. The cells at both ends collect what lies beyond the axis, which goes from the 2 % to the 98 % quantile of "
    "all arms, further where the middle half of an arm lies further."
)
SWEEP = {
    "best_so_far": "Best objective after so many trials, a line an arm; points are single trials. The best of many "
    "noisy trials is too high: what may be reported is the best setting's result on fresh seeds.",
    "slices": "Objective of every trial over each of its parameters, an arm by colour and marker. Other parameters "
    "vary with it: a trend is no proof.",
}
"""Figures of a sweep's trials."""


def paper_captions(scores: Scores) -> dict[str, str]:
    """Captions for a paper, by figure: what it shows and how it is read."""
    shown = study_captions(scores)
    return {name: f"{shown.get(name, '')} {text.format(cells=CELLS)}".strip() for name, text in READING.items()}


def study_captions(scores: Scores) -> dict[str, str]:
    """What each figure of a report shows, by name: one sentence."""
    study = scores.study
    metric, cost, reference = metric_name(study.metric), currency_name(study.currency), study.reference
    counts = [len(scores.seeds(arm)) for arm in study.arms]
    over = "over seeds and problems" if max(counts) > 1 else "over problems only, since there is one seed"
    if min(counts) == 1 < max(counts):
        over += " (of an arm with one seed over problems only)"
    spread = "bands are 95 % intervals over seeds" if max(counts) > 2 else "thin lines are single runs"
    if max(counts) == 1:
        spread = "one run an arm"
    own_scale = "numbers in an arm's colour: that panel has a scale of its own"
    return {
        "final_accuracy": f"Final {metric} by arm, mean over task families; 95 % interval {over}; the dashed "
        f"line is {reference}.",
        "differences": f"Paired difference of final {metric} to {reference}, in percentage points; 95 % "
        f"interval {over}; an interval across zero is no finding.",
        "probability_of_improvement": f"Probability that a run of an arm has a higher final {metric} than a run of "
        f"{reference} on a family drawn at random; 95 % interval over seeds; the line at one half is no difference.",
        "learning_curves": f"pass@1 over training spend in {cost}; {spread}; {reference} in grey behind each arm.",
        "pareto": f"Final {metric} over what a run cost in currencies other than the budget's; bars are 95 % intervals "
        "over seeds, the line is the Pareto front.",
        "pass_at_k": f"Final pass@k over the number of tries k, and its difference to {reference}."
        if len(study.arms) <= CROWDED
        else f"Difference of final pass@k to {reference} over the number of tries k; {spread}; {own_scale}.",
        "performance_profiles": "Share of runs and problems whose final pass@1 is at least as high as the value below, "
        f"families weighted equally, and its difference to {reference}."
        if len(study.arms) <= CROWDED
        else "Share of runs and problems whose final pass@1 is at least as high as the value below, families weighted "
        f"equally, minus that of {reference}; {spread}; {own_scale}.",
        "entropy_and_gradient_norm": f"Policy entropy and gradient norm over training spend in {cost}, mean "
        "over seeds, averaged over neighbouring steps"
        + ("." if len(study.arms) <= CROWDED else f"; {reference} in grey behind each arm."),
        "rollouts_per_prompt": "Share of a step's prompts by the number of rollouts they got, over training, "
        "for the arms that allocate; the dashed line is the mean.",
        "spend_by_phase": "Device seconds of a run by phase, mean over seeds; evaluation is not part of the budget.",
        "gradient_variance": "Measured variance of the gradient (trace of its covariance) on one checkpoint "
        "at equal draws, relative to uniform allocation; lower is better.",
    }
