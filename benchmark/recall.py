"""A correct rollout of every prompt, kept for methods that put it into a later group without one (`Method.recalls`).

A recalled rollout was drawn, charged and remembered when it was new. Put into a group it costs a forward pass, since
its ratio starts from the policy that trains, and the passes of the update. It counts neither as drawn nor in the
history.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from benchmark.draws import Draw
from benchmark.groups import segment_sum
from benchmark.rollouts import Rollouts, merge, starts
from benchmark.verdict import Verdict, reward

NAMES = ("recall/prompts", "recall/lengths", "recall/tokens")


@dataclass
class Recall:
    """The newest correct rollout of each prompt.

    Attributes:
        kept: generated token ids by position in the pool.
    """

    kept: dict[int, Tensor] = field(default_factory=dict)

    def remember(self, draw: Draw) -> None:
        """Keep the first correct rollout of every prompt of `draw` that has one."""
        rollouts, begin = draw.rollouts, starts(draw.rollouts.length).tolist()
        lengths, found = rollouts.length.tolist(), set[int]()
        for row, prompt in enumerate(rollouts.prompt.tolist()):
            if draw.verdicts[row] is Verdict.CORRECT and prompt not in found:
                found.add(prompt)
                self.kept[draw.prompts[prompt]] = rollouts.tokens[begin[row] : begin[row] + lengths[row]].cpu()

    def missing(self, rollouts: Rollouts, verdicts: Sequence[Verdict], prompts: Sequence[int]) -> Rollouts | None:
        """The kept rollouts of those `prompts` whose group is there and all wrong; ``None`` if there is none.

        Log-probabilities are left at 0: the caller scores them.
        """
        right = torch.tensor([reward(v) for v in verdicts], device=rollouts.prompt.device)
        drawn = segment_sum(torch.ones_like(right), rollouts.prompt, rollouts.prompts)
        wrong = (drawn > 0) & (segment_sum(right, rollouts.prompt, rollouts.prompts) == 0)
        chosen = [place for place in torch.nonzero(wrong).flatten().tolist() if prompts[place] in self.kept]
        if not chosen:
            return None
        device, texts = rollouts.tokens.device, [self.kept[prompts[place]] for place in chosen]
        tokens = torch.cat(texts).to(device)
        return replace(
            rollouts,
            prompt=torch.tensor(chosen, dtype=torch.int64, device=device),
            tokens=tokens,
            length=torch.tensor([len(text) for text in texts], dtype=torch.int64, device=device),
            log_prob=torch.zeros(len(tokens), device=device),
            finished=torch.ones(len(texts), dtype=torch.bool, device=device),
        )

    def state(self) -> dict[str, Tensor]:
        """What is kept, for a checkpoint."""
        if not self.kept:
            return {}
        prompts, texts = torch.tensor(list(self.kept)), list(self.kept.values())
        lengths = torch.tensor([len(text) for text in texts])
        return dict(zip(NAMES, (prompts, lengths, torch.cat(texts)), strict=True))

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`, in which there may be other tensors."""
        if NAMES[0] in state:
            prompts, lengths, tokens = (state[name] for name in NAMES)
            self.kept = dict(zip(prompts.tolist(), torch.split(tokens, lengths.tolist()), strict=True))


def joined(rollouts: Rollouts, verdicts: Sequence[Verdict], recalled: Rollouts) -> tuple[Rollouts, list[Verdict]]:
    """`rollouts` with the correct ones that are `recalled`, behind those of the same prompt; their verdicts."""
    both, order = merge(rollouts, recalled)
    known = [*verdicts, *([Verdict.CORRECT] * len(recalled))]
    return both, [known[row] for row in order.tolist()]
