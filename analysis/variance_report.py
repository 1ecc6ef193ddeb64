"""REPORT.md of the gradient-variance study, with its tables and figures, from the measured pools alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.figures import Drawn
from analysis.figures_variance import write_variance_figures
from analysis.formatting import counted, points
from analysis.provenance import made_by
from analysis.table_variance import coordinates_table, lookup, proxy_table, ratio_table, training_table
from analysis.tables import Table
from analysis.variance_allocators import LABELS, RULES
from analysis.variance_pool import Statistics
from analysis.variance_replay import allocation_rows, prompt_rows, proxy, replay
from analysis.variance_study import SETTINGS, Point, VarianceConfig, plan
from benchmark.errors import InputError
from benchmark.jsonl import atomic_write_text
from benchmark.layers import read_yaml, validate
from benchmark.seal import write_manifest

Row = Mapping[str, Any]

CLAIMED = 0.5
"""Reduction of the gradient's variance quoted for DynaMO ("up to 50 %"; second-hand, not verified in its paper)."""


@dataclass(frozen=True)
class Frames:
    """Rows of every checkpoint, with its label, arm and fraction: see `analysis.variance_replay`."""

    ratios: pd.DataFrame
    prompts: pd.DataFrame
    allocations: pd.DataFrame
    proxies: pd.DataFrame

    def at(self, budget: int, checkpoint: str) -> pd.DataFrame:
        """Ratios of the plain gradient at one budget and checkpoint."""
        mine = self.ratios[(self.ratios["coordinates"] == "gradient") & (self.ratios["budget"] == budget)]
        return mine[mine["checkpoint"] == checkpoint]


def write_variance_report(config: VarianceConfig, where: Sequence[Point], out: Path) -> Path:
    """Replay every allocator on the pools, write tables, figures, ``REPORT.md`` and ``manifest.json`` into `out`."""
    path = _write(config, where, out)
    write_manifest(out, made_by())
    return path


def rebuild_variance_report(folder: Path, out: Path | None = None) -> Path:
    """The report of a study's folder made again from its pools.

    Args:
        out: another folder for the report, which gets no manifest; `folder` then stays as it is.

    Raises:
        InputError: the folder does not say what was measured, or the pools are of another version or gone.
    """
    config = validate(VarianceConfig, read_yaml(folder / SETTINGS))
    where = plan(config, folder)
    for point in where:
        if not point.pools.exists():
            remedy = "Measure it again: `rolloutbench variance`"
            raise InputError("not measured, or measured by another version", file=point.pools, remedy=remedy)
    return write_variance_report(config, where, folder) if out is None else _write(config, where, out)


def _write(config: VarianceConfig, where: Sequence[Point], out: Path) -> Path:
    budget = _shown_budget(config, where[0].config.rollout.rollouts_per_prompt)
    frames = collect(where, config.budgets, budget)
    first = where[0].label
    tables = [
        ratio_table(frames.ratios, first),
        training_table(frames.ratios, budget),
        proxy_table(frames.proxies),
        coordinates_table(frames.ratios, first, budget),
    ]
    (out / "tables").mkdir(parents=True, exist_ok=True)
    for table in tables:
        table.write(out / "tables")
    drawn = write_variance_figures(frames.ratios, frames.prompts, frames.allocations, budget, out / "figures")
    path = out / "REPORT.md"
    atomic_write_text(path, _compose(config, where, frames, budget, tables, drawn))
    return path


def _shown_budget(config: VarianceConfig, trained: int) -> int:
    return trained if trained in config.budgets else sorted(config.budgets)[(len(config.budgets) - 1) // 2]


def collect(where: Sequence[Point], budgets: Sequence[int], budget: int) -> Frames:
    """Replay the pools of every checkpoint; prompts and proxies at `budget` rollouts per prompt."""
    ratios, prompts, allocations, proxies = [], [], [], []
    for point in where:
        statistics = Statistics.load(point.pools)
        head = {"checkpoint": point.label, "arm": point.config.arm, "fraction": point.fraction}
        own = prompt_rows(statistics, budget)
        ratios += [head | row for row in replay(statistics, budgets)]
        prompts += [head | row for row in own]
        allocations += [head | row for row in allocation_rows(statistics, budgets)]
        for (coordinates, advantage), part in pd.DataFrame(own).groupby(["coordinates", "advantage"], sort=False):
            found = proxy(part["p"].to_numpy(), part["variance"].to_numpy())
            proxies.append(head | {"coordinates": coordinates, "advantage": advantage} | found)
    return Frames(*map(pd.DataFrame, (ratios, prompts, allocations, proxies)))


def _compose(
    config: VarianceConfig,
    where: Sequence[Point],
    frames: Frames,
    budget: int,
    tables: Sequence[Table],
    drawn: Sequence[Drawn],
) -> str:
    shown = {figure.name: figure for figure in drawn}
    table = {each.name: each.section() for each in tables}

    def figure(name: str) -> str:
        return shown[name].section() if name in shown else ""

    sections = {
        "What is found": findings(frames, budget),
        "Allocators at equal draws": table["variance"] + figure("variance_ratio") + figure("variance_ratio_last"),
        "Prediction and measurement": figure("predicted_and_realised"),
        "Is p (1 - p) the variance of a prompt?": table["variance_proxy"] + figure("variance_and_p"),
        "What the rules do": figure("rollouts_and_p_hat"),
        "Along training": table["variance_training"] + figure("along_training"),
        "Preconditioned update and last layer": table["variance_coordinates"],
        "How it was measured": _method(config, where),
        "How to reproduce": _reproduce(config),
        "Measured on": _measured_on(where),
    }
    body = "".join(f"## {title}\n\n{text.strip()}\n\n" for title, text in sections.items() if text.strip())
    return f"# Gradient variance of rollout allocation\n\n{body.rstrip()}\n"


def findings(frames: Frames, budget: int) -> str:
    """The reading of the numbers, one item a question."""
    first = str(frames.ratios["checkpoint"].iloc[0])
    own = frames.at(budget, first)
    lines = [
        _within(own, first, budget),
        *(
            _limit_and_rules(str(kind), lookup(part, "allocator"))
            for kind, part in own.groupby("advantage", sort=False)
        ),
        _attained(frames, budget),
        _claim(frames),
        _proxy_line(frames, first),
        _prediction(frames, budget),
        _direction(own),
    ]
    return "".join(f"- {line}\n" for line in lines)


def _within(own: pd.DataFrame, checkpoint: str, budget: int) -> str:
    share = own.loc[own["allocator"] == "uniform", "within_share"]
    return (
        f"**What allocation can touch** ({checkpoint}, {budget} rollouts per prompt). The rollouts cause "
        f"{_range(share)} of the variance of the gradient over batches, by advantage; the choice of prompts causes "
        "the rest, which no allocation changes. All ratios below concern the first part."
    )


def _limit_and_rules(kind: str, own: Mapping[str, Row]) -> str:
    limit, loose = own["oracle_variance"], own["oracle_unbounded"]
    rules = [name for name in RULES if name != "uniform"]
    best = min(rules, key=lambda name: float(own[name]["ratio"]))
    gain, most = 1 - own[best]["ratio"], 1 - limit["ratio"]
    attained = f", {points(gain / most, digits=0)} % of the limit" if gain > 0 and most > 0 else ""
    worse = [LABELS[name] for name in rules if own[name]["low"] > 1]
    told = (
        f"Worse than uniform beyond their intervals: {'; '.join(worse)}." if worse else "No rule is worse than uniform."
    )
    clear = max(rules, key=lambda name: float(own[name]["signal_ratio"]))
    return (
        f"**Advantage {kind}.** The limit within the rules' bounds is {_reduction(limit)}, scored on rollouts that "
        f"did not choose it; those that did promise {points(1 - limit['predicted'])} %, and the truth lies between. "
        f"Without bounds: {_reduction(loose)}, with a cosine of {loose['cosine']:.2f} to the target. The best rule is "
        f"{LABELS[best]}: {_reduction(own[best])}{attained}. Released DynaMO: {_reduction(own['dynamo_released'])}; "
        f"its published formula: {_reduction(own['dynamo_readme'])}; Neyman: {_reduction(own['neyman'])}. {told} In "
        f"signal to noise the best rule ({LABELS[clear]}) stands at {_factor(own[clear])} of uniform, the oracle "
        f"within bounds at {_factor(limit)}."
    )


def _factor(row: Row) -> str:
    return f"{row['signal_ratio']:.3f} [{row['signal_ratio_low']:.3f}, {row['signal_ratio_high']:.3f}]"


def _attained(frames: Frames, budget: int) -> str:
    """Share of the oracle's reduction by rule; one of the rules, ours, was fitted to measurements like these."""
    mine = frames.ratios[(frames.ratios["coordinates"] == "gradient") & (frames.ratios["budget"] == budget)]
    gain = 1 - mine.pivot_table(index=["checkpoint", "advantage"], columns="allocator", values="ratio", sort=False)
    share = gain[[name for name in RULES if name != "uniform"]].sum() / gain["oracle_variance"].sum()
    told = "; ".join(f"{LABELS[str(name)]} {points(value, digits=0)} %" for name, value in share.items())
    own = mine[mine["allocator"] == "gradient"]
    part = gain["gradient"].groupby("advantage", sort=False).sum()
    most = gain["oracle_variance"].groupby("advantage", sort=False).sum()
    kinds = "; ".join(f"{kind} {points(part[kind] / most[kind], digits=0)} %" for kind in part.index)
    return (
        f"**Share of the limit** that a rule attains, reductions summed over checkpoints and advantages: {told}. "
        f"{LABELS['gradient'].capitalize()} by advantage: {kinds}; its lowest cosine to the target is "
        f"{own['cosine'].min():.3f}."
    )


def _claim(frames: Frames) -> str:
    mine = frames.ratios[frames.ratios["coordinates"] == "gradient"]
    of_rules, of_dynamo = mine[mine["allocator"].isin(RULES)], mine[mine["allocator"].str.startswith("dynamo")]
    oracle = mine[mine["allocator"].str.startswith("oracle")]
    best = {name: _lowest(part, "ratio") for name, part in (("r", of_rules), ("d", of_dynamo), ("o", oracle))}
    reached = [name for name, row in best.items() if 1 - row["ratio"] >= CLAIMED]
    verdict = {
        0: "Neither a rule nor an oracle reaches that here",
        1: "Only an oracle reaches that here" if reached == ["o"] else "That is reached here",
    }.get(len(reached), "That is reached here")
    dead = frames.prompts.drop_duplicates(["checkpoint", "prompt"]).groupby("checkpoint", sort=False)["p"]
    share = dead.apply(lambda p: float(((p == 0) | (p == 1)).mean()))
    bound = dead.apply(_bernoulli_limit)
    return (
        f"**The quoted {points(CLAIMED, digits=0)} %.** {verdict}: over all checkpoints, budgets and advantages the "
        f"largest reduction by a form of DynaMO is {_where(best['d'])}, by any rule {_where(best['r'])}, by an oracle "
        f"{_where(best['o'])}, whose expected gradient has a cosine of {best['o']['cosine']:.2f} to the target. If a "
        f"prompt's variance were p (1 - p), a perfect allocation without bounds would gain {_range(bound)} at these "
        f"checkpoints: large figures need many dead prompts, and {_range(share)} of the prompts have all of their "
        "pool right or all of it wrong."
    )


def _bernoulli_limit(p: pd.Series[float]) -> float:
    """1 - (sum s)^2 / (P sum s^2) for s = sqrt(p (1 - p))."""
    s = np.sqrt(p * (1 - p))
    return float(1 - s.sum() ** 2 / (len(s) * (s**2).sum()))


def _proxy_line(frames: Frames, checkpoint: str) -> str:
    mine = frames.proxies[(frames.proxies["checkpoint"] == checkpoint) & (frames.proxies["coordinates"] == "gradient")]
    told = "; ".join(
        f"{row['advantage']} R² {row['r_squared']:.2f} [{row['r_squared_low']:.2f}, {row['r_squared_high']:.2f}], "
        f"slope {row['slope']:.2f}"
        for row in mine.to_dict("records")
    )
    return (
        f"**The proxy.** Log p (1 - p) against the log of a prompt's measured variance, {checkpoint}: {told}. The law "
        "has slope 1; what it leaves unexplained is the size of the gradients (length and certainty of the answers)."
    )


def _prediction(frames: Frames, budget: int) -> str:
    mine = frames.ratios[(frames.ratios["coordinates"] == "gradient") & (frames.ratios["budget"] == budget)]
    told = []
    for name in ("neyman", "cures", "gvm", "gradient", "oracle_p"):
        part = mine[mine["allocator"] == name]
        told.append(f"{LABELS[name]} predicts {_range(1 - part['predicted'])} and gets {_range(1 - part['ratio'])}")
    return f"**Predicted against realised**, over checkpoints and advantages: {'; '.join(told)}."


def _direction(own: pd.DataFrame) -> str:
    rules = own[own["allocator"].isin(RULES) & (own["allocator"] != "uniform") & own["cosine"].notna()]
    if rules.empty:
        return "**Direction.** The mean gradient is not told from noise here."
    worst = _lowest(rules, "cosine")
    uniform = lookup(own, "allocator", "advantage")["uniform", worst["advantage"]]
    return (
        f"**Direction.** Of the rules' expected gradients with equal prompt weights the lowest cosine to the "
        f"target is {worst['cosine']:.3f} ({LABELS[worst['allocator']]}, {worst['advantage']}; uniform has "
        f"{uniform['cosine']:.3f})."
    )


def _lowest(frame: pd.DataFrame, key: str) -> Row:
    return min(lookup(frame.reset_index(), "index").values(), key=lambda row: float(row[key]))


def _reduction(row: Row) -> str:
    low, high = 1 - float(row["high"]), 1 - float(row["low"])
    return f"{points(1 - float(row['ratio']))} % [{points(low)}, {points(high)}]"


def _where(row: Row) -> str:
    place = f"{row['checkpoint']}, advantage {row['advantage']}, {row['budget']} rollouts per prompt"
    return f"{_reduction(row)} ({LABELS[row['allocator']]}; {place})"


def _range(values: pd.Series[float]) -> str:
    low, high = points(float(values.min()), digits=0), points(float(values.max()), digits=0)
    return f"{low} %" if low == high else f"{low} to {high} %"


def _method(config: VarianceConfig, where: Sequence[Point]) -> str:
    run = where[0].config
    return (
        f"{counted(len(where), 'checkpoint')} of {', '.join(config.arms)} (seed {config.seed}, scale "
        f"`{config.scale}`) on {run.rollout.prompts_per_batch} fixed training prompts; {config.rollouts} rollouts of "
        f"each form its pool, {config.history} others the history that rules read. Per-rollout gradients of all "
        "weights are exact. From a pool the variance of a prompt's estimate follows for every group size and "
        "advantage without drawing partitions (a complete U-statistic over its disjoint groups). Intervals of ratios "
        "leave blocks of rollouts out (jackknife) and hold for these prompts; those of shares, cosines and signal to "
        "noise leave prompts out. All rules have the same bounds, half and one and a half times the mean. Oracles "
        "choose on one half of a pool and are scored on the other. The estimate is the first update of a batch, "
        "before ratios leave 1, with equal prompt weights. History here is fresh; along a run it is older and "
        "larger. `docs/variance.md` has the derivations."
    )


def _reproduce(config: VarianceConfig) -> str:
    defaults = type(config)()
    changed = {key: value for key, value in config.model_dump().items() if value != getattr(defaults, key)}
    command = f"nox -s variance -- --scale {config.scale}"
    names = {"task": "--task", "seed": "--seed", "rollouts": "--rollouts", "blocks": "--blocks"}
    lists = {"arms": "--arm", "fractions": "--fraction", "budgets": "--budget", "options": "--set"}
    command += "".join(f" {flag} {changed[key]}" for key, flag in names.items() if key in changed)
    command += "".join(f" {flag} {value}" for key, flag in lists.items() if key in changed for value in changed[key])
    return f"```\n{command}\n```\n\nOnly missing checkpoints and pools are made; the report is always made anew."


def _measured_on(where: Sequence[Point]) -> str:
    notes = [json.loads(point.pools.with_suffix(".json").read_text(encoding="utf-8")) for point in where]
    cpu = [float(note["cpu_seconds"]) for note in notes]
    wall = [float(note["wall_seconds"]) for note in notes]
    return (
        f"Device: {', '.join(sorted({str(note['device']) for note in notes}))}. A checkpoint took "
        f"{min(cpu):.0f} to {max(cpu):.0f} CPU-seconds of one core ({min(wall):.0f} to {max(wall):.0f} seconds of wall "
        "time); training and replay are not in this."
    )
