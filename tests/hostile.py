"""Completions that try to crash, stall, trick or take over whoever reads them; a seeded stream of any length."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

CODE = (
    "__import__('os').system('touch {mark}')",
    "open('{mark}','w').write('x')",
    "eval(compile('open(\"{mark}\",\"w\")','x','exec'))",
    "().__class__.__base__.__subclasses__()[100]",
    "(lambda: __import__('pathlib').Path('{mark}').touch())()",
    "exec('import socket')",
    "[c for c in ().__class__.__mro__]",
    "Symbol('x').subs('x', __import__('os').getcwd())",
    "N(__import__('subprocess').call(['touch','{mark}']))",
    r"\input{{/etc/passwd}}",
    r"\immediate\write18{{touch {mark}}}",
    "!!python/object/apply:os.system ['touch {mark}']",
    "{{{{7*7}}}}${{7*7}}<%= 7*7 %>",
    "f'{{__import__(\"os\")}}'",
    "%s%s%s%n",
)
UNICODE = (
    "\u202e",
    "\u0000",
    "\ufeff",
    "\ud800",
    "\udfff",
    "𝟟",
    "٣",
    "½",
    "∞",
    "🤖",
    "\u2028",
    "e\u0301" * 30,
    "\x1b[2J",
)


def boxed(text: str) -> str:
    return f"so \\boxed{{{text}}}"


def _tower(rng: random.Random, _: str) -> str:
    base, height = rng.choice(["9", "2", "x", "10", r"\pi", "99!"]), rng.randint(2, 60)
    up = rng.choice(["^", "**"])
    if up == "^":
        return boxed(base + ("^{" + base) * height + "}" * height)
    return boxed("**".join([base] * height))


def _giant(rng: random.Random, _: str) -> str:
    digits = rng.choice("19") * rng.choice([50, 500, 3000, 5000, 100_000])
    shape = rng.choice(
        ["{}", "{}/7", "{}!", "-{}", r"\frac{{1}}{{{}}}", "{}.5", r"\sqrt{{{}}}", "{}^{{99}}", "1e{}", "{}%"]
    )
    return boxed(shape.format(digits))


def _deep(rng: random.Random, _: str) -> str:
    depth = rng.choice([10, 60, 200, 800, 50_000])
    pairs = [
        ("{", "}"),
        ("(", ")"),
        (r"\frac{1}{", "}"),
        (r"\sqrt{", "}"),
        (r"\left(", r"\right)"),
        ("[", "]"),
        ("|", "|"),
    ]
    pairs += [(r"\boxed{", "}"), (r"\text{", "}"), ("x_{", "}"), (r"\int_{", "}"), (r"\begin{matrix}", r"\end{matrix}")]
    opening, closing = rng.choice(pairs)
    return boxed(opening * depth + "1" + closing * (depth if rng.random() < 0.7 else rng.randrange(depth)))


def _unbalanced(rng: random.Random, _: str) -> str:
    pieces = [
        "\\boxed{",
        "{",
        "}",
        r"\frac",
        r"\left(",
        r"\right]",
        "$",
        "$$",
        r"\[",
        r"\)",
        r"\sqrt[",
        "^",
        "_",
        "&",
        "\\\\",
    ]
    pieces += [r"\begin{cases}", r"\end{", "1", "x", r"\text", "=", ",", r"\\boxed{3}", "\\"]
    return "".join(rng.choices(pieces, k=rng.randint(1, 60)))


def _unicode(rng: random.Random, _: str) -> str:
    return boxed(
        "".join(rng.choice([*UNICODE, chr(rng.randrange(1, 0x10FFFF)), "1", "+"]) for _ in range(rng.randint(1, 40)))
    )


def _megabyte(rng: random.Random, _: str) -> str:
    unit = rng.choice(
        ["a", "\\boxed{", "\\", "{", "$", "1", " ", "\\boxed ", "é", "\n", r"\boxed{1}", "0.", "9,", "\0"]
    )
    filler = unit * (1_000_000 // len(unit))
    return rng.choice([filler, boxed(filler), filler + boxed("7"), boxed("7") + filler])


def _code(rng: random.Random, mark: str) -> str:
    attack = rng.choice(CODE).format(mark=mark)
    dress = [
        "{}",
        "${}$",
        r"\text{{{}}}",
        "1+{}",
        r"\frac{{{}}}{{2}}",
        "x={}",
        "{}\n",
        r"\mathrm{{{}}}",
        "{}^2",
        "[{}]",
    ]
    return rng.choice([boxed, str])(rng.choice(dress).format(attack))


def _regex(rng: random.Random, _: str) -> str:
    count = rng.choice([30, 300, 3000])
    unit = rng.choice(
        ["1,000", "1 ", " ", "\\ ", "-", "1.", "x=", "{,}", r"\,", ",", "=", r"\text{ }", "and ", "%", "1/", "a1", "!"]
    )
    return boxed(unit * count + rng.choice(["!", "x", "", "\\", "1", "%"]))


def _many(rng: random.Random, _: str) -> str:
    count = rng.choice([3, 50, 3000, 20_000])
    return " ".join(boxed(str(value)) for value in range(count)) + rng.choice(["", "\\boxed{", "\\boxed{}", "\\boxed"])


def _shopping(rng: random.Random, _: str) -> str:
    values = [str(rng.randint(-20, 20)) for _ in range(rng.randint(2, 30))]
    return boxed(rng.choice([", ", " or ", "; ", "=", r" \text{ or } ", r" \lor ", r"\quad ", " "]).join(values))


def _nonsense(rng: random.Random, _: str) -> str:
    words = [
        r"\int",
        r"\sum_{n=1}^{\infty}",
        r"\lim_{x\to0}",
        r"\prod",
        "n",
        "x",
        "^",
        "_",
        "{",
        "}",
        "!",
        r"\infty",
        "0",
        "7",
    ]
    words += [
        r"\begin{pmatrix}",
        r"\end{pmatrix}",
        "&",
        r"\\",
        r"\cup",
        r"\in",
        r"\mathbb{R}",
        r"\cdot",
        r"\pm",
        "|",
        r"\circ",
        "%",
    ]
    return boxed("".join(rng.choices(words, k=rng.randint(2, 50))))


KINDS: dict[str, Callable[[random.Random, str], str]] = {
    "towers of powers": _tower,
    "giant integers": _giant,
    "deep nesting": _deep,
    "unbalanced LaTeX": _unbalanced,
    "unicode and null bytes": _unicode,
    "megabyte strings": _megabyte,
    "code injection": _code,
    "catastrophic patterns": _regex,
    "thousands of boxes": _many,
    "answer shopping": _shopping,
    "LaTeX soup": _nonsense,
}
GOLDS = ("17/3", "7", r"\frac{1}{2}", "x^2+1", r"\{1,2\}", "(0,1)", r"\sqrt{2}", r"\text{odd}")


def completions(count: int, seed: int, mark: str) -> Iterator[tuple[str, str, str]]:
    """`count` triples (kind, gold, completion), the kinds in turn; code that runs would create the file `mark`."""
    rng = random.Random(seed)
    names = list(KINDS)
    for number in range(count):
        kind = names[number % len(names)]
        yield kind, rng.choice(GOLDS), KINDS[kind](rng, mark)
