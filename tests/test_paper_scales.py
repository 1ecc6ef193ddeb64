"""Scales of published papers: their prices, and their data, cleaned, from files and from data sets."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmark.cli import app
from benchmark.compose import compose_run, compose_study, scale_pricing
from benchmark.config import HubConfig
from benchmark.contamination import Item, clean, grams, words
from benchmark.errors import InputError
from benchmark.pricing import GPUConfig, PricingConfig, ShapeConfig, closed_form
from benchmark.problems import load_task
from benchmark.run import run_cell
from benchmark.sources import DATA, data_file

BENCHMARKS = ("aime24", "aime25", "amc23", "math500", "minerva", "olympiad")
SCALES = ("paper-1.5b", "paper-7b", "paper-14b")
LOCAL = [folder / "shared" / "data" for folder in Path(__file__).resolve().parents]
LONG = "Ann has twelve red balls and gives three of them to Bob before lunch"


def item(number: int, prompt: str, answer: str = "1", family: str = "train") -> Item:
    return Item(f"{family}/{number}", family, prompt, answer)


def write(folder: Path, name: str, *rows: tuple[str, str]) -> None:
    lines = [{"id": f"{name}/{i}", "problem": text, "answer": gold} for i, (text, gold) in enumerate(rows)]
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


# --- prices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "billions"), [("paper-1.5b", 1.54), ("paper-7b", 7.61), ("paper-14b", 14.77)])
def test_the_shapes_have_the_sizes_that_the_models_are_known_for(scale: str, billions: float) -> None:
    assumed = scale_pricing(scale)
    assert assumed is not None
    assert assumed.shape.parameters / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("scale", SCALES)
def test_the_protocol_of_the_paper_scales(scale: str) -> None:
    config = compose_run("grpo", scale=scale)
    assert (config.rollout.prompts_per_batch, config.rollout.rollouts_per_prompt) == (512, 16)
    assert config.optimiser.learning_rate == 1e-6
    assert config.task.families == BENCHMARKS
    assert config.evaluation.k == (1, 32)
    assert config.evaluation.final_samples >= 64
    assert config.evaluation.temperature == config.rollout.temperature == 1.0


def test_closed_form_prices_are_what_the_ledger_of_a_run_says(tmp_path: Path) -> None:
    small = ["budget.currency=rollouts", "budget.amount=64", "rollout.prompts_per_batch=8"]
    small += ["evaluation.final_samples=2", "evaluation.k=[1]", "task.eval_items_per_family=1"]
    config = compose_run("grpo", scale="smoke", options=small)
    run_cell(config, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    spent, made = result["spent"], config.policy.architecture
    shape = ShapeConfig(
        hidden_size=made.hidden_size,
        layers=made.layers,
        heads=made.heads,
        kv_heads=made.kv_heads,
        mlp=made.mlp,
        vocabulary=32,
        tied=True,
    )
    prompts, group = 8, config.rollout.rollouts_per_prompt
    assert spent["rollouts"] == prompts * group == 64
    assumed = PricingConfig(
        shape=shape,
        prompt_tokens=spent["prompt_tokens"] / prompts,
        answer_tokens=spent["tokens_generated"] / 64,
        evaluation_items=len(config.task.families),
        gpu=GPUConfig(name="any", tflops=1.0, memory_gb=1.0, sampling=0.5, training=0.5),
    )
    prices = closed_form(config, assumed)
    for currency in ("rollouts", "prompt_tokens", "tokens_generated", "tokens_backpropagated"):
        assert 64 * prices[currency] == pytest.approx(spent[currency]), currency
    # The ledger also counts the few weights of norms and biases.
    assert 64 * prices["flops"] == pytest.approx(spent["flops"], rel=0.01)
    rows = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert prices["evaluation_tokens"] * 64 == pytest.approx(sum(row["n"] for row in rows) * assumed.answer_tokens)


def test_the_dry_run_prices_a_model_that_is_not_here(tmp_path: Path) -> None:
    asked = ["study", "main_table", "--scale", "paper-7b", "--seeds", "2", "--dry-run", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert "assumed, not measured: 7.62B parameters" in result.output
    assert "28 cells, 28 to run; unit prices in closed form" in result.output
    assert "tokens_generated 28G" in result.output
    assert "GPU hours" in result.output
    assert "holds 122 GB" in result.output
    assert "more than the 80 GB of one" in result.output
    assert not list(tmp_path.iterdir())
    fits = CliRunner().invoke(app, ["paper-1.5b" if word == "paper-7b" else word for word in asked])
    assert "holds 25 GB" in fits.output
    assert "more than" not in fits.output


def test_a_run_launched_by_itself_fits_the_folder_that_a_study_names() -> None:
    server = ("backend.vllm.url=http://127.0.0.1:8000",)
    plan = compose_study("main_table", scale="paper-7b", options=server)
    for arm, seed in (("dapo", 1), ("dynamo", 0)):
        alone = compose_run(arm, scale="paper-7b", seed=seed, options=server)
        (planned,) = [run for run in plan.runs if (run.arm, run.seed) == (arm, seed)]
        assert alone.run_hash == planned.run_hash


# --- data -----------------------------------------------------------------------------------------------------------


def test_cleaning_drops_repeats_conflicts_and_overlap_and_says_why() -> None:
    evaluation = [item(0, LONG, family="amc"), item(1, "What is 2+2?", family="amc")]
    half = " ".join(LONG.split()[:11])  # 4 of the 7 runs of eight words
    train = [
        item(0, "Something else"),
        item(1, "Something  else\n"),
        item(2, "Asked twice", "3"),
        item(3, "Asked twice", "4"),
        item(4, f"Story: {half.upper()} and goes home"),
        item(5, "what is $2 + 2$"),
        item(6, " ".join(LONG.split()[:10])),  # 3 of 7
    ]
    assert len(grams(words(LONG))) == 7
    kept, dropped = clean(train, evaluation, 0.5)
    assert [one.id for one in kept] == ["train/0", "train/6"]
    assert [(row["train_id"], row["reason"], row["with"], row["share"]) for row in dropped] == [
        ("train/1", "repeat", "train/0", None),
        ("train/2", "conflict", "train/2", None),
        ("train/3", "conflict", "train/2", None),
        ("train/4", "overlap", "amc/0", 0.571),
        ("train/5", "overlap", "amc/1", 1.0),
    ]


def test_a_paper_scale_loads_and_cleans_local_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA, str(tmp_path))
    write(tmp_path, "dapo_math_17k.jsonl", ("What is 1+1?", "2"), ("What is 1+1?", "2"), (LONG, "9"))
    for name in ("aime24", "aime25", "amc23", "math500", "minerva_math"):
        write(tmp_path, f"{name}.jsonl", (f"A problem of {name}", r"\frac{1}{2}"))
    write(tmp_path, "olympiad_bench.jsonl", (LONG + " time", "9"))
    record = tmp_path / "out" / "contamination.jsonl"
    record.parent.mkdir()
    train, evaluation = load_task(compose_run("grpo", scale="paper-7b").task, record)
    assert [one.prompt for one in train] == ["What is 1+1?"]
    assert [one.family for one in evaluation] == list(BENCHMARKS)
    assert [json.loads(line)["reason"] for line in record.read_text().splitlines()] == ["repeat", "overlap"]


def test_a_missing_file_is_made_from_the_data_set_of_the_hub_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROLLOUTBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    source = tmp_path / "set"
    source.mkdir()
    rows = [{"question": "One or two?", "final_answer": ["1", "2"]}, {"question": "Three?", "final_answer": ["3"]}]
    (source / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hub = {"mine.jsonl": HubConfig(id=str(source), split="test", problem="question", answer="final_answer")}
    made = data_file("mine.jsonl", hub)
    (source / "test.jsonl").unlink()
    assert data_file("mine.jsonl", hub) == made
    assert [json.loads(line) for line in made.read_text().splitlines()] == [
        {"id": "mine/0", "problem": "One or two?", "answer": "1, 2"},
        {"id": "mine/1", "problem": "Three?", "answer": "3"},
    ]
    (tmp_path / "mine.jsonl").write_text("{}")
    monkeypatch.setenv(DATA, str(tmp_path))
    assert data_file("mine.jsonl", hub) == tmp_path / "mine.jsonl"
    with pytest.raises(InputError, match=r"other\.jsonl: is not here, and .*nowhere cannot be read"):
        data_file("other.jsonl", {"other.jsonl": HubConfig(id=str(tmp_path / "nowhere"))})


@pytest.mark.slow
@pytest.mark.skipif(not any(folder.is_dir() for folder in LOCAL), reason="no local copy of the data sets")
def test_the_real_data_sets_load_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = next(folder for folder in LOCAL if folder.is_dir())
    monkeypatch.setenv(DATA, str(folder))
    train, evaluation = load_task(compose_run("grpo", scale="paper-7b").task, tmp_path / "contamination.jsonl")
    size = Counter(one.family for one in evaluation)
    assert size == dict(zip(BENCHMARKS, (30, 30, 40, 500, 272, 675), strict=True))
    assumed = scale_pricing("paper-7b")
    assert assumed is not None
    assert assumed.evaluation_items == len(evaluation)
    rows = [json.loads(line) for line in (tmp_path / "contamination.jsonl").read_text().splitlines()]
    reasons = Counter(row["reason"] for row in rows)
    assert (reasons["conflict"], reasons["repeat"]) == (24, 717)  # 692 repeated texts, 12 of them in conflict
    gone = {row["train_id"] for row in rows}
    assert len(train) + len(gone) == 17_917
    known = [json.loads(line) for line in (folder / "contamination.jsonl").read_text().splitlines()]
    theirs = {row["train_id"] for row in known if row["train_set"] == "dapo_math_17k"}
    # The list that comes with the data splits words a little differently at the edge of one half.
    assert len(theirs - gone) <= 0.05 * len(theirs)
