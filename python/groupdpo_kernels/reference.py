"""The specification, executable: what every kernel of this package must compute, in plain PyTorch.

The vocabulary of the whole package (docs/math.md derives the formulas):

| symbol          | shape      | meaning                                                                      |
|-----------------|------------|------------------------------------------------------------------------------|
| T, D, V, S, G   |            | tokens (packed), hidden size, vocabulary, sequences (responses), groups       |
| hidden          | (..., D)   | last hidden states, the input of the LM head                                 |
| weight, bias    | (V, D), (V,) | the LM head                                                                |
| low_rank        | (..., R), (V, R) | a second segment of the product, low_rank[0] @ low_rank[1].T: LoRA on the head |
| targets         | (...)      | the token id each row predicts; `ignore_index` rows give 0 and no gradient   |
| logits          | (..., V)   | never stored outside this file                                               |
| lse             | (...)      | log-sum-exp of a row's logits                                                |
| token_logps     | (...)      | log-probability of the target: logits[target] - lse                          |
| cu_seqlens      | (S+1,)     | sequence s owns tokens cu_seqlens[s] : cu_seqlens[s+1]                       |
| seq_logps       | (S,)       | sums of token_logps by sequence                                              |
| cu_groups       | (G+1,)     | group g owns sequences cu_groups[g] : cu_groups[g+1]                         |
| d_<name>        | as <name>  | the gradient of the loss in <name>                                           |

    product = hidden @ weight.T + low_rank[0] @ low_rank[1].T
    logits  = cap(logit_scale * (product + bias)) / temperature,   cap(x) = softcap * tanh(x / softcap)

The functions over whole rows (`logits`, `linear_logps`, `linear_logp_stats`, `seq_logps`) are differentiable and hold
the (T, V) logits: they are the specification, and the oracle of the tests. `forward_in_blocks` and `backward_in_blocks`
are the same maths with a bounded workspace and a closed-form gradient: they are what `impl="reference"` runs.
Everything past the inputs is float32, or float64 for float64 inputs. Nothing here is fast.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadOptions:
    """What lies between the head's product and a log-probability, and the memory the work may take.

    logit_scale multiplies the logits (Cohere; Granite divides: pass 1 / logits_scaling). softcap bounds them (Gemma 2:
    30). temperature divides them last. workspace_bytes bounds all temporaries beyond gradients and one float32 (T, D)
    buffer.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    ignore_index: int = -100
    workspace_bytes: int = 2**28


class LogpStats(NamedTuple):
    """Per-row results, each of the shape of `targets`; None where not asked for. Rows with `ignore_index` hold 0
    (False).
    """

    token_logps: Tensor
    lse: Tensor | None = None
    entropy: Tensor | None = None  # of softmax(logits), in nats
    mean_logits: Tensor | None = None  # over the vocabulary
    log_sum_sq_probs: Tensor | None = None  # log sum_v p_v^2
    is_top1: Tensor | None = None  # bool: the target is the arg max, the lowest id among ties


class HeadGradients(NamedTuple):
    """Gradients of the head's inputs, and what the backward sees of the lse it was given; None where not needed."""

    d_hidden: Tensor | None
    d_weight: Tensor | None
    d_bias: Tensor | None
    d_low_rank_hidden: Tensor | None
    d_low_rank_weight: Tensor | None
    mass: Tensor | None = None  # (...) sum_v exp(logits - lse): 1 if lse is that of these logits; 0 in ignored rows


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def logits(
    hidden: Tensor,  # (..., D) any floating dtype
    weight: Tensor,  # (V, D)
    bias: Tensor | None = None,  # (V,)
    low_rank: tuple[Tensor, Tensor] | None = None,  # (..., R), (V, R)
    options: HeadOptions = HeadOptions(),
) -> Tensor:  # (..., V) float32 | float64
    """The logits as the model means them: inputs are widened first, so the product is as exact as float32 allows."""
    dtype = _accumulator(hidden.dtype)
    product = hidden.to(dtype) @ weight.to(dtype).T
    if low_rank is not None:
        product = product + low_rank[0].to(dtype) @ low_rank[1].to(dtype).T
    if bias is not None:
        product = product + bias.to(dtype)
    z = options.logit_scale * product
    if options.softcap is not None:
        z = options.softcap * torch.tanh(z / options.softcap)
    return z / options.temperature


def linear_logp_stats(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (...) integer
    bias: Tensor | None = None,  # (V,)
    low_rank: tuple[Tensor, Tensor] | None = None,  # (..., R), (V, R)
    options: HeadOptions = HeadOptions(),
) -> LogpStats:
    """All per-row results from materialised logits; token_logps and lse are differentiable by autograd."""
    live = targets != options.ignore_index
    # Ignored rows leave through `where` before every product and reduction, so that a NaN in such a row reaches neither
    # result nor gradient (0 * NaN would, in d_weight).
    hidden = torch.where(live.unsqueeze(-1), hidden, 0)
    if low_rank is not None:
        low_rank = (torch.where(live.unsqueeze(-1), low_rank[0], 0), low_rank[1])
    z = torch.where(live.unsqueeze(-1), logits(hidden, weight, bias, low_rank, options), 0)
    lse = torch.logsumexp(z, -1)
    target_logits = z.gather(-1, torch.where(live, targets, 0).unsqueeze(-1).long()).squeeze(-1)
    with torch.no_grad():
        p = torch.exp(z - lse.unsqueeze(-1))
        # p = 0 contributes 0 to the entropy, also where the logit is -inf.
        expected_logit = torch.where(p == 0, 0, p * z).sum(-1)
        rest = (
            lse - expected_logit,
            z.mean(-1),
            torch.logsumexp(2 * z, -1) - 2 * lse,
        )
        is_top1 = (z.argmax(-1) == targets) & live
    values = (torch.where(live, x, 0) for x in (target_logits - lse, lse, *rest))
    return LogpStats._make([*values, is_top1])


def linear_logps(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (...) integer
    bias: Tensor | None = None,  # (V,)
    low_rank: tuple[Tensor, Tensor] | None = None,  # (..., R), (V, R)
    options: HeadOptions = HeadOptions(),
) -> Tensor:  # (...) float32 | float64
    """Log-probability of each target: the one vector that everything stands on."""
    return linear_logp_stats(hidden, weight, targets, bias, low_rank, options).token_logps


def seq_logps(
    token_logps: Tensor,  # (T,) floating
    cu_seqlens: Tensor,  # (S+1,) integer
) -> Tensor:  # (S,)
    """Sum of token_logps by sequence, one Python slice a sequence."""
    bounds = cu_seqlens.tolist()
    sums = [token_logps[start:end].sum() for start, end in itertools.pairwise(bounds)]
    return torch.stack(sums) if sums else token_logps.new_zeros(0)


# ------------------------------------------------------------------------------------------------------------------- in
# blocks


def block_shape(
    T: int,
    D: int,
    V: int,
    workspace_bytes: int,
    itemsize: int,
) -> tuple[int, int]:
    """(token rows, vocabulary columns) of one block. Half of the budget is for widened hidden, the other for eight
    blocks of logits and for the widened slice of the weight and its gradient: of all these the loops hold the last
    round's while they make the next. A block has at least 16 x 16 entries, whatever the budget.
    """
    budget = workspace_bytes // itemsize
    rows = max(16, min(T, 1024, budget // (4 * max(D, 64) + 128)))
    columns = max(16, min(V, (budget - 2 * rows * D) // (4 * D + 8 * rows)))
    return rows, columns


def _spans(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _block_logits(
    hidden: Tensor,  # (t, D), already widened, like all that follow
    weight: Tensor,  # (v, D)
    bias: Tensor | None,  # (v,)
    low_rank_hidden: Tensor | None,  # (t, R)
    low_rank_weight: Tensor | None,  # (v, R)
    options: HeadOptions,
) -> tuple[Tensor, Tensor | None]:
    """One block of logits and, under softcap, the derivative of the cap."""
    z = hidden @ weight.T
    if low_rank_hidden is not None and low_rank_weight is not None:
        z.addmm_(low_rank_hidden, low_rank_weight.T)
    if bias is not None:
        z += bias
    return _to_logits(z, options)


def _to_logits(z: Tensor, options: HeadOptions) -> tuple[Tensor, Tensor | None]:
    """The product, in place, to logits; and, under softcap, the derivative of the cap."""
    z *= options.logit_scale
    d_cap = None
    if options.softcap is not None:
        z.div_(options.softcap).tanh_()
        d_cap = 1 - z * z
        z *= options.softcap
    return z.div_(options.temperature), d_cap


def forward_in_blocks(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    low_rank_hidden: Tensor | None,  # (T, R)
    low_rank_weight: Tensor | None,  # (V, R)
    targets: Tensor,  # (T,) int64, all valid
    options: HeadOptions,
) -> LogpStats:
    """All per-row results by online log-sum-exp over vocabulary blocks. 2 T D V FLOP; workspace within the budget."""
    dtype = _accumulator(hidden.dtype)
    (T, D), V = hidden.shape, weight.shape[0]
    R = 0 if low_rank_weight is None else low_rank_weight.shape[1]
    rows, columns = block_shape(T, D + R, V, options.workspace_bytes, dtype.itemsize)
    new = hidden.new_zeros
    results = [new(T, dtype=dtype) for _ in range(5)] + [new(T, dtype=torch.bool)]
    for t in _spans(T, rows):
        h, y = hidden[t].to(dtype), targets[t]
        x = None if low_rank_hidden is None else low_rank_hidden[t].to(dtype)
        n = h.shape[0]
        top = new(n, dtype=dtype).fill_(-math.inf)
        top_id = new(n, dtype=torch.long)
        total, weighted, squares, plain, target_logits = (new(n, dtype=dtype) for _ in range(5))
        for v in _spans(V, columns):
            b = None if bias is None else bias[v].to(dtype)
            u = None if low_rank_weight is None else low_rank_weight[v].to(dtype)
            z, _ = _block_logits(h, weight[v].to(dtype), b, x, u, options)
            inside = (y >= v.start) & (y < v.stop)
            target_logits += torch.where(inside, z.gather(1, (y - v.start).clamp(0, z.shape[1] - 1)[:, None])[:, 0], 0)
            plain += z.sum(1)
            block_top, block_id = z.max(1)
            # Strictly greater: among ties the first block, and in a block the first id, stays. NaN stays too.
            top_id = torch.where(block_top > top, _first_argmax(z, block_top, block_id) + v.start, top_id)
            new_top = torch.maximum(top, block_top)
            # A row of -inf so far must not give exp(-inf + inf).
            shift = torch.where(new_top == -math.inf, 0, new_top)
            rescale = torch.exp(top - shift)
            e = torch.exp(z - shift[:, None])
            total = total * rescale + e.sum(1)
            squares = squares * rescale * rescale + (e * e).sum(1)
            weighted = weighted * rescale + torch.where(e == 0, 0, e * z).sum(1)
            top = new_top
        shift = torch.where(top == -math.inf, 0, top)
        lse = shift + total.log()
        values = (
            target_logits - lse,
            lse,
            lse - weighted / total,
            plain / V,
            squares.log() - 2 * total.log(),
            top_id == y,
        )
        for out, value in zip(results, values):
            out[t] = value
    return LogpStats(*results)


def _first_argmax(z: Tensor, top: Tensor, index: Tensor) -> Tensor:
    """`Tensor.max` may return any index among ties; the lowest is wanted."""
    ties = z == top[:, None]
    return torch.where(ties.any(1), ties.to(torch.int8).argmax(1), index)


def backward_in_blocks(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    low_rank_hidden: Tensor | None,  # (T, R)
    low_rank_weight: Tensor | None,  # (V, R)
    targets: Tensor,  # (T,) int64, all valid
    lse: Tensor,  # (T,) float32 | float64, from the forward
    d_token_logps: Tensor,  # (T,)
    d_lse: Tensor,  # (T,)
    options: HeadOptions,
    needs: tuple[bool, ...],  # which of HeadGradients
) -> HeadGradients:
    """The needed gradients from logits rebuilt block by block: 2 T D V FLOP and as many again for each of d_hidden and
    d_weight.

    Vocabulary blocks outside: a block of d_weight is accumulated over all rows and rounded once; d_hidden is
    accumulated in one float32 (T, D) buffer.
    """
    dtype = _accumulator(hidden.dtype)
    (T, D), V = hidden.shape, weight.shape[0]
    R = 0 if low_rank_weight is None else low_rank_weight.shape[1]
    rows, columns = block_shape(T, D + R, V, options.workspace_bytes, dtype.itemsize)
    inputs = (hidden, weight, bias, low_rank_hidden, low_rank_weight)
    # By row (indices 0 and 3) gradients are accumulated over the whole loop; by vocabulary (1, 2, 4) a block at a time.
    out: list[Tensor | None] = [None] * 5
    mass = hidden.new_zeros(T, dtype=dtype) if needs[5] else None
    for i, needed in enumerate(needs[:5]):
        if needed:
            source = inputs[i]
            assert source is not None  # needs comes from autograd: an absent input needs nothing
            out[i] = torch.zeros(source.shape, dtype=dtype if i in (0, 3) else source.dtype, device=source.device)
    for v in _spans(V, columns):
        w = weight[v].to(dtype)
        b = None if bias is None else bias[v].to(dtype)
        u = None if low_rank_weight is None else low_rank_weight[v].to(dtype)
        shapes = {1: w.shape, 2: w.shape[:1], 4: None if u is None else u.shape}
        block = {i: w.new_zeros(shape) for i, shape in shapes.items() if needs[i] and shape is not None}
        for t in _spans(T, rows):
            h = hidden[t].to(dtype)
            x = None if low_rank_hidden is None else low_rank_hidden[t].to(dtype)
            z, d_cap = _block_logits(h, w, b, x, u, options)
            p = torch.exp(z.sub_(lse[t, None]))
            if mass is not None:
                mass[t] += p.sum(1)
            d_raw = p.mul_((d_lse - d_token_logps)[t, None])
            local = targets[t] - v.start
            r = ((local >= 0) & (local < w.shape[0])).nonzero()[:, 0]
            d_raw[r, local[r]] += d_token_logps[t][r]
            if d_cap is not None:
                d_raw *= d_cap
            d_raw *= options.logit_scale / options.temperature
            if (d_hidden := out[0]) is not None:
                d_hidden[t].addmm_(d_raw, w)
            if (d_x := out[3]) is not None and u is not None:
                d_x[t].addmm_(d_raw, u)
            if 1 in block:
                block[1].addmm_(d_raw.T, h)
            if 2 in block:
                block[2] += d_raw.sum(0)
            if 4 in block and x is not None:
                block[4].addmm_(d_raw.T, x)
        for i, gradient in block.items():
            target = out[i]
            assert target is not None
            target[v] = gradient.to(target.dtype)
    for i in (0, 3):
        if (gradient_out := out[i]) is not None:
            out[i] = gradient_out.to(hidden.dtype)
    return HeadGradients._make([*out, mass])


def target_logits(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    low_rank_hidden: Tensor | None,  # (T, R)
    low_rank_weight: Tensor | None,  # (V, R)
    targets: Tensor,  # (T,) int64, all valid
    options: HeadOptions,
) -> Tensor:  # (T,) float32 | float64
    """logits[t, targets[t]] alone, in blocks of rows: 2 T D FLOP. With a known lse, all that token_logps need."""
    dtype = _accumulator(hidden.dtype)
    T, D = hidden.shape
    R = 0 if low_rank_weight is None else low_rank_weight.shape[1]
    out = hidden.new_empty(T, dtype=dtype)
    for t in _spans(T, max(16, options.workspace_bytes // (4 * (D + R) * dtype.itemsize))):
        y = targets[t]
        z = (hidden[t].to(dtype) * weight[y].to(dtype)).sum(1)
        if low_rank_hidden is not None and low_rank_weight is not None:
            z += (low_rank_hidden[t].to(dtype) * low_rank_weight[y].to(dtype)).sum(1)
        if bias is not None:
            z += bias[y].to(dtype)
        out[t] = _to_logits(z, options)[0]
    return out
