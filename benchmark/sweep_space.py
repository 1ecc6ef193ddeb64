"""From a sweep file and a point of its space to the configuration of a run, and the checks before any run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
import yaml

from benchmark.compose import SHARED, compose_arm
from benchmark.config import RunConfig, digest
from benchmark.errors import InputError
from benchmark.layers import Layer, read_yaml, validate
from benchmark.registry import build
from benchmark.sweep_config import SweepConfig

JOINT_DRAWS = 16
Point = Mapping[str, Any]
"""A value of Optuna's for every dotted path that is searched."""


@dataclass(frozen=True)
class Sweep:
    """A sweep and the layer it was read from, which knows file and line of everything."""

    config: SweepConfig
    written: Layer

    def run(self, label: str, name: str, point: Point | None, seed: int, *, final: bool = False) -> RunConfig:
        """The run of one setting with one seed.

        Args:
            label: the arm. name: what the run calls itself.
            point: the setting; None for the arm's default.
            final: with the finalists' budget and evaluation instead of the trials'.

        Raises:
            InputError: the schema or the method refuses a value.
        """
        config, arm = self.config, self.config.arm(label)
        place = config.arms.index(arm)
        shared, own = self._tuned(label, point or {})
        method = self.written.moved(f"arms.{place}", "method", {"name": arm.name, "params": arm.params})
        method = own.renamed("method", "params", apart=["name"]).over(method)
        fraction = config.finalists.budget_fraction if final else None
        overrides = self.written.moved("overrides", "", config.overrides)
        amount = self._amount * (fraction or config.budget_fraction)
        overrides = Layer({"budget": {"amount": round(amount)}}).over(overrides)
        if not final:
            overrides = self.written.moved("evaluation", "evaluation", config.evaluation).over(overrides)
        study = f"{config.sweep}_final" if final else config.sweep
        identity = {"study": study, "arm": name, "seed": seed}
        return compose_arm(identity, config.scale, config.task, shared.over(overrides), method)

    @cached_property
    def _amount(self) -> int:
        """The whole budget of a run."""
        config, arm = self.config, self.config.arms[0]
        overrides = self.written.moved("overrides", "", config.overrides)
        identity = {"study": config.sweep, "arm": arm.label, "seed": 0}
        method = Layer({"method": {"name": arm.name, "params": arm.params}})
        return compose_arm(identity, config.scale, config.task, overrides, method).budget.amount

    def _tuned(self, label: str, point: Point) -> tuple[Layer, Layer]:
        """What a point changes in sections that all arms share, and in ``method``."""
        layers = {True: Layer(), False: Layer()}
        for key, value in point.items():
            space = self.config.spaces(label)[key]
            tree: Any = space.value(value)
            for part in reversed(key.split(".")):
                tree = {part: tree}
            own = key.startswith("method.")
            origin = self.written.origin(self._written_at(label, key))
            layers[own] = Layer(tree, {} if origin is None else {key: origin}).over(layers[own])
        return layers[False], layers[True]

    def _written_at(self, label: str, key: str) -> str:
        if key in self.config.space:
            return f"space.{key}"
        return f"arms.{self.config.arms.index(self.config.arm(label))}.space.{key}"

    def default(self, label: str) -> dict[str, Any]:
        """The point that stands for an arm's default setting.

        Raises:
            InputError: the default of a parameter lies outside its range.
        """
        run, found = self.run(label, label, None, self.config.seeds[0]), {}
        for key, space in self.config.spaces(label).items():
            value = value_at(run, key)
            point = space.default if space.default is not None else space.point(value)
            distribution = space.distribution
            inside = False
            if point is not None or None in space.probes:
                try:
                    inside = bool(distribution._contains(distribution.to_internal_repr(point)))
                except ValueError:
                    inside = False
            if not inside:
                remedy = "Widen the range, or write default: the point of it that stands for the default"
                raise self.written.error(self._written_at(label, key), "the default lies outside", remedy, value)
            found[key] = point
        return found

    @property
    def identity(self) -> str:
        """SHA-256 of the search and of every arm's default run: what makes trials comparable."""
        config = self.config
        defaults = {arm.label: self.run(arm.label, arm.label, None, config.seeds[0]).run_hash for arm in config.arms}
        return digest({"search": config.search_hash, "defaults": defaults})


def value_at(run: RunConfig, key: str) -> Any:
    """What a run has at a dotted path; below ``method`` the built method's own value.

    Raises:
        InputError: there is nothing at this path.
    """
    section, _, rest = key.partition(".")
    at: Any = build(run.method.name, run.method.params) if section == "method" else getattr(run, section)
    for part in rest.removeprefix("params.").split("."):
        if not hasattr(at, part):
            raise InputError("there is no such value", key=key, remedy="See the schema, or the method's docstring")
        at = getattr(at, part)
    return dataclasses.asdict(at) if dataclasses.is_dataclass(at) and not isinstance(at, type) else at


def read_sweep(path: Path, *, trials: int | None = None) -> Sweep:
    """Read and check a sweep file; `trials` replaces its own number.

    Every end of every range and every choice is tried alone against the schema and the method, then random points.

    Raises:
        InputError: a key, type, range or combination is wrong.
    """
    written = read_yaml(path)
    asked = Layer({} if trials is None else {"trials": trials}).over(written)
    sweep = Sweep(validate(SweepConfig, asked, path), asked)
    check(sweep)
    return sweep


def check(sweep: Sweep) -> None:
    """Refuse what could not run, or would compare what is not comparable.

    Raises:
        InputError: see `read_sweep`.
    """
    config, seed = sweep.config, sweep.config.seeds[0]
    for key in config.overrides:
        if key not in SHARED:
            raise sweep.written.error(f"overrides.{key}", "not a section", f"Known: {', '.join(SHARED)}")
    for arm in config.arms:
        spaces = config.spaces(arm.label)
        for key, space in spaces.items():
            for probe in space.probes:
                sweep.run(arm.label, arm.label, {key: probe}, seed)
        sweep.default(arm.label)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for _ in range(JOINT_DRAWS):
            sweep.run(arm.label, arm.label, study.ask({k: s.distribution for k, s in spaces.items()}).params, seed)
        first = sweep.run(arm.label, arm.label, None, seed)
        final = sweep.run(arm.label, arm.label, None, seed, final=True)
        for run in (first, final):
            known = [f"pass_at_{k}" for k in run.evaluation.k]
            if config.objective[0] not in known:
                what = f"is not evaluated ({', '.join(known)} are)"
                raise sweep.written.error("objective", what, "Name one of them, or raise evaluation.k")
        k = int(config.objective[0].removeprefix("pass_at_"))
        if config.pruner == "median" and (first.evaluation.points < 3 or first.evaluation.samples < k):
            what = f"no evaluation on the way has the {k} samples of {config.objective[0]}"
            remedy = f"Write evaluation: {{points: 3, samples: {k}}}, or more"
            raise sweep.written.error("pruner", what, remedy, config.pruner)


def best_yaml(sweep: Sweep, label: str, point: Point | None, note: str) -> str:
    """A setting as YAML that ``rolloutbench run --config`` takes: what the sweep shares and what it found.

    The budget is the scale's own; `note` says at which one the setting was found.
    """
    run = sweep.run(label, label, point, sweep.config.seeds[0])
    tree: dict[str, Any] = {"scale": sweep.config.scale}
    if sweep.config.task:
        tree["task"] = {"name": sweep.config.task}
    shared, _ = sweep._tuned(label, point or {})
    tree = shared.over(Layer(sweep.config.overrides)).over(Layer(tree)).values
    tree["method"] = run.method.model_dump(mode="json")
    comment = "".join(f"# {line}\n" for line in note.splitlines())
    return comment + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
