"""Any causal LM of transformers: a decode loop on its own cache, and a scoring pass that keeps no logits.

Sampling uses the same streams as the native backend: one uniform per token of each rollout, so rollout j of a prompt at
a step is the same in every arm, and (up to rounding) in both backends.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmark import sharding
from benchmark.backend import Backend, Piece, Request, by_length, by_rollouts
from benchmark.config_model import BackendConfig
from benchmark.decode import COMPACT_BELOW, ended, sample
from benchmark.errors import InputError
from benchmark.policy import Policy
from benchmark.rollouts import Rollouts, concatenate, starts
from benchmark.scoring import TokenStatistics

PADDING = 1.15
"""A padded batch holds at most this many times its tokens."""
RESCALED = ("final_logit_softcapping", "logits_scaling", "logit_scale")


class TransformersBackend(Backend):
    """Left-padded decoding and length-sorted scoring; weights in float32, forward passes in ``config.dtype``."""

    def __init__(self, policy: Policy, config: BackendConfig) -> None:
        super().__init__(policy, config)
        self.exact = config.dtype == "float32"
        self.device = next(policy.model.parameters()).device
        head = policy.model.get_output_embeddings()
        settings = policy.model.config
        if head is None or getattr(head, "bias", None) is not None or any(getattr(settings, k, None) for k in RESCALED):
            raise InputError(
                "its head is more than one matrix, which the chunked scoring pass does not know",
                key="policy.path: model_type",
                value=settings.model_type,
                remedy="Use a model whose logits are hidden states times a matrix",
            )
        self.head, self.divided = head, sharding.divided(policy.model)

    def load_weights(self) -> None:
        """Nothing to do: the policy itself samples."""

    # -- sampling ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _generate(self, request: Request) -> Rollouts:
        """Prompts are decoded in the order given, at most ``rows_per_decode`` rollouts at a time."""
        uniforms, model = request.uniforms(self.device), self.policy.model
        ends = np.cumsum(request.counts)
        parts, first = [], 0
        model.eval()
        with self._precision(), _checkpointing_off(model):
            while first < len(request.prompts):
                base = int(ends[first] - request.counts[first])
                last = max(first + 1, int(np.searchsorted(ends, base + self.config.rows_per_decode, side="right")))
                rows = slice(base, int(ends[last - 1]))
                parts.append(
                    self._decode(request, request.prompts[first:last], request.counts[first:last], uniforms[rows])
                )
                first = last
        model.train()
        return concatenate(parts)

    def _decode(self, request: Request, prompts: list[Tensor], counts: Any, uniforms: Tensor) -> Rollouts:
        device, limit, rows = self.device, request.max_tokens, len(uniforms)
        prompt_length = torch.tensor([len(prompt) for prompt in prompts], device=device)
        owner = torch.repeat_interleave(torch.arange(len(prompts), device=device), torch.from_numpy(counts).to(device))
        tokens = torch.zeros(rows, limit, dtype=torch.int64, device=device)
        log_probs = torch.zeros(rows, limit, dtype=torch.float32, device=device)
        length = torch.full((rows,), limit, dtype=torch.int64, device=device)
        finished = torch.zeros(rows, dtype=torch.bool, device=device)
        row, done = torch.arange(rows, device=device), torch.zeros(rows, dtype=torch.bool, device=device)
        if rows:
            hidden, cache, mask = self._prefill(prompts, prompt_length)
            hidden, mask = hidden[owner], mask[owner]
            cache.batch_select_indices(owner)
        for step in range(limit if rows else 0):
            log_p = _log_softmax(hidden @ self.head.weight.to(hidden.dtype).t(), request.temperature)
            token = sample(log_p, uniforms[row, step])
            tokens[row, step] = token
            log_probs[row, step] = log_p.gather(1, token[:, None]).squeeze(1)
            last = ended(token, self.policy.ends) & ~done
            length[row[last]], finished[row[last]] = step + 1, True
            done |= last
            live = len(done) - int(done.sum())
            if live == 0 or step + 1 == limit:
                break
            if live <= COMPACT_BELOW * len(done):
                alive = torch.nonzero(~done).flatten()
                cache.batch_select_indices(alive)
                row, token, done, mask = row[alive], token[alive], done[alive], mask[alive]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            position = prompt_length[owner[row]] + step
            hidden = self._hidden(token[:, None], mask, position[:, None], cache)[:, -1]
        inside = torch.arange(limit, device=device) < length[:, None]
        flat = torch.cat(prompts)
        return Rollouts(flat, prompt_length, owner, tokens[inside], length, log_probs[inside], finished)

    @torch.no_grad()
    def rehearse(self, prompt: Tensor, max_tokens: int, temperature: float) -> None:
        """The step of decoding that takes the most memory: ``rows_per_decode`` rollouts at the last of `max_tokens`.

        Args:
            prompt: (L,) ids, L >= 1. max_tokens: >= 1. temperature: of the softmax.
        """
        rows, model = self.config.rows_per_decode, self.policy.model
        text = torch.cat([prompt, prompt[:1].expand(max_tokens - 1)])
        model.eval()
        with self.whole(), self._precision(), _checkpointing_off(model):
            _, cache, _ = self._prefill([text], torch.tensor([len(text)], device=self.device))
            cache.batch_select_indices(torch.zeros(rows, dtype=torch.int64, device=self.device))
            mask = torch.ones(rows, len(text) + 1, dtype=torch.int64, device=self.device)
            hidden = self._hidden(text[:1].expand(rows, 1), mask, torch.full_like(mask[:, :1], len(text)), cache)[:, -1]
            log_p = _log_softmax(hidden @ self.head.weight.to(hidden.dtype).t(), temperature)
            sample(log_p, log_p.new_zeros(rows))
        model.train()

    def _prefill(self, prompts: list[Tensor], prompt_length: Tensor) -> tuple[Tensor, Any, Tensor]:
        """Last hidden state (P, d), cache and attention mask (P, width) of left-padded prompts."""
        from transformers import DynamicCache

        width = int(prompt_length.max())
        column = torch.arange(width, device=self.device) - (width - prompt_length)[:, None]
        mask = column >= 0
        index = torch.where(mask, starts(prompt_length)[:, None] + column, 0)
        tokens = torch.where(mask, torch.cat(prompts)[index], 0)
        cache: Any = DynamicCache(config=self.policy.model.config.get_text_config())
        return self._hidden(tokens, mask.long(), column.clamp(min=0), cache)[:, -1], cache, mask.long()

    # -- scoring -------------------------------------------------------------------------------------------------

    def states(self, batch: Rollouts) -> tuple[Tensor, Tensor]:
        """See `Backend.states`."""
        with self._precision():
            # Divided weights are brought together for each pass, and all processes must make the same number of them.
            parts = _padded_batches(batch, math.inf if self.divided else PADDING)
            hidden, order = torch.cat([self._states(batch, rows) for rows in parts]), torch.cat(parts)
            lengths = batch.length[order]
            place = torch.empty_like(order)
            place[order] = torch.arange(len(order), device=order.device)
            begin = starts(lengths)[place]
            flat = torch.repeat_interleave(begin - starts(batch.length), batch.length)
            hidden = hidden[flat + torch.arange(len(batch.tokens), device=flat.device)]
        return hidden, self.head.weight.to(hidden.dtype)

    def score(self, batch: Rollouts, temperature: float) -> TokenStatistics:
        """See `Backend.score`."""
        seen = super().score(batch, temperature)
        if self.divided and not torch.is_grad_enabled():  # else the backward pass does
            self.policy.model.reshard()
        return seen

    def split(self, batch: Rollouts, parts: int = 1) -> list[Piece]:
        """See `Backend.split`."""
        cut = by_length if self.divided else by_rollouts
        return cut(batch, self.config.tokens_per_pass, parts)

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """See `Backend.whole`."""
        return sharding.gathered(self.policy.model)

    def _states(self, batch: Rollouts, rows: Tensor) -> Tensor:
        """Hidden states that predict the generated tokens of `rows`, one row after the other, (tokens, d)."""
        read, made = batch.prompt_length[batch.prompt[rows]], batch.length[rows]
        width = int((read + made).max())
        column = torch.arange(width, device=rows.device)[None, :]
        in_prompt, inside = column < read[:, None], column < (read + made)[:, None]
        from_prompt = starts(batch.prompt_length)[batch.prompt[rows], None] + column
        from_answer = starts(batch.length)[rows, None] + column - read[:, None]
        prompt = batch.prompt_tokens[torch.where(in_prompt, from_prompt, 0)]
        answer = batch.tokens[torch.where(inside & ~in_prompt, from_answer, 0)]
        # Padding comes last, where a causal model never looks from inside.
        hidden = self._hidden(torch.where(in_prompt, prompt, answer), None, None, None)
        predicts = (column >= read[:, None] - 1) & (column < (read + made)[:, None] - 1)
        states: Tensor = hidden[predicts]
        return states

    # -- the model -----------------------------------------------------------------------------------------------

    def _hidden(self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Any) -> Tensor:
        """Final hidden states (rows, columns, d) of the model without its head."""
        model = self.policy.model
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        inputs["use_cache"] = cache is not None
        if self.divided:
            states: Tensor = model.read(**inputs)
            return states
        core = (model.get_base_model() if hasattr(model, "peft_config") else model).base_model
        states = core(**inputs).last_hidden_state
        return states

    def _precision(self) -> contextlib.AbstractContextManager[None]:
        if self.config.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.float()
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def _padded_batches(batch: Rollouts, padding: float) -> list[Tensor]:
    """Rollouts sorted by length and cut so that no padded batch holds more than `padding` times its tokens."""
    total = batch.prompt_length[batch.prompt] + batch.length
    order = torch.argsort(total, descending=True, stable=True)
    parts, first, load = [], 0, 0
    sizes = total[order].tolist()
    for place, size in enumerate(sizes):
        if place > first and (place - first + 1) * sizes[first] > padding * (load + size):
            parts.append(order[first:place])
            first, load = place, 0
        load += size
    return [*parts, order[first:]]


@contextlib.contextmanager
def _checkpointing_off(model: Any) -> Any:
    """Decoding needs the cache that gradient checkpointing switches off."""
    if not getattr(model, "is_gradient_checkpointing", False):
        yield
        return
    model.gradient_checkpointing_disable()
    try:
        yield
    finally:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
