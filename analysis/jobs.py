"""Independent pieces of work side by side in processes, with one progress display."""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmark.progress import Bar, Display

Tell = Callable[[float], None]
"""Takes how much of a job's planned amount is done."""


@dataclass(frozen=True)
class Job:
    """A piece of work: `work` is called with `arguments` and a `Tell`; all must be picklable."""

    name: str
    planned: float
    work: Callable[..., None]
    arguments: tuple[Any, ...]


def perform(jobs: Sequence[Job], workers: int, display: Display, title: str, unit: str) -> None:
    """Do every job, in this process with one worker, and show how far they are.

    Args:
        unit: of the planned amounts.
    """
    spent = {job.name: 0.0 for job in jobs}

    def tell(name: str, amount: float) -> None:
        spent[name] = amount
        running = [Bar(j.name, spent[j.name], j.planned, unit) for j in jobs if 0 < spent[j.name] < j.planned]
        display.update(Bar(title, sum(spent.values()), sum(job.planned for job in jobs), unit), running)

    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            job.work(*job.arguments, partial(tell, job.name))
        return
    context = multiprocessing.get_context("spawn")  # torch does not survive a fork with threads
    with context.Manager() as manager, ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        messages = manager.Queue()
        futures = [pool.submit(_remote, job, messages) for job in jobs]
        try:
            while not all(future.done() for future in futures):
                try:
                    tell(*messages.get(timeout=0.5))
                except queue.Empty:
                    for future in futures:
                        if future.done():
                            future.result()
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _remote(job: Job, messages: Any) -> None:
    job.work(*job.arguments, lambda amount: messages.put((job.name, amount)))
