"""Problems are disjoint, repeatable and solvable; files are read with errors that name the line; text is lossless."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark.config import MixComponent, TaskConfig
from benchmark.errors import InputError
from benchmark.problems import Item, candidates, check_disjoint, digest, held_out, load_jsonl, load_task, shares
from benchmark.solutions import STYLES, linear_sides, worked_solution
from benchmark.verifier import Verifier
from benchmark.vocabulary import CHARACTERS, WORDS, build_tokenizer

MIX: list[dict[str, Any]] = [
    {"family": "chain_sum", "num_terms": [2, 4], "num_digits": [1, 3], "weight": 2.0},
    {"family": "products", "num_terms": [2, 2], "num_digits": [1, 2]},
    {"family": "equations", "num_terms": [2, 3], "min_value": 1, "max_value": 20},
]


def make_task(**changes: Any) -> TaskConfig:
    plain = {"name": "arithmetic", "mix": MIX, "train_items": 80, "eval_items_per_family": 10} | changes
    return TaskConfig.model_validate(plain)


@pytest.fixture(scope="module")
def task() -> tuple[list[Item], list[Item]]:
    return load_task(make_task())


def test_training_and_evaluation_share_no_text(task: tuple[list[Item], list[Item]]) -> None:
    train, evaluation = task
    texts = [item.prompt for item in [*train, *evaluation]]
    assert len(set(texts)) == len(texts) == 80 + 30
    assert len({item.id for item in [*train, *evaluation]}) == len(texts)
    assert all(held_out(item.prompt) for item in evaluation)
    assert not any(held_out(item.prompt) for item in train)


def test_no_other_seed_trains_on_the_evaluation_items(task: tuple[list[Item], list[Item]]) -> None:
    other, _ = load_task(make_task(seed=1))
    assert not {item.prompt for item in other} & {item.prompt for item in task[1]}
    # Hash-derived seeds: neighbouring seeds share no run of items (reasoning-gym's own would share all but one).
    shared = {item.prompt for item in other} & {item.prompt for item in task[0]}
    assert len(shared) < len(other) / 4


def test_a_task_is_a_function_of_its_configuration(task: tuple[list[Item], list[Item]]) -> None:
    again = load_task(make_task())
    assert again == task
    assert digest(again[0]) == digest(task[0])
    assert digest(load_task(make_task(seed=1))[0]) != digest(task[0])


def test_families_follow_their_weights(task: tuple[list[Item], list[Item]]) -> None:
    train, evaluation = task
    families = [item.family for item in train]
    assert [families.count(name) for name in ("chain_sum", "products", "equations")] == [40, 20, 20]
    assert [item.family for item in evaluation].count("products") == 10


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.integers(0, 500))
@settings(max_examples=60, deadline=None)
def test_shares_add_up_and_are_within_one_of_exact(weights: list[float], count: int) -> None:
    found = shares(weights, count)
    assert sum(found) == count
    assert all(abs(n - count * w / sum(weights)) < 1 + 1e-9 for n, w in zip(found, weights, strict=True))


def test_answers_are_right(task: tuple[list[Item], list[Item]]) -> None:
    for item in [*task[0], *task[1]]:
        body = item.prompt.split(" ", 1)[1].rstrip(".")
        if item.family == "equations":
            left, right = body.split("=")
            assert eval(left.replace("x", f"({item.answer})")) == int(right)
        else:
            assert eval(body) == int(item.answer)


def test_a_solution_without_slips_ends_in_the_gold_answer(task: tuple[list[Item], list[Item]]) -> None:
    rng = np.random.default_rng(0)
    for item in task[0]:
        for style in STYLES:
            text = worked_solution(item.family, item.prompt, style, rng, error_rate=0.0)
            assert text.endswith(f"\\boxed{{{item.answer}}}"), (item.prompt, style)
            assert text.startswith("\\boxed{") == (style == "direct")


def test_written_steps_are_true_equations_and_slips_are_carried_forward() -> None:
    rng = np.random.default_rng(0)
    clean = worked_solution("chain_sum", "Compute 12+7-30.", "full", rng, 0.0)
    assert clean == "12+7=19;19-30=-11;\\boxed{-11}"
    assert worked_solution("chain_sum", "Compute 12+7-30.", "partial", rng, 0.0) == "19;-11;\\boxed{-11}"
    wrong = worked_solution("chain_sum", "Compute 12+7-30.", "full", rng, 1.0)
    first, second, boxed = wrong.split(";")
    total = first.split("=")[1]
    assert total != "19"
    assert second.startswith(f"{total}-30=")
    assert int(second.split("=")[1]) != int(total) - 30
    assert boxed == f"\\boxed{{{second.split('=')[1]}}}"


@pytest.mark.parametrize(
    ("equation", "sides"),
    [("3*x+4=19", (3, 4, 19)), ("x*2-x+5*2=0", (1, 10, 0)), ("7-x=2", (-1, 7, 2)), ("-2*x-3=-9", (-2, -3, -9))],
)
def test_linear_sides(equation: str, sides: tuple[int, int, int]) -> None:
    assert linear_sides(equation) == sides


def test_an_exhausted_family_is_one_clear_error() -> None:
    tiny = [{"family": "products", "num_terms": [2, 2], "num_digits": [1, 1]}]
    with pytest.raises(InputError, match=r"task.mix.products: has only \d+ distinct train problems, 500 are wanted"):
        load_task(make_task(mix=tiny, train_items=500, eval_items_per_family=2))


def test_an_unknown_family_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"task.mix.family = 'riddles'.*chain_sum"):
        next(candidates(MixComponent.model_validate({"family": "riddles"}), 0, "train"))


GOOD = {"id": "a", "problem": "1+1?", "answer": "2"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "malformed JSON"),
        (json.dumps({"id": "b", "problem": "x"}), "answer"),
        (json.dumps({"id": "b", "problem": " ", "answer": "1"}), "problem"),
        (json.dumps({"id": "b", "problem": "x", "answer": 2}), "answer = 2"),
        (json.dumps(GOOD), "repeated id"),
        ("[1, 2]", "missing"),
    ],
)
def test_errors_in_data_name_file_and_line(tmp_path: Path, bad: str, message: str) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n{bad}\n", encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        load_jsonl(file, "train", Verifier())
    assert (caught.value.file, caught.value.line) == (file, 3)
    assert f"{file}:3: " in str(caught.value)


def test_missing_empty_and_undecodable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such data file"):
        load_jsonl(tmp_path / "none.jsonl", "train", Verifier())
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no problems"):
        load_jsonl(tmp_path / "empty.jsonl", "train", Verifier())
    (tmp_path / "latin.jsonl").write_bytes(b'{"id":"\xe9"}')
    with pytest.raises(InputError, match="not UTF-8"):
        load_jsonl(tmp_path / "latin.jsonl", "train", Verifier())


def test_files_that_overlap_are_refused(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(GOOD | {"id": name}) + "\n")
    task = TaskConfig(
        name="mine", train_file=str(tmp_path / "train.jsonl"), eval_files={"test": str(tmp_path / "test.jsonl")}
    )
    with pytest.raises(InputError, match="training item train repeats evaluation item test"):
        load_task(task)
    check_disjoint([Item("a", "f", "1+1", "2")], [Item("b", "f", "1+2", "3")])


@given(st.lists(st.sampled_from([*WORDS, *CHARACTERS]), max_size=40))
@settings(max_examples=60, deadline=None)
def test_the_tokenizer_is_lossless(symbols: list[str]) -> None:
    tokenizer, text = TOKENIZER, "".join(symbols)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


TOKENIZER = build_tokenizer()


def test_the_tokenizer_covers_the_task_and_survives_a_save(task: tuple[list[Item], list[Item]], tmp_path: Path) -> None:
    import transformers

    TOKENIZER.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    assert (again.eos_token_id, again.pad_token_id, len(again)) == (1, 0, len(TOKENIZER))
    for item in task[0]:
        text = item.prompt + worked_solution(item.family, item.prompt, "full", rng)
        ids = again(text, add_special_tokens=False)["input_ids"]
        assert again.unk_token_id not in ids
        assert ids == TOKENIZER(text, add_special_tokens=False)["input_ids"]
        assert again.decode(ids, clean_up_tokenization_spaces=False) == text
