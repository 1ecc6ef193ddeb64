"""Problems and their worked solutions: true golds, disjoint splits, files with faults, solutions that add up."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmark import verifier_pool
from benchmark.config import MixComponent, TaskConfig
from benchmark.errors import InputError
from benchmark.problems import (
    Item,
    build_items,
    candidates,
    check_disjoint,
    digest,
    held_out,
    load_jsonl,
    load_task,
    shares,
)
from benchmark.solutions import STYLES, worked_solution
from benchmark.verifier import Verifier
from benchmark.vocabulary import build_tokenizer

SUM = MixComponent(family="chain_sum", name="sum", num_terms=(2, 5), num_digits=(1, 2))
TIMES = MixComponent(family="products", name="times", num_terms=(2, 3), num_digits=(1, 1), weight=0.5)
LINE = MixComponent(family="equations", name="line", num_terms=(2, 2), min_value=1, max_value=12)
MIX = (SUM, TIMES, LINE)
TASK = TaskConfig(name="test", mix=MIX, train_items=200, eval_items_per_family=20)


def expression(item: Item) -> str:
    return item.prompt.split(" ")[1].removesuffix(".")


def value(text: str) -> int:
    """Sums and products of integers, by a route that shares nothing with the code under test."""
    assert re.fullmatch(r"[-+*\d]+", text), text
    plain = re.sub(r"\b0+(?=\d)", "", text)
    return int(eval(plain, {"__builtins__": {}}))


def solves(item: Item) -> bool:
    if item.prompt.startswith("Compute "):
        return value(expression(item)) == int(item.answer)
    left, right = re.sub("x", f"({item.answer})", expression(item)).split("=")
    return int(eval(left, {"__builtins__": {}})) == int(right)


# --- generated problems ---------------------------------------------------------------------------------------


def test_golds_are_true_and_texts_short_and_regular() -> None:
    train, evaluation = load_task(TASK)
    for item in train + evaluation:
        assert solves(item), item
        form = r"Compute \d+([-+*]\d+)+\." if "x" not in item.prompt else r"Solve [-+*\dx]+=-?\d+\."
        assert re.fullmatch(form, item.prompt), item


def test_golds_decide_the_unknown() -> None:
    for prompt, answer in [next(candidates(LINE, seed, "train")) for seed in range(50)]:
        other = Item("i", "line", prompt, str(int(answer) + 1))
        assert not solves(other)


def test_items_are_a_function_of_the_seed() -> None:
    first, again = load_task(TASK), load_task(TASK)
    assert first == again
    other = load_task(TASK.model_copy(update={"seed": 1}))
    assert digest(first[0]) == digest(again[0]) != digest(other[0])
    shared = {item.prompt for item in first[0]} & {item.prompt for item in other[0]}
    assert len(shared) < 0.5 * len(first[0])  # reasoning-gym's own seeding shares nearly all


def test_texts_and_ids_are_unique_and_splits_disjoint() -> None:
    train, evaluation = load_task(TASK)
    everything = train + evaluation
    assert len({item.prompt for item in everything}) == len({item.id for item in everything}) == len(everything)
    assert not any(held_out(item.prompt) for item in train)
    assert all(held_out(item.prompt) for item in evaluation)


def test_no_seed_trains_on_what_another_evaluates() -> None:
    trained = {item.prompt for seed in range(3) for item in load_task(TASK.model_copy(update={"seed": seed}))[0]}
    evaluated = {item.prompt for seed in range(3) for item in load_task(TASK.model_copy(update={"seed": seed}))[1]}
    assert not trained & evaluated


def test_about_a_quarter_of_a_tiny_space_is_held_out() -> None:
    texts = [f"Compute {a}*{b}." for a in range(10) for b in range(10)]
    assert 10 <= sum(map(held_out, texts)) <= 40


def test_evaluation_is_balanced_and_training_follows_the_weights() -> None:
    train, evaluation = load_task(TASK)
    assert Counter(item.family for item in evaluation) == {"sum": 20, "times": 20, "line": 20}
    assert Counter(item.family for item in train) == {"sum": 80, "times": 40, "line": 80}


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(0, 1000))
def test_shares_sum_and_are_within_one_of_exact(weights: list[float], count: int) -> None:
    parts = shares(weights, count)
    assert sum(parts) == count
    assert all(abs(n - count * w / sum(weights)) < 1 for n, w in zip(parts, weights, strict=True))


def test_a_component_that_runs_out_is_an_input_error() -> None:
    tiny = MixComponent(family="products", name="tiny", num_terms=(2, 2), num_digits=(1, 1))
    with pytest.raises(InputError, match="tiny"):
        build_items(tiny, 90, 0, evaluation=False, taken=set())
    with pytest.raises(InputError, match="juggling"):
        next(candidates(MixComponent(family="juggling", name="juggling"), 0, "train"))


# --- files ----------------------------------------------------------------------------------------------------


def write(path: Path, *rows: Any) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(timeout_s=20.0) as made:
        yield made


GOOD = {"id": "set/1", "problem": "What is 1+1?", "answer": "2", "source": "x", "level": None}


def test_a_file_is_read_in_order(tmp_path: Path, verifier: Verifier) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, "", {**GOOD, "id": "set/2", "answer": r"\frac{1}{2}"})
    assert load_jsonl(path, "set", verifier) == [
        Item("set/1", "set", "What is 1+1?", "2"),
        Item("set/2", "set", "What is 1+1?", r"\frac{1}{2}"),
    ]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_only_a_newline_ends_a_row(separator: str, tmp_path: Path, verifier: Verifier) -> None:
    text = f"two{separator}lines"
    path = write(tmp_path / "a.jsonl", {**GOOD, "problem": text})
    assert load_jsonl(path, "set", verifier)[0].prompt == text


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ('{"id": ', "malformed JSON"),
        ("[1, 2]", "id"),
        ({"id": "a", "problem": "p"}, "answer"),
        ({**GOOD, "id": "a", "answer": " "}, "answer"),
        ({**GOOD, "id": "a", "answer": 2}, "answer"),
        ({**GOOD, "id": "a", "problem": None}, "problem"),
        (GOOD, "id"),
    ],
)
def test_faults_name_file_and_line(row: Any, what: str, tmp_path: Path, verifier: Verifier) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, row)
    with pytest.raises(InputError, match=what) as caught:
        load_jsonl(path, "set", verifier)
    assert caught.value.line == 2
    assert str(caught.value).startswith(f"{path}:2: ")


def test_files_without_problems_are_refused(tmp_path: Path, verifier: Verifier) -> None:
    with pytest.raises(InputError, match="no such"):
        load_jsonl(tmp_path / "none.jsonl", "set", verifier)
    with pytest.raises(InputError, match="no problems"):
        load_jsonl(write(tmp_path / "empty.jsonl"), "set", verifier)
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}\n')
    with pytest.raises(InputError, match="UTF-8"):
        load_jsonl(tmp_path / "latin.jsonl", "set", verifier)


def test_training_on_an_evaluation_problem_is_refused(tmp_path: Path, verifier: Verifier) -> None:
    train = write(tmp_path / "train.jsonl", GOOD, {**GOOD, "id": "set/2", "problem": "What is 2+2?"})
    evaluation = write(tmp_path / "eval.jsonl", {**GOOD, "id": "other/1", "problem": "What is 2+2?"})
    task = TaskConfig(name="files", train_file=str(train), eval_files={"other": str(evaluation)})
    with pytest.raises(InputError, match="set/2"):
        load_task(task)
    check_disjoint(load_jsonl(train, "train", verifier)[:1], load_jsonl(evaluation, "other", verifier))


def test_an_answer_that_nothing_can_equal_is_refused_by_line(tmp_path: Path, verifier: Verifier) -> None:
    fine = [
        {**GOOD, "id": f"set/{i}", "answer": a} for i, a in enumerate([r"\frac{1}{2}", "$x+1$", r"\{1, 2\}", "-3/4"])
    ]
    assert len(load_jsonl(write(tmp_path / "fine.jsonl", *fine), "set", verifier)) == 4
    cut = {**GOOD, "id": "set/8", "answer": r"\frac{1}{2"}
    path = write(tmp_path / "cut.jsonl", *fine, "", cut, {**cut, "id": "set/9"}, {**GOOD, "id": "set/10"})
    with pytest.raises(InputError, match=r"math-verify reads \(nor is that of 1 more, first line 7\)\. Mend") as caught:
        load_jsonl(path, "set", verifier)
    fault = caught.value
    assert (fault.file, fault.line, fault.key, fault.value) == (path, 6, "answer", r"\frac{1}{2")
    assert len(str(fault).splitlines()) == 1


def test_a_task_of_integers_refuses_other_answers_and_starts_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object) -> None:
        raise AssertionError("a child process was started")

    monkeypatch.setattr(verifier_pool, "_Worker", started)
    train = write(tmp_path / "train.jsonl", GOOD, {**GOOD, "id": "set/2", "problem": "Half?", "answer": "1/2"})
    evaluation = write(tmp_path / "eval.jsonl", {**GOOD, "problem": "What is 2+2?", "answer": "4"})
    files = {"name": "files", "train_file": str(train), "eval_files": {"other": str(evaluation)}}
    with pytest.raises(
        InputError, match=r"train\.jsonl:2: answer = '1/2': not an integer\. .*task\.answer_form to any"
    ):
        load_task(TaskConfig.model_validate(files))
    write(train, GOOD)
    assert [item.answer for part in load_task(TaskConfig.model_validate(files)) for item in part] == ["2", "4"]


def test_the_answers_of_evaluation_files_are_checked_too(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", GOOD)
    evaluation = write(tmp_path / "eval.jsonl", {**GOOD, "problem": "Half?", "answer": "}{"})
    task = TaskConfig(name="files", train_file=str(train), eval_files={"other": str(evaluation)}, answer_form="any")
    with pytest.raises(InputError, match=r"eval\.jsonl:1: answer = '\}\{': "):
        load_task(task)


# --- worked solutions -----------------------------------------------------------------------------------------


def problems() -> list[tuple[str, Item]]:
    train, _ = load_task(TASK)
    family = {part.name: part.family for part in MIX}
    return [(family[item.family], item) for item in train]


@pytest.mark.parametrize("style", STYLES)
def test_without_slips_solutions_end_in_the_gold(style: str) -> None:
    rng = np.random.default_rng(0)
    for family, item in problems():
        assert worked_solution(family, item.prompt, style, rng, 0.0).endswith(f"\\boxed{{{item.answer}}}")


def test_written_steps_add_up_without_slips_and_only_then() -> None:
    def wrong_steps(rate: float) -> int:
        rng, wrong = np.random.default_rng(0), 0
        for family, item in problems():
            text = worked_solution(family, item.prompt, "full", rng, rate)
            for step in text.split(";")[:-1]:
                left, _, right = step.partition("=")
                wrong += right != "" and "x" not in left and value(left) != value(right)
        return wrong

    assert wrong_steps(0.0) == 0
    assert wrong_steps(0.5) > 50


def test_a_slip_is_carried_forward() -> None:
    text = worked_solution("chain_sum", "Compute 10+10+10.", "full", np.random.default_rng(0), 1.0)
    first, second, box = text.split(";")
    assert first != "10+10=20"
    carried = first.split("=")[1]
    assert second.startswith(f"{carried}+10=")
    assert box == f"\\boxed{{{second.split('=')[1]}}}"


@pytest.mark.parametrize("style", STYLES)
def test_a_single_step_is_wrong_at_the_error_rate(style: str) -> None:
    rng = np.random.default_rng(1)
    prompt, count, rate = "Compute 12+34.", 4000, 0.12
    texts = (worked_solution("chain_sum", prompt, style, rng, rate) for _ in range(count))
    wrong = sum(not text.endswith("\\boxed{46}") for text in texts)
    assert abs(wrong / count - rate) < 4 * (rate * (1 - rate) / count) ** 0.5


def test_solutions_fit_and_are_written_in_the_vocabulary() -> None:
    tokenizer, rng = build_tokenizer(), np.random.default_rng(2)
    lengths = []
    for family, item in problems():
        text = worked_solution(family, item.prompt, "full", rng)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        lengths.append(len(ids) + 1)
    assert np.mean(np.array(lengths) <= 48) > 0.95
