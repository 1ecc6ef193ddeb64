"""From names to a checked configuration: scale, task, study overrides, method and ``--set``, later on top.

A method's file or an arm's parameters reach only ``method.*``: everything else is equal in all arms, which is
what makes them comparable. Every fault is one `InputError` with file, line, key, value and remedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmark.config import RunConfig, StudyConfig
from benchmark.errors import InputError
from benchmark.installing import config_folder as config_folder
from benchmark.layers import Layer, did_you_mean, read_options, read_yaml, validate
from benchmark.pricing import PricingConfig

SHARED = ("policy", "task", "rollout", "verifier", "optimiser", "backend", "budget", "evaluation")
KINDS = {"studies": "study", "scales": "scale", "tasks": "task", "sweeps": "sweep", "experiments": "experiment"}
OF_STUDY = ("seeds", "gradient_variance_replicates")  # what a scale may set of the study itself
PRICING = "pricing"  # what a scale's dry run assumes; no part of a run
IDENTITY = {"study": "the study's file", "arm": "the command", "seed": "--seed", "scale": "--scale"}


@dataclass(frozen=True)
class Plan:
    """A study and its runs, seed by seed, so that an early stop leaves complete pairs."""

    study: StudyConfig
    runs: tuple[RunConfig, ...]


def find(kind: Literal["studies", "scales", "tasks", "sweeps", "experiments"], name: str) -> Path:
    """The file of a study, scale, task, sweep or experiment: a path to a YAML file, or a name in ``configs/<kind>``.

    Raises:
        InputError: there is no such file.
    """
    if name.endswith((".yaml", ".yml")):
        shipped = config_folder() / name.removeprefix("configs/")
        return Path(name) if _is_file(Path(name)) or not _is_file(shipped) else shipped
    path = config_folder() / kind / f"{name}.yaml"
    if not _is_file(path):
        if _is_file(Path(name) / "plan.json"):
            what = f"a folder of results, not a {KINDS[kind]} file"
            remedy = f"Name a {KINDS[kind]} file; `rolloutbench status` and `rolloutbench report` take results"
            raise InputError(what, key=KINDS[kind], value=name, remedy=remedy)
        known = (file.stem for file in (config_folder() / kind).glob("*.yaml"))
        what = f"no file of this name in configs/{kind}"
        raise InputError(what, key=KINDS[kind], value=name, remedy=did_you_mean(name, known))
    return path


def compose_run(
    method: str | None,
    *,
    scale: str | None = None,
    task: str | None = None,
    seed: int = 0,
    options: Sequence[str] = (),
    file: Path | None = None,
) -> RunConfig:
    """The configuration of a single run, outside any study.

    Args:
        method: an arm; may be left to `file`, as may the scale (``small`` where neither says) and the task.
        file: YAML with ``scale``, ``task``, ``method`` and what it changes of the scale, for instance the
            ``best.yaml`` of a sweep.

    Raises:
        InputError: a name, key, type, range or combination is wrong.
    """
    written = read_yaml(file) if file else Layer()
    _only(written, (*SHARED, "scale", "method"), "a run's file")
    section = written.values.get("method", {})
    if not isinstance(section, dict):
        raise written.error("method", "not a mapping", "Write method: {name: dynamo, params: {...}}")
    named = section.get("name", method)
    if not isinstance(named, str):
        remedy = "Name one, or write method: {name: ...} in the file of --config"
        raise written.error("method.name", "no method is named", remedy, named)
    if method not in (None, named):
        raise written.error("method.name", f"the command asks for {method}", "Leave METHOD away", named)
    size = written.values.get("scale", "small")
    if not isinstance(size, str):
        raise written.error("scale", "not the name of a scale", "Name a file of configs/scales", size)
    arm = Layer({"method": {"name": named}}).over(written.part("method"))
    identity = {"study": "single", "arm": named, "seed": seed}
    return compose_arm(identity, scale or size, task, written.part(*SHARED), arm, options)


def compose_study(
    study: str,
    *,
    scale: str | None = None,
    seeds: int | Sequence[int] | None = None,
    options: Sequence[str] = (),
) -> Plan:
    """The runs of a study file.

    `scale` and `seeds` replace the file's own. What a scale says of the study fills in what the file leaves out; that
    of a `scale` which replaces the file's replaces the file's words too, or its size would not be the scale's. An
    option that changes the budget's currency changes the study's with it.

    Raises:
        InputError: the study, or the configuration of one of its arms, is wrong.
    """
    file = find("studies", study)
    written = read_yaml(file)
    size = read_yaml(find("scales", scale or str(written.values.get("scale", "small"))))
    of_scale = size.part(*OF_STUDY)
    written = written.over(of_scale)
    validate(StudyConfig, written, file)  # what the command line replaces below is no less a fault of the file
    changes: dict[str, Any] = {"scale": scale, "seeds": seeds}
    budget = read_options(options).values.get("budget")
    changes["primary_currency"] = budget.get("currency") if isinstance(budget, dict) else None
    typed = Layer({key: value for key, value in changes.items() if value is not None})
    asked = typed.over(written if scale is None else of_scale.over(written))
    config = validate(StudyConfig, asked)
    overrides = written.moved("overrides", "", config.overrides)
    _only(overrides, SHARED, "a study's overrides")
    firsts = []
    for position, arm in enumerate(config.arms):
        layer = written.moved(f"arms.{position}", "method", {"name": arm.name, "params": arm.params})
        identity = {"study": config.study, "arm": arm.label, "seed": config.seeds[0]}
        firsts.append(compose_arm(identity, config.scale, config.task, overrides, layer, options))
    _check_study(config, firsts[0], asked)
    runs = [run.model_copy(update={"seed": seed}) for seed in config.seeds for run in firsts]
    return Plan(config, tuple(runs))


def compose_arm(
    identity: Mapping[str, Any],
    scale: str,
    task: str | None,
    overrides: Layer,
    arm: Layer,
    options: Sequence[str] = (),
) -> RunConfig:
    """One run: `identity`, and from below to above the scale, the task, `overrides`, the method's file, `arm`, options.

    Args:
        identity: study, arm and seed.
        overrides: what all arms share and the scale says otherwise.
        arm: ``method`` with its name and parameters.

    Raises:
        InputError: a name, key, type, range or combination is wrong.
    """
    asked = read_options(options)
    for key, place in {**IDENTITY, "method.name": "the command"}.items():
        if key in asked.origins:
            raise asked.error(key, "not an option", f"Give it with {place}")
    sized = read_yaml(find("scales", scale))
    _only(sized, (*SHARED, *OF_STUDY, PRICING), "a scale file")
    for key in (*OF_STUDY, PRICING):
        sized.values.pop(key, None)
    wanted = asked.over(overrides).over(sized)
    section = wanted.values.get("task")
    named = task or (section.get("name") if isinstance(section, dict) else None)
    if not isinstance(named, str):
        raise wanted.error("task.name", "no task is named", "Name a file of configs/tasks there, or give --task")
    problems = read_yaml(find("tasks", named))
    _only(problems, ("task", "policy", "rollout"), "a task file")
    vetted, method = Layer(), config_folder() / "methods" / f"{arm.values['method']['name']}.yaml"
    if method.is_file():
        vetted = read_yaml(method)
        _only(vetted, ("method",), "a method file")
    tree = Layer({**identity, "scale": _stem(scale), "task": {"name": _stem(named)}})
    for layer in (sized, problems, overrides, vetted, arm, asked):
        # ``method.alpha`` is short for ``method.params.alpha``.
        tree = layer.renamed("method", "params", apart=["name"]).over(tree)
    config = validate(RunConfig, tree)
    _check_method(config, tree)
    return config


def scale_pricing(scale: str) -> PricingConfig | None:
    """What the dry run of a scale assumes; None where it measures on this machine.

    Raises:
        InputError: a key, type or range is wrong.
    """
    written = read_yaml(find("scales", scale))
    section = written.values.get(PRICING)
    return None if section is None else validate(PricingConfig, written.moved(PRICING, "", section))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for any file, for instance
        return False


def _stem(name: str) -> str:
    """`name` without folders and ``.yaml``; a dot inside it stays."""
    return Path(name).stem if name.endswith((".yaml", ".yml")) else Path(name).name


def _only(layer: Layer, allowed: Iterable[str], who: str) -> None:
    for key in layer.values:
        if key not in allowed:
            raise layer.error(key, f"{who} may set only {', '.join(allowed)}", did_you_mean(key, allowed))


def _check_method(config: RunConfig, tree: Layer) -> None:
    from benchmark.method import Method  # imports torch, for which --help and a wrong key need not wait
    from benchmark.registry import build

    try:
        method = build(config.method.name, config.method.params)
        if method.engine != Method.engine:  # the native one leaves nothing out, and takes seconds to import
            from benchmark.engine import load

            load(method.engine).check(config, method)
    except InputError as error:
        if error.file is not None or not tree.origins:
            raise
        what = str(error).removesuffix(f". {error.remedy}")
        at = tree.origin((error.key or "method").replace("method.", "method.params.", 1))
        if at is None:
            raise
        raise InputError(what, file=at.file, line=at.line, remedy=error.remedy) from None


def _check_study(study: StudyConfig, run: RunConfig, written: Layer) -> None:
    if run.budget.currency != study.primary_currency:
        what = f"the study compares at equal {study.primary_currency}, its runs end at {run.budget.currency}"
        raise written.error("primary_currency", what, "Set overrides.budget.currency and amount to match")
    metrics = {"primary_metric": study.primary_metric}
    metrics |= {f"claims.{i}.metric": claim.metric for i, claim in enumerate(study.claims)}
    known = [f"pass_at_{k}" for k in run.evaluation.k]
    for key, metric in metrics.items():
        if metric not in known:
            raise written.error(key, "is not evaluated", did_you_mean(metric, known), metric)
