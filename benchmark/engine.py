"""Who makes a training step. A method names its engine; the harness gives every engine the same ledger and budget.

The native engine draws with the `Collector` and trains with the `Updater`. Another trainer takes the place of both
(`benchmark.engine_trl`): it draws and trains in its own way, from the same weights, prompts and verifier, and charges
what it spent. Evaluation, checkpoints and the end of the run are the harness's, whatever the engine.
"""

from __future__ import annotations

import pkgutil
from typing import Protocol

from benchmark.collect import Collector
from benchmark.config import RunConfig
from benchmark.draws import Batch
from benchmark.errors import InputError
from benchmark.method import Method
from benchmark.update import Updater


class Engine(Protocol):
    """Made once for a run, from its collector and its updater, whose state the checkpoint keeps."""

    def __init__(self, collector: Collector, updater: Updater) -> None: ...

    @classmethod
    def check(cls, config: RunConfig, method: Method) -> None:
        """Refuse, before anything is loaded, what the engine would leave out of a run.

        Raises:
            InputError: the run asks for something that the engine does not do.
        """
        ...

    def step(self, step: int) -> tuple[Batch, dict[str, float]]:
        """One step: what was drawn, and metrics of its updates. Spends some of the budget, and never more than all."""
        ...


class Native:
    """The suite's own decode loop and updates, for methods that are made of decisions."""

    def __init__(self, collector: Collector, updater: Updater) -> None:
        self.collector, self.updater = collector, updater

    @classmethod
    def check(cls, config: RunConfig, method: Method) -> None:
        """See `Engine.check`: nothing is left out."""

    def step(self, step: int) -> tuple[Batch, dict[str, float]]:
        """Collect, then update if any group trains."""
        past, policy = self.updater.past, self.collector.policy
        past.advance(policy)
        with past.sampling(policy):
            batch = self.collector.collect(step)
        self.collector.backend.rest()
        return batch, self.updater.update(step, batch) if len(batch.rollouts) else {}


def load(name: str) -> type[Engine]:
    """The engine named ``module:Class``.

    Raises:
        InputError: there is no such engine, or a package that it needs is missing.
    """
    try:
        found: type[Engine] = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        remedy = "Install the package that provides it, or name another engine"
        raise InputError(f"cannot be loaded ({error})", key="engine", value=name, remedy=remedy) from error
    return found
