"""Verdicts: the answer rule, exact integers, agreement with math-verify, and answers that try to break things."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark import verifier_pool
from benchmark.errors import InputError
from benchmark.verdict import Verdict, reward
from benchmark.verifier import LONGEST, AnswerForm, Verifier, bare, integer, last_boxed

DATA = os.environ.get("ROLLOUTBENCH_DATA")


def box(answer: str) -> str:
    return f"so the answer is \\boxed{{{answer}}}."


def math_verify(gold: str, answer: str) -> bool:
    """math-verify itself, in this process and without any of our shortcuts."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    sides = [parse(f"\\boxed{{{side}}}", parsing_timeout=None) for side in (gold, answer)]
    return bool(verify(sides[0], sides[1], timeout_seconds=None))


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(timeout_s=5.0) as made:
        yield made


# --- rewards and the answer rule ------------------------------------------------------------------------------


def test_only_a_correct_rollout_is_rewarded() -> None:
    assert {verdict: reward(verdict) for verdict in Verdict if reward(verdict)} == {Verdict.CORRECT: 1.0}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{7}", "7"),
        (r"first \boxed{7}, no: \boxed{8}", "8"),
        (r"\boxed{7} and then \boxed{8", None),
        (r"\boxed{7} then \boxed8", "7"),
        (r"\boxed {\frac{1}{2}} etc. }", r"\frac{1}{2}"),
        (r"\boxed{\left\{1, 2\right.}", r"\left\{1, 2\right."),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{}", None),
        (r"\boxed{ }", None),
        ("7", None),
        (r"boxed{7}", None),
        ("", None),
    ],
)
def test_the_last_box_is_the_answer(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


@given(st.text(alphabet="ab12 \\{}").filter(lambda s: "\\" not in s), st.text())
def test_balanced_content_comes_back_whole(content: str, before: str) -> None:
    depths = [content[: i + 1].count("{") - content[: i + 1].count("}") for i in range(len(content))]
    if all(depth >= 0 for depth in depths) and (not depths or depths[-1] == 0):
        assert last_boxed(f"{before}\\boxed{{{content}}}") == (content.strip() or None)


def test_one_pair_of_dollars_is_stripped() -> None:
    assert [bare(s) for s in (" $x+1$ ", "$5$ and $6$", "$", "$$", "", "5")] == [
        "x+1",
        "$5$ and $6$",
        "$",
        "$$",
        "",
        "5",
    ]


def test_truncated_is_an_unfinished_rollout_without_an_answer() -> None:
    texts = [box("7"), "1+2", "1+2", box("7"), box("8")]
    with Verifier(answer_form="integer") as made:
        verdicts = made.verify_rollouts(["7"] * 5, texts, [True, True, False, False, False])
    correct, wrong = Verdict.CORRECT, Verdict.WRONG
    assert verdicts == [correct, Verdict.NO_ANSWER, Verdict.TRUNCATED, correct, wrong]


# --- integers -------------------------------------------------------------------------------------------------


@given(st.integers(), st.integers(0, 3), st.sampled_from(["", " "]))
def test_integer_literals_have_one_canonical_form(value: int, zeros: int, space: str) -> None:
    sign = "-" if value < 0 else ""
    assert integer(f"{space}{sign}{'0' * zeros}{abs(value)}{space}") == str(value)


@pytest.mark.parametrize("text", ["5+2", "7.0", "1 000", "1,000", "7x", "", "-", "--7", "٣", "1_0", "0x1", "7\0"])
def test_other_things_are_not_integer_literals(text: str) -> None:
    assert integer(text) is None


def test_arithmetic_left_undone_in_the_box_is_wrong_where_integers_are_asked_for(verifier: Verifier) -> None:
    assert verifier.verify([("7", box("5+2"))]) == [Verdict.CORRECT]
    with Verifier(answer_form="integer") as strict:
        assert strict.verify([("7", box("5+2")), ("7", box("07"))]) == [Verdict.WRONG, Verdict.CORRECT]


def test_integer_form_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    pairs = [("7", box("7")), ("7", box("x")), ("x", box("7")), ("7", "7"), ("7", box("9" * 10**6))]
    wrong, bad = Verdict.WRONG, Verdict.GOLD_UNPARSABLE
    with Verifier(answer_form="integer") as strict:
        assert strict.verify(pairs) == [Verdict.CORRECT, wrong, bad, Verdict.NO_ANSWER, wrong]


LITERALS = st.builds(
    lambda sign, zeros, value: f"{sign}{'0' * zeros}{value}",
    st.sampled_from(["", "-", "+"]),
    st.integers(0, 2),
    st.one_of(st.integers(0, 20), st.integers(0, 10**25)),
)


@settings(max_examples=150, deadline=None)
@given(LITERALS, LITERALS, st.booleans())
def test_the_exact_comparison_of_integers_is_what_math_verify_says(a: str, b: str, same: bool) -> None:
    b = a.lstrip("+") if same else b
    with Verifier(answer_form="integer") as strict:
        exact = strict.verify([(a, box(b))])[0] is Verdict.CORRECT
    assert exact == math_verify(a, b)


# --- math-verify ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        (r"\frac{1}{2}", "0.5", Verdict.CORRECT),
        (r"$\frac{1}{2}$", r"\tfrac12", Verdict.CORRECT),
        ("(1,2)", "(1, 2)", Verdict.CORRECT),
        ("(1,2)", "(2, 1)", Verdict.WRONG),
        ("x^2+2x+1", "(x+1)^2", Verdict.CORRECT),
        (r"2\sqrt{3}", r"\sqrt{12}", Verdict.CORRECT),
        ("7", r"\frac{14}{2}", Verdict.CORRECT),
        ("7", "x=7", Verdict.CORRECT),
        (r"\text{Thursday}", r"\text{Friday}", Verdict.WRONG),
        (r"[0,1)", r"[0,1]", Verdict.WRONG),
        ("", "7", Verdict.GOLD_UNPARSABLE),
        ("$ $", "7", Verdict.GOLD_UNPARSABLE),
    ],
)
def test_mathematical_equality(verifier: Verifier, gold: str, answer: str, verdict: Verdict) -> None:
    assert verifier.verify([(gold, box(answer))]) == [verdict]


@pytest.mark.parametrize("form", ["any", "integer"])
def test_integers_are_compared_without_a_child_process(form: AnswerForm) -> None:
    golds = [str(value) for value in range(-5000, 5000)]
    texts = [f"1+2=3 3+4=7 {box(str(abs(value)))}" for value in range(-5000, 5000)]
    with Verifier(answer_form=form) as made:
        verdicts = made.verify_rollouts(golds, texts, [True] * len(golds))
        assert made._pool._workers == []
    assert verdicts == [Verdict.WRONG] * 5000 + [Verdict.CORRECT] * 5000


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Pairs that math-verify was asked for, in order."""
    pairs: list[tuple[str, str]] = []
    compare = verifier_pool.WorkerPool.compare

    def spy(self: verifier_pool.WorkerPool, new: Sequence[tuple[str, str]]) -> list[Verdict]:
        pairs.extend(new)
        return compare(self, new)

    monkeypatch.setattr(verifier_pool.WorkerPool, "compare", spy)
    return pairs


def test_order_is_kept_and_equal_pairs_are_asked_once(asked: list[tuple[str, str]]) -> None:
    pairs = [("1/2", box("0.5")), ("3", box("3")), ("1/2", box("2/3")), ("x", "none")] * 20
    correct, wrong = Verdict.CORRECT, Verdict.WRONG
    with Verifier(workers=2, timeout_s=10.0) as made:
        assert made.verify(pairs) == [correct, correct, wrong, Verdict.NO_ANSWER] * 20
        assert made.verify(pairs[:4]) == [correct, correct, wrong, Verdict.NO_ANSWER]
    assert asked == [("1/2", "0.5"), ("1/2", "2/3")]


def test_golds_that_do_not_verify_themselves_are_reported(verifier: Verifier) -> None:
    golds = ["7", r"\frac{1}{2}", "", r"\frac{1}{2", "$x$", "}{", r"\text{Monday}"]
    assert verifier.check_golds(golds) == [2, 3, 5]
    with Verifier(answer_form="integer") as strict:
        assert strict.check_golds(["7", "1/2", "-0012"]) == [1]


@pytest.mark.parametrize("gold", [r"\frac{1}{2", "}{", r"5} \boxed{7", "1/2\\"])
def test_a_gold_that_was_cut_off_makes_nothing_correct(verifier: Verifier, gold: str) -> None:
    answers = ["1/2", r"\frac{1}{2}", "5", "7", gold]
    verdicts = verifier.verify([(gold, box(answer)) for answer in answers])
    assert set(verdicts) <= {Verdict.GOLD_UNPARSABLE, Verdict.NO_ANSWER}


def test_braces_of_a_set_do_not_make_a_gold_unusable(verifier: Verifier) -> None:
    assert verifier.verify([(r"\{1, 2\}", box(r"\{2, 1\}")), (r"\boxed{1/2}", box("0.5"))]) == [Verdict.CORRECT] * 2


# --- hostile answers ------------------------------------------------------------------------------------------

NEVER = r"9^{9^{9^{9^{9}}}}"  # keeps math-verify busy for ever


def test_an_answer_that_never_ends_costs_only_itself_and_only_once(asked: list[tuple[str, str]]) -> None:
    answers = ["0.5", NEVER, "2/4", "1/3"]
    pairs = [("1/2", box(answer)) for answer in answers]
    expected = [Verdict.CORRECT, Verdict.TIMEOUT, Verdict.CORRECT, Verdict.WRONG]
    with Verifier(timeout_s=1.0) as made:
        assert made.verify(pairs) == expected
        assert made.verify(pairs * 50) == expected * 50
    assert asked == [("1/2", answer) for answer in answers]


@pytest.mark.parametrize(
    "answer",
    [
        "9**9**9**9",
        "\0\0\0",
        "\ud800",
        "٣٤ ½ ∞ 🤖 \u202e",
        "__import__('os').system('touch MARK')",
        "$__import__('os').system('touch MARK')$",
        "[x for x in ().__class__.__base__.__subclasses__()]",
        "open('MARK','w')",
        r"\text{" * 40 + "}" * 40,
        "\n" * 3000,
        "%" * 3000,
        "1" * LONGEST + "/1",
        "x" * 10**6,
        "0" * 10**6 + "x",
        '"] \n["7", "7"]',
        '"correct"',
    ],
    ids=range(16),
)
def test_odd_answers_are_merely_wrong(verifier: Verifier, answer: str, tmp_path: Path) -> None:
    mark = tmp_path / "MARK"
    answer = answer.replace("MARK", str(mark))
    verdicts = verifier.verify([("1/2", box("0.5")), ("17/3", box(answer)), ("1/2", box("1/3"))])
    assert verdicts[0] is Verdict.CORRECT
    assert verdicts[1] in (Verdict.WRONG, Verdict.TIMEOUT, Verdict.NO_ANSWER)
    assert verdicts[2] is Verdict.WRONG
    assert not mark.exists()


@pytest.mark.parametrize(
    "text",
    [
        "a" * 10**6,
        "\\boxed{" * 10**5,
        "\\boxed" * 10**5,
        "\\boxed{" + "{" * 10**6,
        "\\boxed" + " " * 10**6,
        "\\" * 10**6,
        "\\boxed{" + "0" * 10**6 + "x}",
        "\\boxed{1}" * 10**5 + "\\boxed{",
    ],
    ids=range(8),
)
def test_megabytes_are_read(text: str) -> None:
    with Verifier(answer_form="integer") as strict:
        assert strict.verify([("7", text)])[0] in (Verdict.NO_ANSWER, Verdict.WRONG)
        assert strict.verify([("7", text + box("7"))])[0] is Verdict.CORRECT or "{{{" in text


def test_deep_nesting_ends(verifier: Verifier) -> None:
    deep = ["{" * 500 + "2" + "}" * 500, "(" * 300 + "x" + ")" * 300, r"\frac{1}{" * 100 + "3" + "}" * 100]
    with Verifier(timeout_s=0.5) as made:
        verdicts = made.verify([("1/2", box(answer)) for answer in deep])
    assert Verdict.CORRECT not in verdicts


# --- the child processes --------------------------------------------------------------------------------------


def child(made: Verifier) -> Any:
    return made._pool._workers[0]._process


def test_a_child_that_dies_costs_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = verifier_pool._Worker.ask

    def ask_then_die(self: verifier_pool._Worker, gold: str, answer: str) -> None:
        ask(self, gold, answer)
        if answer == NEVER:
            self._process.send_signal(signal.SIGSEGV)

    monkeypatch.setattr(verifier_pool._Worker, "ask", ask_then_die)
    with Verifier(timeout_s=20.0) as made:
        verdicts = made.verify([("1/2", box(NEVER)), ("1/2", box("0.5"))])
    assert verdicts == [Verdict.ERROR, Verdict.CORRECT]


def test_a_child_killed_while_idle_costs_nothing() -> None:
    with Verifier(timeout_s=10.0) as made:
        assert made.verify([("1/2", box("0.5"))]) == [Verdict.CORRECT]
        child(made).kill()
        child(made).wait()
        assert made.verify([("1/2", box("2/4"))]) == [Verdict.CORRECT]


def test_a_child_that_stops_reading_costs_one_answer() -> None:
    wide, control = "🤖" * LONGEST, "\1" * LONGEST
    with Verifier(timeout_s=2.0) as made:
        for text in (wide, control):
            made.verify([("1/2", box("0.5"))])
            assert made.verify([("x", box("x"))]) == [Verdict.CORRECT]
            child(made).send_signal(signal.SIGSTOP)
            verdicts = made.verify([(text, box(text)), ("1/2", box("2/4"))])
            made._known.clear()
            assert verdicts == [Verdict.TIMEOUT, Verdict.CORRECT]


def test_the_memory_of_a_child_is_limited() -> None:
    with Verifier(timeout_s=3.0, memory_mb=400) as made:
        huge, fine = made.verify([("1/2", box(r"10^{10^{10}}")), ("1/2", box("0.5"))])
        limits = Path(f"/proc/{child(made).pid}/limits")
        text = limits.read_text() if limits.exists() else f"Max address space {400 << 20}"
    assert huge not in (Verdict.CORRECT, Verdict.NO_ANSWER)
    assert fine is Verdict.CORRECT
    assert str(400 << 20) in next(line for line in text.splitlines() if line.startswith("Max address space"))


def test_children_end_with_the_context() -> None:
    with Verifier(timeout_s=10.0) as made:
        made.verify([("1/2", box("0.5"))])
        process = child(made)
        assert process.poll() is None
    assert process.poll() is not None
    with made:
        assert made.verify([("1/2", box("2/4"))]) == [Verdict.CORRECT]


def test_a_machine_that_cannot_run_math_verify_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with Verifier(memory_mb=24) as made, pytest.raises(InputError, match="does not start"):
        made.verify([("1/2", box("0.5"))])
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Verifier() as made, pytest.raises(InputError, match="does not start"):
        made.verify([("1/2", box("0.5"))])


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"timeout_s": 0.0}, {"memory_mb": -1}, {"answer_form": "float"}])
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Verifier(**wrong)


# --- real cases -----------------------------------------------------------------------------------------------

# Sources whose labels follow the boxed answer, and the least share of cases on which we must agree.
AGREEMENT = {
    "qwen25_math_cot_100": 1.0,
    "math500_reference_solution": 1.0,
    "math500_reference_crosspaired": 1.0,
    "minerva_reference_solution": 1.0,
    "mario_eval_tests": 0.7,  # its labels accept rounded decimals
    "hardverify_math": 0.7,  # chosen because rule-based verifiers reject right answers
}


@pytest.mark.skipif(DATA is None, reason="ROLLOUTBENCH_DATA does not name a data folder")
def test_agreement_with_labelled_cases(record_property: Callable[[str, object], None]) -> None:
    with (Path(DATA or "") / "verifier_cases.jsonl").open(encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["source"] in AGREEMENT]
    rows = [row for place, row in enumerate(rows) if place % 4 == 0]
    texts = [row["prediction"] if row["prediction_kind"] == "response" else box(row["prediction"]) for row in rows]
    with Verifier(timeout_s=10.0) as made:
        verdicts = made.verify([(row["gold"], text) for row, text in zip(rows, texts, strict=True)])
    total: Counter[str] = Counter(row["source"] for row in rows)
    agreed: Counter[str] = Counter()
    accepted: dict[str, list[str]] = defaultdict(list)
    for row, verdict in zip(rows, verdicts, strict=True):
        agreed[row["source"]] += (verdict is Verdict.CORRECT) == bool(row["label"])
        if verdict is Verdict.CORRECT and not row["label"]:
            accepted[row["source"]].append(row["id"])
    shares = {source: agreed[source] / total[source] for source in total}
    record_property("agreement", shares)
    assert {source: share for source, share in shares.items() if share < AGREEMENT[source]} == {}
    assert sum(map(len, accepted.values())) <= 1, accepted


@pytest.mark.skipif(DATA is None, reason="ROLLOUTBENCH_DATA does not name a data folder")
def test_integer_shortcut_agrees_with_math_verify_on_real_cases() -> None:
    with (Path(DATA or "") / "verifier_cases.jsonl").open(encoding="utf-8") as file:
        rows = list(map(json.loads, file))
    pairs = [(row["gold"], last_boxed(row["prediction"]) or row["prediction"]) for row in rows]
    pairs = [(g, a) for g, a in dict.fromkeys(pairs) if integer(bare(g)) and integer(bare(a))]
    assert len(pairs) > 100
    with Verifier(answer_form="integer") as strict:
        exact = [v is Verdict.CORRECT for v in strict.verify([(g, f"\\boxed{{{a}}}") for g, a in pairs])]
    assert [pair for pair, same in zip(pairs, exact, strict=True) if same != math_verify(*pair)] == []
