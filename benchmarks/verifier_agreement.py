"""Agreement of the verifier with labelled cases, by their source.

    python benchmarks/verifier_agreement.py CASES.jsonl

CASES (or the environment variable ``ROLLOUTBENCH_VERIFIER_CASES``) is a JSONL file of ``source``, ``gold``,
``prediction``, ``prediction_kind`` (``answer`` and ``text`` are put into a box, ``response`` is a whole completion) and
``label`` (1 or 0). A completion without a box that ends in a line ``A: answer``, as GSM8K's do, gets that answer boxed;
anything else counts as it stands. Disagreements go to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

from benchmark.verdict import Verdict
from benchmark.verifier import Verifier, bare


def main() -> None:
    """Print a Markdown table: cases, agreement, right answers refused, wrong ones accepted, golds unusable."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = os.environ.get("ROLLOUTBENCH_VERIFIER_CASES")
    parser.add_argument("cases", nargs="?" if default else None, default=default, type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds for an answer")
    arguments = parser.parse_args()
    with Path(arguments.cases).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = [completion(row["prediction"], row["prediction_kind"]) for row in rows]
    with Verifier(workers=arguments.workers, timeout_s=arguments.timeout) as verifier:
        verdicts = verifier.verify([(row["gold"], text) for row, text in zip(rows, texts, strict=True)])
    counts: dict[str, Counter[str]] = {}
    for row, verdict in zip(rows, verdicts, strict=True):
        count = counts.setdefault(row["source"], Counter())
        right = verdict is Verdict.CORRECT
        count.update({"cases": 1, "agree": right == bool(row["label"]), "refused": row["label"] and not right})
        count.update({"accepted": right and not row["label"], "gold": verdict is Verdict.GOLD_UNPARSABLE})
        if right != bool(row["label"]):
            print(json.dumps({"id": row.get("id"), "label": row["label"], "verdict": verdict}), file=sys.stderr)
    print("| source | cases | agree | right refused | wrong accepted | gold unusable |")
    print("| :-- | --: | --: | --: | --: | --: |")
    for source, count in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        share = f"{count['agree']} ({100 * count['agree'] / count['cases']:.1f} %)"
        print(f"| {source} | {count['cases']} | {share} | {count['refused']} | {count['accepted']} | {count['gold']} |")


def completion(prediction: str, kind: str) -> str:
    """What the verifier is to read."""
    if kind == "response":
        last = re.search(r"^A:\s*(.+?)\s*\Z", prediction, re.MULTILINE)
        if last is None or "\\boxed" in prediction:
            return prediction
        prediction = last[1]
    return f"\\boxed{{{bare(prediction)}}}"


if __name__ == "__main__":
    main()
