"""The child process of `benchmark.verifier_pool`: reads [gold, answer] lines, writes one verdict line each.

Run as a script, it imports nothing of this package, so that it starts fast and holds no more than it needs.

math-verify hands some plain expressions to sympy's parser, which ends in `eval`. Its patterns let only numbers and
operators through; should one ever fail, the child can still not start programs, open connections, or write files.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from typing import Any, TextIO


def compare(gold: str, answer: str) -> str:
    r"""Name of the verdict; both sides are wrapped in ``\boxed{}``.

    Without it math-verify misreads every fifth gold of MATH500 and half of Minerva's.
    """
    from math_verify import parse, verify

    gold_parsed = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
    if not gold_parsed:
        return "gold_unparsable"
    answer_parsed = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    return "correct" if verify(gold_parsed, answer_parsed, timeout_seconds=None) else "wrong"


FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.", "socket.", "pty.", "ctypes.dlopen")
CHANGES = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.kill",
)


def _confine() -> None:
    """From here on the process can compute and answer, and nothing else."""
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # by the kernel: no byte into any file; pipes are none

    def guard(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if writes or event.startswith(FORBIDDEN + CHANGES):
            raise PermissionError(f"an answer tried {event}")

    sys.addaudithook(guard)


def _replies(memory_mb: int, alarm_s: float, replies: TextIO) -> None:
    def reply(value: Any) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    try:
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        compare("\\frac{1}{2}", "0.5")  # imports and builds the grammar before any answer's time runs
    except Exception as error:
        reply(f"{type(error).__name__}: {error}")
        return
    _confine()
    reply("ready")
    # The parent kills a child that is late. The alarm, whose default action ends the process, is for a child whose
    # parent is gone.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in sys.stdin.buffer:
        gold, answer = json.loads(line.decode("utf-8", "surrogatepass"))
        signal.setitimer(signal.ITIMER_REAL, alarm_s)
        try:
            verdict = compare(gold, answer)
        except MemoryError:
            verdict = "memory"  # what caches hold by now is anyone's guess: the parent replaces this process
        except Exception:
            verdict = "error"
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(verdict)


def main() -> None:
    """Serve until the input ends; arguments: memory limit in MiB, seconds after which a pair ends the process."""
    logging.disable(logging.CRITICAL)
    # Replies go to a copy of the output, so that nothing a library prints can be taken for one.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _replies(int(sys.argv[1]), float(sys.argv[2]), replies)


if __name__ == "__main__":
    main()
