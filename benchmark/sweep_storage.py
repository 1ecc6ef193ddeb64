"""Where Optuna keeps a sweep's trials: a journal file beside the results, or a database many machines can reach.

Trials are made ahead, as many as every arm gets, and wait; whoever holds the lease of trial n runs trial n. A trial
whose worker died is still running in Optuna's eyes, with the parameters it was given: the next holder of the lease goes
on with it. No trial is failed and drawn anew, so n trials are n settings whatever dies.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import TrialState

from benchmark import streams
from benchmark.cells import Lease, claim
from benchmark.errors import InputError
from benchmark.jsonl import drop_torn_line
from benchmark.sweep_config import SweepConfig
from benchmark.sweep_space import Sweep

JOURNAL = "journal.log"
WAIT_SECONDS = 0.2
MEDIAN_OF = 5
"""Whole trials before which the median prunes nothing."""


class _MendingLock(JournalFileSymlinkLock):
    """Optuna's lock, after which the journal ends in a whole line: a killed writer may have left half of one."""

    def __init__(self, filepath: str) -> None:
        super().__init__(filepath)
        self._journal = Path(filepath)

    def acquire(self) -> bool:
        """Wait for the lock."""
        got = bool(super().acquire())
        with self._journal.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 1))
            whole = size == 0 or file.read() == b"\n"
        if not whole:
            drop_torn_line(self._journal)
        return got


def open_storage(folder: Path, url: str | None) -> BaseStorage:
    """The journal in a sweep's folder, or the database at `url`.

    Raises:
        InputError: no database answers there.
    """
    if url is None:
        path = str(folder / JOURNAL)
        return JournalStorage(JournalFileBackend(path, lock_obj=_MendingLock(path)))
    try:
        return RDBStorage(url)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"no database there ({reason})", key="--storage", remedy="Check the URL") from None


def fingerprint(url: str | None) -> str:
    """Names a storage without the password its URL may hold."""
    return JOURNAL if url is None else hashlib.sha256(url.encode()).hexdigest()[:16]


def study_name(sweep: str, arm: str, identity: str) -> str:
    """Optuna's study of an arm; a changed search is another study."""
    return f"{sweep}/{arm} {identity[:8]}"


def sampler(config: SweepConfig, arm: str, number: int, known: int) -> optuna.samplers.BaseSampler:
    """The sampler of one trial: seeded by its number, so that a resumed sweep does not repeat earlier draws.

    Args:
        known: parameters that the trial has already, from a worker that died while it drew them.
    """
    seed = int(streams.generator("sweep", config.sampler_seed, arm, number, known).integers(2**31))
    kinds: dict[str, Any] = {
        "tpe": optuna.samplers.TPESampler,
        "gp": optuna.samplers.GPSampler,
        "random": optuna.samplers.RandomSampler,
    }
    made: optuna.samplers.BaseSampler = kinds[config.sampler](seed=seed)
    return made


def pruner(config: SweepConfig) -> optuna.pruners.BasePruner:
    """What the sweep file asks for."""
    if config.pruner == "none":
        return optuna.pruners.NopPruner()
    if config.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=MEDIAN_OF)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.pruners.WilcoxonPruner(p_threshold=config.prune_below)


def prepare(sweep: Sweep, folder: Path, url: str | None, identity: str) -> None:
    """Make every arm's study and its waiting trials, the default setting first; what is there stays."""
    config = sweep.config
    with wait_for(folder / "setup"):
        storage = open_storage(folder, url)
        for arm in config.arms:
            study = optuna.create_study(
                storage=storage,
                study_name=study_name(config.sweep, arm.label, identity),
                directions=config.directions,
                load_if_exists=True,
            )
            if not study.user_attrs:
                study.set_user_attr("seeds", list(config.seeds))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                    study.set_metric_names(list(config.objective))
            for number in range(len(study.get_trials(deepcopy=False)), config.trials):
                study.enqueue_trial(sweep.default(arm.label) if number == 0 else {})


def wait_for(folder: Path) -> Lease:
    """The lease on `folder`, as soon as its present holder is done or dead."""
    while (lease := claim(folder)) is None:
        time.sleep(WAIT_SECONDS)
    return lease


def take(study: optuna.Study, storage: BaseStorage, number: int) -> optuna.Trial:
    """Trial `number`, running from now on if it was waiting. Its lease makes the caller its only owner."""
    trial_id = storage.get_trial_id_from_study_id_trial_number(storage.get_study_id_from_name(study.study_name), number)
    if storage.get_trial(trial_id).state == TrialState.WAITING:
        storage.set_trial_state_values(trial_id, TrialState.RUNNING)
    return optuna.Trial(study, trial_id)
