"""The executable specification: what every kernel of this package must compute, in plain PyTorch.

The whole package uses these names (docs/math.md derives the formulas):

| symbol          | shape      | meaning                                                                      |
|-----------------|------------|------------------------------------------------------------------------------|
| T, D, V, S, G   |            | tokens (packed), hidden size, vocabulary, sequences (responses), groups       |
| hidden          | (..., D)   | last hidden states, the input of the LM head                                 |
| weight, bias    | (V, D), (V,) | the LM head                                                                |
| low_rank        | (..., R), (V, R) | adds low_rank[0] @ low_rank[1].T to hidden @ weight.T: LoRA on the head        |
| targets         | (...)      | the token id each row predicts; `ignore_index` rows give 0 and no gradient   |
| logits          | (..., V)   | never stored outside this file                                               |
| lse             | (...)      | log-sum-exp of a row's logits; float64 within the package, so that a common  |
|                 |            | offset of the logits costs no digit of exp(logits - lse)                     |
| token_logps     | (...)      | log-probability of the target: logits[target] - lse                          |
| cu_seqlens      | (S+1,)     | sequence s owns tokens cu_seqlens[s] : cu_seqlens[s+1]                       |
| seq_logps       | (S,)       | sums of token_logps by sequence                                              |
| cu_groups       | (G+1,)     | group g owns sequences cu_groups[g] : cu_groups[g+1]                         |
| d_<name>        | as <name>  | the gradient of the loss in <name>                                           |

    product = hidden @ weight.T + low_rank[0] @ low_rank[1].T
    logits  = cap(logit_scale * (product + bias)) / temperature,   cap(x) = softcap * tanh(x / softcap)

All functions work on whole rows, are differentiable, and hold the (T, V) logits: the tests compare every kernel with
them. lm_head/torch_blocks.py, which `impl="reference"` runs, has the same maths with a bounded workspace and gradients
in closed form. Arithmetic is float32, or float64 for float64 inputs. Nothing here is fast.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadOptions:
    """What turns hidden @ weight.T into a log-probability, and the memory that this may take.

    logit_scale multiplies the logits (Cohere; Granite divides: pass 1 / logits_scaling). softcap bounds them (Gemma 2:
    30). temperature divides them last. workspace_bytes bounds all temporaries beyond gradients and one float32 (T, D)
    buffer.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    ignore_index: int = -100
    workspace_bytes: int = 2**28

    def as_tuple(self) -> tuple[float, float | None, float, int, int]:
        """The fields in the order of the ops' schemas. `dataclasses.astuple` copies them, which torch.compile of torch
        2.11 cannot read."""
        return self.logit_scale, self.softcap, self.temperature, self.ignore_index, self.workspace_bytes


class Head(NamedTuple):
    """The tensors of an LM head, in the order of the ops' schemas. What a head lacks is an empty tensor (`head_of`)."""

    hidden: Tensor  # (..., D)
    weight: Tensor  # (V, D)
    bias: Tensor  # (V,), or (0,) without one
    low_rank_hidden: Tensor  # (..., R), R = 0 without a low-rank segment
    low_rank_weight: Tensor  # (V, R)


def head_of(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None = None,  # (V,)
    low_rank_hidden: Tensor | None = None,  # (..., R)
    low_rank_weight: Tensor | None = None,  # (V, R)
) -> Head:
    return Head(
        hidden,
        weight,
        hidden.new_empty(0) if bias is None else bias,
        hidden.new_empty((*hidden.shape[:-1], 0)) if low_rank_hidden is None else low_rank_hidden,
        weight.new_empty((weight.shape[0], 0)) if low_rank_weight is None else low_rank_weight,
    )


class LogpStats(NamedTuple):
    """Per-row results, each with the shape of `targets`, or None where not asked for. Rows with `ignore_index` hold 0
    (False).
    """

    token_logps: Tensor
    lse: Tensor | None = None
    entropy: Tensor | None = None  # entropy of softmax(logits), in nats
    mean_logits: Tensor | None = None  # mean over the vocabulary
    log_sum_sq_probs: Tensor | None = None  # log sum_v p_v^2
    is_top1: Tensor | None = None  # bool: the target is the arg max, the lowest id among ties


class Needs(NamedTuple):
    """Which fields of HeadGradients are needed, in their order. What a head lacks is never needed."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    low_rank_hidden: bool = False
    low_rank_weight: bool = False
    mass: bool = False


class RowGradients(NamedTuple):
    """What d_logits of each row is made of: d_target at the target, p_v (d_softmax - d_entropy log p_v) elsewhere."""

    d_target: Tensor  # (...)
    d_softmax: Tensor  # (...)
    d_entropy: Tensor | None = None  # (...), or None: nothing depends on the entropy

    def map(self, f: Callable[[Tensor], Tensor]) -> RowGradients:
        d_entropy = None if self.d_entropy is None else f(self.d_entropy)
        return RowGradients(f(self.d_target), f(self.d_softmax), d_entropy)


class HeadGradients(NamedTuple):
    """Gradients in the head's inputs, and the mass that tells how exact the given lse is; None where not needed."""

    d_hidden: Tensor | None
    d_weight: Tensor | None
    d_bias: Tensor | None
    d_low_rank_hidden: Tensor | None
    d_low_rank_weight: Tensor | None
    mass: Tensor | None = None  # (...) sum_v exp(logits - lse): 1 if the lse is exact; 0 in ignored rows


TAIL_SAMPLES = 8  # entries that a row draws from what is neither target nor candidate; csrc/cpu/tail.h says why 8


class Candidates(NamedTuple):
    """What a backward over few vocabulary entries a row needs of the forward. All fields are by row, and float32
    (float64 for float64 inputs) unless stated otherwise.
    """

    lse: Tensor  # (...) float64
    non_target_probs: Tensor  # (...) 1 - p_y, summed over the others: nothing cancels where p_y is near 1
    target_slopes: Tensor  # (...) c_y, the cap's slope at the target; 1 without a cap
    dropped: Tensor  # (...) at least the sum of p_v over the entries that are neither target nor candidate
    ids: Tensor  # (..., capacity) int32: the candidates, then 0; with a sampled tail TAIL_SAMPLES more columns
    weights: Tensor  # as ids: p_v c_v of each candidate, then 0; tail / TAIL_SAMPLES c_v of each drawn entry

    def row_gradients(self, d_token_logps: Tensor, d_lse: Tensor) -> RowGradients:  # (...), (...)
        """As of the function `row_gradients`, from non_target_probs."""
        d_target = d_token_logps * self.non_target_probs + d_lse * (1 - self.non_target_probs)
        return RowGradients(d_target, d_lse - d_token_logps)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def logits(
    hidden: Tensor,  # (..., D) any floating dtype
    weight: Tensor,  # (V, D)
    bias: Tensor | None = None,  # (V,)
    low_rank: tuple[Tensor, Tensor] | None = None,  # (..., R), (V, R)
    options: HeadOptions = HeadOptions(),
) -> Tensor:  # (..., V) float32 | float64
    """The logits. Inputs are widened first, so that the GEMM hidden @ weight.T is as exact as float32 allows."""
    dtype = accumulator(hidden.dtype)
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
    """All per-row results from the whole logits; token_logps, lse and entropy are differentiable by autograd."""
    live = targets != options.ignore_index
    # `where` removes ignored rows before every GEMM and reduction, so that a NaN in such a row reaches neither result
    # nor gradient (0 * NaN would, in d_weight).
    hidden = torch.where(live.unsqueeze(-1), hidden, 0)
    if low_rank is not None:
        low_rank = (torch.where(live.unsqueeze(-1), low_rank[0], 0), low_rank[1])
    z = torch.where(live.unsqueeze(-1), logits(hidden, weight, bias, low_rank, options), 0)
    logps = torch.log_softmax(z, -1)  # subtracts the row's maximum: a common offset cancels before it rounds
    token_logps = logps.gather(-1, torch.where(live, targets, 0).unsqueeze(-1).long()).squeeze(-1)
    p = torch.exp(logps)
    # p = 0 adds 0 to the entropy and to its gradient, also where the logit is -inf.
    entropy = -(p * torch.where(p == 0, 0, logps)).sum(-1)
    with torch.no_grad():
        rest = (z.mean(-1), torch.logsumexp(2 * logps, -1))
        is_top1 = (z.argmax(-1) == targets) & live
    values = (torch.where(live, x, 0) for x in (token_logps, torch.logsumexp(z, -1), entropy, *rest))
    return LogpStats._make([*values, is_top1])


def log_probs(
    logits: Tensor,  # (..., n) or (...)
    lse: Tensor,  # (..., 1) or (...) float64
) -> Tensor:  # as logits
    """logits - lse. The lse is subtracted as two numbers of the logits' dtype, since its rounding error would be common
    to all entries of a row. NaN where the lse is infinite, as in torch.log_softmax.
    """
    high = lse.to(logits.dtype)
    return (logits - high) - (lse - high).to(logits.dtype)


LEAST_LOG_PROB = -1e4  # of this and less p is 0 in every dtype; 0 times this is 0, 0 times -inf is no number


def known_softmax(
    lse: Tensor,  # (...) float64
    rows: RowGradients,
) -> tuple[Tensor, RowGradients, Tensor]:  # (...), ..., (...) in the dtype of d_softmax
    """(high, rows, factor) for p_v = exp(y_v) factor, with y_v = logits_v - high: d_logits is exp(y_v) (d_softmax -
    d_entropy y_v) off the target. A backward needs p with the digits of log_probs, and the coefficients of a row take
    what it needs, so that no entry of (T, V) pays for the second part of lse. The factor lies between 1 / V and V.
    """
    d_target, d_softmax, d_entropy = rows
    high = lse.to(d_softmax.dtype)
    owed = high - lse
    factor = torch.exp(owed).to(d_softmax.dtype)
    if d_entropy is None:
        return high, RowGradients(d_target, d_softmax * factor), factor
    d_softmax = (d_softmax - d_entropy * owed).to(d_softmax.dtype)
    return high, RowGradients(d_target, d_softmax * factor, d_entropy * factor), factor


def row_gradients(
    token_logps: Tensor,  # (...)
    d_token_logps: Tensor,  # (...)
    d_lse: Tensor,  # (...)
    entropy: Tensor | None = None,  # (...), as is the next
    d_entropy: Tensor | None = None,
) -> RowGradients:
    """d_logits of each row from the gradients of its results: d entropy / d logits_v = -p_v (log p_v + entropy).

    The non-target probability 1 - p_y comes from the log-probability. As g - g p_y, with p_y rebuilt from an lse in
    float32, it would lose its digits where p_y is near 1 (at lse = 65 and p_y = 0.999 three are left).
    """
    p = torch.exp(token_logps)
    d_target, d_softmax = d_lse * p - d_token_logps * torch.expm1(token_logps), d_lse - d_token_logps
    if entropy is None or d_entropy is None:
        return RowGradients(d_target, d_softmax)
    d_target = d_target - d_entropy * torch.where(p == 0, 0, p * (token_logps + entropy))
    return RowGradients(d_target, d_softmax - d_entropy * entropy, d_entropy)


def linear_logps(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (...) integer
    bias: Tensor | None = None,  # (V,)
    low_rank: tuple[Tensor, Tensor] | None = None,  # (..., R), (V, R)
    options: HeadOptions = HeadOptions(),
) -> Tensor:  # (...) float32 | float64
    """Log-probability of each target."""
    return linear_logp_stats(hidden, weight, targets, bias, low_rank, options).token_logps


def seq_logps(
    token_logps: Tensor,  # (T,) floating
    cu_seqlens: Tensor,  # (S+1,) integer
) -> Tensor:  # (S,)
    """Sum of token_logps by sequence, with one Python slice for each sequence."""
    bounds = cu_seqlens.tolist()
    sums = [token_logps[start:end].sum() for start, end in itertools.pairwise(bounds)]
    return torch.stack(sums) if sums else token_logps.new_zeros(0)
