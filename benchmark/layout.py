"""Index tensors of a packed batch: which flat token sits where in the padded attention tiles.

Linear layers run on packed tokens: first the tokens of every prompt once, then the tokens of every rollout. Only
attention needs rectangles; rollouts are sorted by length into tiles so that little of a rectangle is padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmark.rollouts import Rollouts, starts


@dataclass(frozen=True)
class Tile:
    """One attention rectangle: B rows, Q query and S key positions.

    Attributes:
        query: (B * Q,) packed token of each query slot (padding points at token 0).
        key: (B * S,) packed token of each key slot.
        bias: (B, 1, Q, S) additive mask, 0 or -inf.
        inverse: (tokens of this tile,) slot in (B * Q) of each packed token this tile answers for, packed order.
        rows, queries, keys: B, Q, S.
    """

    query: Tensor
    key: Tensor
    bias: Tensor
    inverse: Tensor
    rows: int
    queries: int
    keys: int


@dataclass(frozen=True)
class Layout:
    """A packed batch of M tokens.

    Attributes:
        tokens, positions: (M,) ids and positions of the inputs. A rollout's last token predicts nothing: left out.
        tiles: attention rectangles; together they answer for every packed token once.
        order: (M,) position of each packed token in the concatenation of the tiles' answers.
        source: (T,) packed token whose hidden state predicts each generated token.
        longest: largest position plus one.
    """

    tokens: Tensor
    positions: Tensor
    tiles: tuple[Tile, ...]
    order: Tensor
    source: Tensor
    longest: int


def _slots(length: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(B, width) column numbers, and whether each is inside the row."""
    column = torch.arange(width, device=length.device).expand(len(length), width)
    return column, column < length[:, None]


def _prompt_tile(length: Tensor, begin: Tensor) -> Tile:
    width = int(length.max())
    column, inside = _slots(length, width)
    index = torch.where(inside, begin[:, None] + column, 0)
    causal = torch.ones(width, width, dtype=torch.bool, device=length.device).tril()
    # A padding query sees only itself, so that its softmax stays finite; nothing reads its result.
    seen = causal[None] & (inside[:, None, :] | torch.eye(width, dtype=torch.bool, device=length.device)[None])
    bias = torch.zeros(seen.shape, device=length.device).masked_fill_(~seen, float("-inf"))
    return Tile(
        index.flatten(),
        index.flatten(),
        bias[:, None],
        torch.nonzero(inside.flatten()).flatten(),
        len(length),
        width,
        width,
    )


def _rollout_tile(prompt_length: Tensor, prompt_begin: Tensor, length: Tensor, begin: Tensor) -> Tile:
    """Rows are rollouts; keys are the row's prompt followed by the rollout's own tokens."""
    prompt_width, width = int(prompt_length.max()), int(length.max())
    prompt_column, in_prompt = _slots(prompt_length, prompt_width)
    column, inside = _slots(length, width)
    prompt_index = torch.where(in_prompt, prompt_begin[:, None] + prompt_column, 0)
    index = torch.where(inside, begin[:, None] + column, 0)
    rows, device = len(length), length.device
    causal = torch.ones(width, width, dtype=torch.bool, device=device).tril().expand(rows, width, width)
    seen = torch.cat([in_prompt[:, None, :].expand(rows, width, prompt_width), causal], dim=-1)
    bias = torch.zeros(seen.shape, device=device).masked_fill_(~seen, float("-inf"))
    return Tile(
        index.flatten(),
        torch.cat([prompt_index, index], dim=1).flatten(),
        bias[:, None],
        torch.nonzero(inside.flatten()).flatten(),
        rows,
        width,
        prompt_width + width,
    )


def prompt_layout(tokens: Tensor, length: Tensor) -> Layout:
    """Prompts alone, for the prefill. `source` is each prompt's last token, (P,)."""
    begin = starts(length)
    positions = torch.arange(len(tokens), device=tokens.device) - torch.repeat_interleave(begin, length)
    order = torch.arange(len(tokens), device=tokens.device)
    return Layout(tokens, positions, (_prompt_tile(length, begin),), order, begin + length - 1, int(length.max()))


def layout(batch: Rollouts, tile_rows: int) -> Layout:
    """Pack prompts (once each) and rollouts; `tile_rows` rollouts of similar length share an attention rectangle."""
    device = batch.tokens.device
    inputs = batch.length - 1
    total_prompt = len(batch.prompt_tokens)
    prompt_begin, token_begin = starts(batch.prompt_length), starts(batch.length)
    last = torch.zeros(len(batch.tokens), dtype=torch.bool, device=device)
    last[token_begin + inputs] = True
    row = torch.repeat_interleave(torch.arange(len(batch), device=device), inputs)
    begin = total_prompt + starts(inputs)
    offset = torch.arange(len(row), device=device) - (begin - total_prompt)[row]
    prompt_positions = torch.arange(total_prompt, device=device) - torch.repeat_interleave(
        prompt_begin, batch.prompt_length
    )
    prompt_of_row = batch.prompt
    positions = torch.cat([prompt_positions, batch.prompt_length[prompt_of_row][row] + offset])

    tiles = [_prompt_tile(batch.prompt_length, prompt_begin)]
    answered = [torch.arange(total_prompt, device=device)]
    by_length = torch.argsort(inputs, stable=True)
    by_length = by_length[inputs[by_length] > 0]
    for rows in torch.split(by_length, tile_rows) if len(by_length) else ():
        owner = prompt_of_row[rows]
        tile = _rollout_tile(batch.prompt_length[owner], prompt_begin[owner], inputs[rows], begin[rows])
        tiles.append(tile)
        answered.append(tile.query[tile.inverse])
    order = torch.empty(total_prompt + len(row), dtype=torch.int64, device=device)
    order[torch.cat(answered)] = torch.arange(len(order), device=device)

    source = torch.empty(len(batch.tokens), dtype=torch.int64, device=device)
    first = torch.zeros_like(last)
    first[token_begin] = True
    source[first] = (prompt_begin + batch.prompt_length - 1)[prompt_of_row]
    source[~first] = torch.arange(total_prompt, total_prompt + len(row), device=device)
    tokens = torch.cat([batch.prompt_tokens, batch.tokens[~last]])
    longest = int((batch.prompt_length[prompt_of_row] + batch.length).max())
    return Layout(tokens, positions, tuple(tiles), order, source, longest)
