"""Problems: generated ones of graded difficulty, and sets read from JSONL files.

Generated problems come from reasoning-gym, one item at a time, each from its own hash-derived seed (reasoning-gym's own
``seed + index`` makes neighbouring seeds share nearly every item). Which problem texts are held out for evaluation is
decided by a hash of the text itself, so training and evaluation cannot overlap; a check on load proves it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmark import streams
from benchmark.config import MixComponent, TaskConfig
from benchmark.contamination import Item as Item
from benchmark.contamination import clean
from benchmark.errors import InputError
from benchmark.jsonl import atomic_write_text
from benchmark.sources import data_file
from benchmark.verifier import Verifier

HELD_OUT = 0.25  # share of all problem texts that only evaluation may use
PATIENCE = 200  # draws per wanted item before a component counts as exhausted
GOLD_WORKERS = min(4, os.cpu_count() or 1)  # processes that read the answers of a file
GOLD_TIMEOUT_S = 10.0  # patient: a busy machine must not make a good file look bad


def _chain_sum(part: MixComponent, seed: int) -> tuple[str, str]:
    from reasoning_gym.arithmetic import ChainSumConfig, ChainSumDataset

    terms, digits = part.num_terms or (2, 6), part.num_digits or (1, 3)
    settings = ChainSumConfig(
        min_terms=terms[0], max_terms=terms[1], min_digits=digits[0], max_digits=digits[1], seed=seed, size=1
    )
    entry = ChainSumDataset(settings)[0]
    return f"Compute {_tight(entry['metadata']['expression'])}.", entry["answer"]


def _products(part: MixComponent, seed: int) -> tuple[str, str]:
    from reasoning_gym.arithmetic import ProductsConfig, ProductsDataset

    terms, digits = part.num_terms or (2, 2), part.num_digits or (1, 1)
    settings = ProductsConfig(
        min_terms=terms[0], max_terms=terms[1], min_digits=digits[0], max_digits=digits[1], seed=seed, size=1
    )
    entry = ProductsDataset(settings)[0]
    return f"Compute {_tight(entry['metadata']['expression'])}.", entry["answer"]


def _equations(part: MixComponent, seed: int) -> tuple[str, str]:
    from reasoning_gym.algebra import SimpleEquationsConfig, SimpleEquationsDataset

    terms = part.num_terms or (2, 2)
    settings = SimpleEquationsConfig(
        min_terms=terms[0],
        max_terms=terms[1],
        min_value=part.min_value or 1,
        max_value=part.max_value or 9,
        seed=seed,
        size=1,
    )
    entry = SimpleEquationsDataset(settings)[0]
    equation = entry["metadata"]["equation"].replace(entry["metadata"]["variable"], "x")
    return f"Solve {_tight(equation)}.", entry["answer"]


def _tight(text: str) -> str:
    return re.sub(r"\s+", "", text)


FAMILIES: dict[str, Callable[[MixComponent, int], tuple[str, str]]] = {
    "chain_sum": _chain_sum,
    "products": _products,
    "equations": _equations,
}


def held_out(prompt: str) -> bool:
    """Whether a problem text belongs to evaluation, for every seed and task: a fixed quarter of all texts."""
    return streams.key("held out", prompt) / 2**64 < HELD_OUT


def candidates(part: MixComponent, seed: int, purpose: str) -> Iterator[tuple[str, str]]:
    """Endless (prompt, answer) draws of one component, each from its own hashed seed."""
    if part.family not in FAMILIES:
        raise InputError(
            "no such problem family",
            key="task.mix.family",
            value=part.family,
            remedy=f"Known: {', '.join(FAMILIES)}",
        )
    generate = FAMILIES[part.family]
    number = 0
    while True:
        prompt, answer = generate(part, streams.key(seed, purpose, part.name, number) >> 1)
        number += 1
        # With three and more terms the unknown can cancel; "0=0" has no answer.
        if part.family != "equations" or "x" in prompt:
            yield prompt, answer


def build_items(part: MixComponent, count: int, seed: int, *, evaluation: bool, taken: set[str]) -> list[Item]:
    """`count` problems of one component with distinct texts, on one side of the hold-out.

    Raises:
        InputError: the component has too few distinct problems.
    """
    purpose = "eval" if evaluation else "train"
    items: list[Item] = []
    for draws, (prompt, answer) in enumerate(candidates(part, seed, purpose)):
        if len(items) == count:
            break
        if draws > PATIENCE * count + 1000:
            raise InputError(
                f"has only {len(items)} distinct {purpose} problems, {count} are wanted",
                key=f"task.mix.{part.name}",
                remedy="Widen its ranges, lower its weight, or lower the number of items",
            )
        if prompt not in taken and held_out(prompt) == evaluation:
            taken.add(prompt)
            items.append(Item(f"{part.name}/{purpose}-{len(items)}", part.name, prompt, answer))
    return items


def shares(weights: list[float], count: int) -> list[int]:
    """Largest-remainder split of `count` by `weights`."""
    exact = [count * weight / sum(weights) for weight in weights]
    whole = [int(value) for value in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for i in by_rest[: count - sum(whole)]:
        whole[i] += 1
    return whole


def load_jsonl(path: Path, family: str, verifier: Verifier) -> list[Item]:
    """Problems of a JSONL file with the fields id, problem and answer.

    Raises:
        InputError: missing file, malformed line, missing or empty field, repeated id, or an answer that `verifier`
            cannot read; with file and line.
    """
    if not path.is_file():
        raise InputError("no such data file", file=path, remedy="Give the path of a JSONL file")
    items: dict[int, Item] = {}
    seen: set[str] = set()
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 ({error.reason})", file=path, remedy="Save it as UTF-8") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            items[number] = _item(line, path, number, family, seen)
    if not items:
        raise InputError("holds no problems", file=path, remedy="Add lines with id, problem and answer")
    _check_golds(path, items, verifier)
    return list(items.values())


def _check_golds(path: Path, items: dict[int, Item], verifier: Verifier) -> None:
    """Refuse answers by line that, given as a response, would not count as correct: no rollout could earn a reward."""
    lines = list(items)
    bad = [lines[place] for place in verifier.check_golds([item.answer for item in items.values()])]
    if not bad:
        return
    what, remedy = "not an answer that math-verify reads", "Mend the answer or delete the line"
    if verifier.answer_form == "integer":
        what, remedy = "not an integer", f"{remedy}, or set task.answer_form to any"
    also = f" (nor is that of {len(bad) - 1} more, first line {bad[1]})" if bad[1:] else ""
    value = items[bad[0]].answer
    raise InputError(f"{what}{also}", file=path, line=bad[0], key="answer", value=value, remedy=remedy)


def _item(line: str, path: Path, number: int, family: str, seen: set[str]) -> Item:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"malformed JSON ({error})", file=path, line=number, remedy="Mend the line") from error
    for key in ("id", "problem", "answer"):
        value = row.get(key) if isinstance(row, dict) else None
        if not isinstance(value, str) or not value.strip():
            raise InputError(
                "missing, empty or not a string",
                file=path,
                line=number,
                key=key,
                value=value,
                remedy="Give a text",
            )
    if row["id"] in seen:
        raise InputError("repeated id", file=path, line=number, key="id", value=row["id"], remedy="Make ids unique")
    seen.add(row["id"])
    return Item(row["id"], family, row["problem"], row["answer"])


def check_disjoint(train: list[Item], evaluation: list[Item]) -> None:
    """Raise InputError if a training problem's text is also an evaluation problem's."""
    held = {item.prompt: item.id for item in evaluation}
    for item in train:
        if item.prompt in held:
            raise InputError(
                f"training item {item.id} repeats evaluation item {held[item.prompt]}",
                key="task",
                value=item.prompt,
                remedy="Drop it from the training file",
            )


def load_task(config: TaskConfig, record: Path | None = None) -> tuple[list[Item], list[Item]]:
    """Training pool and evaluation items of a task, disjoint.

    Args:
        record: where to write what cleaning left out, one JSON line a reason; only with ``config.overlap``.

    Raises:
        InputError: unreadable or overlapping data, an answer that cannot be verified, or a family with too few
            problems.
    """
    if config.train_file is not None:
        with Verifier(GOLD_WORKERS, GOLD_TIMEOUT_S, config.answer_form) as verifier:
            train = load_jsonl(data_file(config.train_file, config.hub), "train", verifier)
            files = [(name, data_file(file, config.hub)) for name, file in config.eval_files.items()]
            evaluation = [item for name, file in files for item in load_jsonl(file, name, verifier)]
        if config.overlap is not None:
            train, dropped = clean(train, evaluation, config.overlap)
            if record is not None:
                atomic_write_text(record, "".join(json.dumps(row) + "\n" for row in dropped))
    else:
        taken: set[str] = set()
        counts = shares([part.weight for part in config.mix], config.train_items)
        evaluation = [
            item
            for part in config.mix
            for item in build_items(part, config.eval_items_per_family, config.seed, evaluation=True, taken=taken)
        ]
        train = [
            item
            for part, count in zip(config.mix, counts, strict=True)
            for item in build_items(part, count, config.seed, evaluation=False, taken=taken)
        ]
    check_disjoint(train, evaluation)
    return train, evaluation


def digest(items: list[Item]) -> str:
    """SHA-256 of the problems in order."""
    text = "\n".join(json.dumps([item.id, item.family, item.prompt, item.answer]) for item in items)
    return hashlib.sha256(text.encode()).hexdigest()
