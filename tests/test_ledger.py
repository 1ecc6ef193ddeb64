"""The budget is never exceeded and always reached; the ledger's rows add up."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark.jsonl import read_rows
from benchmark.ledger import CURRENCIES, FATES, Budget, Ledger, Prices

currencies = st.sampled_from(["tokens_generated", "rollouts"])


@given(currencies, st.integers(1, 5000), st.integers(1, 12), st.integers(1, 16), st.integers(1, 64))
@settings(max_examples=200, deadline=None)
def test_an_admission_fits_in_the_worst_case(
    currency: str, remaining: int, prompts: int, group: int, max_tokens: int
) -> None:
    admitted = Budget(currency, 10_000).admit(remaining, prompts, group, max_tokens)
    worst = admitted.rollouts * (admitted.max_tokens if currency == "tokens_generated" else 1)
    assert 0 < worst <= remaining
    assert 1 <= admitted.prompts <= prompts
    assert admitted.prompts <= admitted.rollouts <= admitted.prompts * group
    assert admitted.max_tokens <= max_tokens
    # Only a rollout that the protocol's own limit would let run longer is cut.
    assert admitted.cut == (admitted.max_tokens < max_tokens)
    # As large as possible: no further whole group would fit, unless the batch is complete.
    if not admitted.cut and admitted.rollouts >= group and admitted.prompts < prompts:
        price = max_tokens if currency == "tokens_generated" else 1
        assert worst + group * price > remaining


@given(currencies, st.integers(1, 3000), st.data())
@settings(max_examples=60, deadline=None)
def test_admissions_end_exactly_at_the_budget_however_long_answers_are(
    currency: str, amount: int, data: st.DataObject
) -> None:
    budget, spent, uncut_after_cut, cut = Budget(currency, amount), 0, False, False
    while budget.remaining(spent) > 0:
        admitted = budget.admit(budget.remaining(spent), 4, 8, 12)
        uncut_after_cut |= cut and not admitted.cut
        cut |= admitted.cut
        if currency == "rollouts":
            spent += admitted.rollouts
        else:
            share = data.draw(st.floats(0, 1))
            least, most = admitted.rollouts, admitted.rollouts * admitted.max_tokens
            spent += round(least + share * (most - least))
    assert spent == amount
    assert not uncut_after_cut


def charge_some(ledger: Ledger) -> None:
    ledger.charge(0, "rollouts", "trained", rollouts=8, prompt_tokens=10, tokens_generated=80, flops=100)
    ledger.charge(0, "rollouts", "filtered", rollouts=4, prompt_tokens=5, tokens_generated=30, flops=50)
    ledger.charge(0, "score", tokens_scored=80, flops=7)
    ledger.charge(0, "evaluation", rollouts=100, prompt_tokens=50, tokens_generated=900, flops=1000)
    ledger.charge(0, "backprop", tokens_backpropagated=80, flops=300)


def test_rows_add_up_to_the_totals_and_evaluation_stays_apart(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    charge_some(ledger)
    rows, _ = read_rows(ledger.path)
    assert [row["row"] for row in rows] == list(range(5))
    for currency in CURRENCIES:
        training = sum(row[currency] for row in rows if row["event"] != "evaluation")
        assert ledger.spent[currency] == training
        assert ledger.evaluated[currency] == sum(row[currency] for row in rows if row["event"] == "evaluation")
    assert ledger.spent["tokens_generated"] == 110
    assert ledger.drawn == dict.fromkeys(FATES, 0) | {"trained": 8, "filtered": 4}


def test_a_restored_ledger_continues_where_the_first_stopped(tmp_path: Path) -> None:
    whole, first = Ledger(tmp_path / "whole.jsonl"), Ledger(tmp_path / "parts.jsonl")
    charge_some(whole)
    charge_some(whole)
    charge_some(first)
    state = first.state()
    second = Ledger.restore(first.path, state)
    charge_some(second)
    assert second.state() == whole.state()
    assert second.path.read_bytes() == whole.path.read_bytes()


def test_unknown_currencies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="euros"):
        Ledger(tmp_path / "ledger.jsonl").charge(0, "rollouts", "trained", euros=3)
    assert not (tmp_path / "ledger.jsonl").exists()


def test_flops_of_a_token() -> None:
    prices = Prices(parameters=10)
    assert prices.forward(3) == 60
    assert prices.backward(3) == 120


def test_every_row_is_chained_to_the_one_before(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    charge_some(ledger)
    lines = ledger.path.read_text().splitlines()
    head = ""
    for line in lines:
        body, _, rest = line.rpartition(',"hash":')
        head = hashlib.sha256(f"{head}{body}}}".encode()).hexdigest()
        assert rest == f'"{head}"}}'
    assert ledger.head == head


def test_a_ledger_begun_without_a_chain_goes_on_without_one(tmp_path: Path) -> None:
    state = Ledger(tmp_path / "ledger.jsonl").state()
    del state["head"]
    old = Ledger.restore(tmp_path / "ledger.jsonl", state)
    charge_some(old)
    assert not any("hash" in row for row in read_rows(old.path)[0])
