"""Token log-probabilities to scores, AdaDPO's balance, group softmax weights, the loss and its gradient: two launches
forward, one backward, whatever S and G.

The first kernel sums each sequence in float64, in a fixed order; the second holds whole groups in registers (BLOCK_G
groups x BLOCK_S responses), computes the loss of each and the closed-form dL/ds_i, and the last program to finish takes
the mean over groups in a fixed order: the same bits every time. An integer ticket decides who is last; no
floating-point atomics. The backward writes d_loss * dL/ds_i to the tokens of each sequence. Never reads a value back to
the host: offsets that are wrong, groups with an empty side and a reference that is not finite give NaN, and nothing is
read or written out of bounds. Cost: O(T + S), for all_pairs O(T + S max_group). Gradients: docs/math.md, section 3.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .pair_losses import PAIRWISE, pair_loss
from .tile import FLOAT64_EPS, exp_minus_one, log1mexp, log_add_exp, neg_log_sigmoid, sigmoid

LOSSES = (*PAIRWISE, "margin", "mpo", "all_pairs", "softmax", "plackett_luce")
MAX_GROUP = 1024


@triton.jit
def segment_sums_kernel(
    token_logps_ptr,  # (T,) float32
    ref_ptr,  # (S,) or (T,) float32 | float64, or None
    cu_seqlens_ptr,  # (S+1,) int32 | int64
    sums_ptr,  # (S,) float64 out: s
    ref_sums_ptr,  # (S,) float64 out: r
    seq_logps_ptr,  # (S,) float32 out: s
    rewards_ptr,  # (S,) float32 out: NaN, until the second kernel knows better; so are the next two
    balance_weights_ptr,
    coefficients_ptr,
    ticket_ptr,  # (1,) int32 out: 0
    T,
    REF_TOKENS: tl.constexpr,
    REF_SEQUENCES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    seq = tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + seq).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + seq + 1).to(tl.int64)
    valid = (start >= 0) & (end <= T) & (start < end)
    stop = tl.where(valid, end, start)
    total = tl.zeros((BLOCK,), tl.float64)
    ref_total = tl.zeros((BLOCK,), tl.float64)
    for t0 in range(start, stop, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        total += tl.load(token_logps_ptr + t, mask=t < stop, other=0.0).to(tl.float64)
        if REF_TOKENS:
            ref_total += tl.load(ref_ptr + t, mask=t < stop, other=0.0).to(tl.float64)
    s = tl.sum(total, 0)
    r = tl.sum(ref_total, 0)
    if REF_SEQUENCES:
        r = tl.load(ref_ptr + seq).to(tl.float64)
    # Only the reference must be finite: a policy that is not is shown as it is.
    finite = r - r == 0.0
    tl.store(sums_ptr + seq, tl.where(valid, s, float("nan")))
    tl.store(ref_sums_ptr + seq, tl.where(finite, r, float("nan")))
    tl.store(seq_logps_ptr + seq, tl.where(valid, s, float("nan")).to(tl.float32))
    tl.store(rewards_ptr + seq, float("nan"))
    tl.store(balance_weights_ptr + seq, float("nan"))
    tl.store(coefficients_ptr + seq, float("nan"))
    if seq == 0:
        tl.store(ticket_ptr, 0)


@triton.jit
def preference_weights_fwd_kernel(
    sums_ptr,  # (S,) float64
    ref_sums_ptr,  # (S,) float64
    cu_seqlens_ptr,  # (S+1,) int32 | int64
    cu_groups_ptr,  # (G+1,) int32 | int64
    positive_ptr,  # (S,) bool
    loss_ptr,  # () float32 out
    rewards_ptr,  # (S,) float32 out: scores u
    balance_weights_ptr,  # (S,) float32 out: w
    coefficients_ptr,  # (S,) float32 out: d loss / d s
    group_losses_ptr,  # (G,) float32 out
    ticket_ptr,  # (1,) int32
    T,
    S,
    G,
    beta: tl.float64,  # said, for Triton takes a Python float for a float32
    nll_weight: tl.float64,
    label_smoothing: tl.float64,
    gamma: tl.float64,
    alpha: tl.float64,
    tau: tl.float64,
    log_ceiling: tl.float64,
    LOSS: tl.constexpr,
    AVERAGE: tl.constexpr,
    SUBTRACT: tl.constexpr,
    BALANCE: tl.constexpr,
    BALANCE_REFERENCE: tl.constexpr,
    BALANCE_NORMALIZE: tl.constexpr,
    PAIRWISE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_MEAN: tl.constexpr,
):
    g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    k = tl.arange(0, BLOCK_S)[None, :]
    start = tl.load(cu_groups_ptr + g, mask=g < G, other=0).to(tl.int64)
    end = tl.load(cu_groups_ptr + g + 1, mask=g < G, other=0).to(tl.int64)
    size = end - start
    covered = (tl.load(cu_groups_ptr) == 0) & (tl.load(cu_groups_ptr + G) == S)
    covered = covered & (tl.load(cu_seqlens_ptr) == 0) & (tl.load(cu_seqlens_ptr + S) == T)
    readable = (start >= 0) & (end <= S) & (size >= 0) & (size <= BLOCK_S)
    inside = readable[:, None] & (k < size[:, None])
    i = start[:, None] + k

    s = tl.load(sums_ptr + i, mask=inside, other=0.0)
    r = tl.load(ref_sums_ptr + i, mask=inside, other=0.0)
    n = tl.load(cu_seqlens_ptr + i + 1, mask=inside, other=1) - tl.load(cu_seqlens_ptr + i, mask=inside, other=0)
    n = n.to(tl.float64)
    pos = inside & (tl.load(positive_ptr + i, mask=inside, other=0) != 0)
    neg = inside & (pos == 0)
    P = tl.sum(pos.to(tl.float64), 1)
    N = tl.sum(neg.to(tl.float64), 1)
    valid = covered & readable & (P > 0) & (N > 0)
    if PAIRWISE:
        valid = valid & (size == 2)

    # All of it in float64: sums of a million tokens differ in their last float32 digits, a softmax of large scores
    # loses as many, and S is small.
    m = s / n
    delta = s
    if SUBTRACT:
        delta = s - r
    d_u = tl.zeros((BLOCK_G, BLOCK_S), tl.float64) + beta  # d u / d s
    if AVERAGE:
        d_u = beta / n
    u = delta * d_u
    tl.store(rewards_ptr + i, u.to(tl.float32), mask=inside)

    # AdaDPO: w on positives, a constant for the gradient.
    w = tl.full((BLOCK_G, BLOCK_S), 1.0, tl.float64)
    b = tl.zeros((BLOCK_G, BLOCK_S), tl.float64)
    if BALANCE:
        b = s
        if BALANCE_REFERENCE:
            b = s - r
        if BALANCE_NORMALIZE:
            b = b / n
        if LOSS == "orpo":
            b += log1mexp(m)
        if LOSS != "all_pairs":
            mean_b = tl.sum(tl.where(neg, b, 0.0), 1) / N
            w = tl.where(pos, balance_weight(b - mean_b[:, None], log_ceiling), 1.0)
    v = w * u

    # Each loss: one number a group, and a = d loss / d v times w, so that d loss / d s = a d_u.
    a = tl.zeros((BLOCK_G, BLOCK_S), tl.float64)
    losses = tl.zeros((BLOCK_G,), tl.float64)
    if PAIRWISE:
        if LOSS == "orpo":
            v = w * (m - log1mexp(m))
            # d (m - log(1 - e^m)) / d m; closer to 0 than one unit of precision the second term is constant.
            d_u = tl.where(m > -FLOAT64_EPS, 1.0, -1.0 / exp_minus_one(m)) / n
        losses, d_w, d_l = pair_loss(
            tl.sum(tl.where(pos, v, 0.0), 1),
            tl.sum(tl.where(neg, v, 0.0), 1),
            tl.sum(tl.where(pos, n, 0.0), 1) - tl.sum(tl.where(neg, n, 0.0), 1),
            beta, label_smoothing, gamma, alpha, tau, LOSS,
        )  # fmt: skip
        a = tl.where(pos, w * d_w[:, None], d_l[:, None])
    elif LOSS == "margin":
        x = tl.sum(tl.where(pos, v, 0.0), 1) / P - tl.sum(tl.where(neg, v, 0.0), 1) / N
        losses = neg_log_sigmoid(x)
        a = sigmoid(-x)[:, None] * tl.where(pos, -w / P[:, None], 1.0 / N[:, None])
    elif LOSS == "mpo":
        lse_p = row_lse(v, pos)
        lse_n = row_lse(v, neg)
        losses = neg_log_sigmoid(lse_p - lse_n)
        # softmax_all - softmax_P = -softmax_P * (mass on N), and softmax_all on N = softmax_N * (mass on N): no
        # cancellation.
        mass_n = sigmoid(lse_n - lse_p)[:, None]
        a = mass_n * tl.where(pos, -w * tl.exp(v - lse_p[:, None]), tl.exp(v - lse_n[:, None]))
    elif LOSS == "softmax":
        lse_n = row_lse(v, neg)
        x = v - lse_n[:, None]
        losses = tl.sum(tl.where(pos, neg_log_sigmoid(x), 0.0), 1) / P
        mass_n = tl.where(pos, sigmoid(-x), 0.0)
        shared = (tl.sum(mass_n, 1) / P)[:, None]
        a = tl.where(pos, -w * mass_n / P[:, None], shared * tl.exp(v - lse_n[:, None]))
    elif LOSS == "plackett_luce":
        last_pos = tl.max(tl.where(pos, k, -1), 1)
        valid = valid & (last_pos < tl.min(tl.where(neg, k, BLOCK_S), 1))
        suffix = tl.associative_scan(tl.where(inside, v, -float("inf")), 1, log_add_exp, reverse=True)
        losses = tl.sum(tl.where(inside, suffix - v, 0.0), 1)
        # d loss / d u_i = sum over k <= i of exp(u_i - suffix_k), minus 1.
        prefix = tl.associative_scan(tl.where(inside, -suffix, -float("inf")), 1, log_add_exp)
        a = tl.exp(v + prefix) - 1.0
    elif LOSS == "all_pairs":
        total = tl.zeros((BLOCK_G, BLOCK_S), tl.float64)
        w = tl.zeros((BLOCK_G, BLOCK_S), tl.float64)
        for j in range(tl.max(tl.where(readable, size, 0))):
            column = k == j
            pair = pos & (tl.max((neg & column).to(tl.int32), 1) > 0)[:, None]
            u_j = tl.sum(tl.where(column, u, 0.0), 1)[:, None]
            w_ij = tl.full((BLOCK_G, BLOCK_S), 1.0, tl.float64)
            if BALANCE:
                b_j = tl.sum(tl.where(column, b, 0.0), 1)[:, None]
                w_ij = balance_weight(b - b_j, log_ceiling)
            x = w_ij * u - u_j
            mass = tl.where(pair, sigmoid(-x), 0.0)
            total += tl.where(pair, neg_log_sigmoid(x), 0.0)
            w += tl.where(pair, w_ij, 0.0)
            a += tl.where(column, tl.sum(mass, 1)[:, None], 0.0) - w_ij * mass
        losses = tl.sum(total, 1) / (P * N)
        a = a / (P * N)[:, None]
        w = tl.where(pos, w / N[:, None], 1.0)

    nll = nll_weight
    if LOSS == "orpo":
        nll = nll_weight + 1.0  # part of the loss
    losses += tl.where(nll == 0, 0.0, nll * tl.sum(tl.where(pos, -m, 0.0), 1) / P)  # 0 times infinity would be NaN
    d_s = a * d_u - tl.where(pos, nll / (n * P[:, None]), 0.0)
    losses = tl.where(valid, losses, float("nan"))
    # Where the loss is NaN, so is all of its gradient.
    d_s = tl.where((losses == losses)[:, None], d_s / G, float("nan"))
    tl.store(coefficients_ptr + i, d_s.to(tl.float32), mask=inside)
    tl.store(balance_weights_ptr + i, w.to(tl.float32), mask=inside)
    tl.store(group_losses_ptr + g, losses.to(tl.float32), mask=g < G)

    # All stores of this program come before its ticket; the last ticket sees those of all programs.
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        mean = tl.zeros((BLOCK_MEAN,), tl.float64)
        for g0 in range(0, G, BLOCK_MEAN):
            at_g = g0 + tl.arange(0, BLOCK_MEAN)
            mean += tl.load(group_losses_ptr + at_g, mask=at_g < G, other=0.0, cache_modifier=".cg").to(tl.float64)
        tl.store(loss_ptr, (tl.sum(mean, 0) / G).to(tl.float32))


@triton.jit
def balance_weight(log_w, log_ceiling):
    """min(exp(log_w), ceiling), clipped before exp; NaN stays."""
    return tl.exp(tl.where(log_w > log_ceiling, log_ceiling, log_w))


@triton.jit
def row_lse(x, mask):
    """Log-sum-exp over the masked entries of each row; NaN stays, -inf for none."""
    top = tl.max(tl.where(mask, x, -float("inf")), 1)
    shift = tl.where(top == -float("inf"), 0.0, top)
    return shift + tl.log(tl.sum(tl.where(mask, tl.exp(x - shift[:, None]), 0.0), 1))


@triton.jit
def preference_weights_bwd_kernel(
    d_loss_ptr,  # () float32
    coefficients_ptr,  # (S,) float32
    cu_seqlens_ptr,  # (S+1,) int32 | int64
    d_token_logps_ptr,  # (T,) float32 out
    T,
    S,
    BLOCK: tl.constexpr,
):
    seq = tl.program_id(0)
    d = tl.load(d_loss_ptr) * tl.load(coefficients_ptr + seq)
    start = tl.load(cu_seqlens_ptr + seq).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + seq + 1).to(tl.int64)
    # Offsets that do not cover all tokens have made every coefficient NaN; their ends are written too.
    start = tl.where(seq == 0, 0, tl.maximum(start, 0))
    end = tl.where(seq == S - 1, T, tl.minimum(end, T))
    for t0 in range(start, end, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        tl.store(d_token_logps_ptr + t, tl.zeros((BLOCK,), tl.float32) + d, mask=t < end)


def why_not(device: torch.device, dtype: torch.dtype, loss: object, max_group: int) -> list[str]:
    """Every reason why the kernels cannot compute a preference loss."""
    reasons = launch.device_why_not("token_logps", device)
    if loss not in LOSSES:
        reasons.append(f"loss {loss!r} is not in the kernel; it has {', '.join(LOSSES)}")
    if dtype == torch.float64:
        reasons.append("token_logps is float64: only the reference computes in float64")
    if max_group > MAX_GROUP:
        reasons.append(f"a group has {max_group} responses: the kernel holds up to {MAX_GROUP}")
    return reasons


@launch.on_its_device
def preference_weights_forward(
    token_logps: Tensor,  # (T,) float32
    ref_logps: Tensor | None,  # (S,) or (T,) float32 | float64
    cu_seqlens: Tensor,  # (S+1,) int32 | int64
    cu_groups: Tensor,  # (G+1,) int32 | int64
    positive: Tensor,  # (S,) bool
    loss: str,
    beta: float,
    average: bool,
    subtract_reference: bool,
    nll_weight: float,
    label_smoothing: float,
    gamma: float,
    alpha: float,
    tau: float,
    ceiling: float,  # 0: no balance
    balance_reference: bool,
    balance_normalize: bool,
    max_group: int,
) -> tuple[Tensor, ...]:
    """(loss (), seq_logps (S,), rewards (S,), group_losses (G,), balance_weights (S,), coefficients (S,)), float32. NaN
    where values are wrong.
    """
    T, S, G = token_logps.shape[0], positive.shape[0], cu_groups.shape[0] - 1
    cu_seqlens, cu_groups, positive = cu_seqlens.contiguous(), cu_groups.contiguous(), positive.contiguous()
    new = token_logps.new_empty
    out_loss, group_losses = new(()), new(G)
    seq_logps, rewards, balance_weights, coefficients = (new(S) for _ in range(4))
    sums, ref_sums = new((S,), dtype=torch.float64), new((S,), dtype=torch.float64)
    ticket = new((1,), dtype=torch.int32)
    ref_of_sequences = ref_logps is not None and ref_logps.shape[0] == S
    segment_sums_kernel[(S,)](
        token_logps.contiguous(), None if ref_logps is None else ref_logps.contiguous(), cu_seqlens, sums, ref_sums,
        seq_logps,
        rewards, balance_weights, coefficients, ticket, T,
        REF_TOKENS=ref_logps is not None and not ref_of_sequences, REF_SEQUENCES=ref_of_sequences, BLOCK=256,
        num_warps=1,
    )  # fmt: skip
    BLOCK_S = max(2, triton.next_power_of_2(max_group))
    BLOCK_G = max(1, (64 if loss == "all_pairs" else 128) // BLOCK_S)  # all_pairs holds most of each response
    pairwise = loss in PAIRWISE
    preference_weights_fwd_kernel[(triton.cdiv(G, BLOCK_G),)](
        sums, ref_sums, cu_seqlens, cu_groups, positive, out_loss, rewards, balance_weights, coefficients,
        group_losses, ticket, T, S, G,
        beta, nll_weight, label_smoothing, gamma, alpha, tau, math.log(ceiling or 1.0),
        LOSS=loss, AVERAGE=average, SUBTRACT=subtract_reference, BALANCE=ceiling > 0,
        BALANCE_REFERENCE=balance_reference,
        BALANCE_NORMALIZE=balance_normalize, PAIRWISE=pairwise, BLOCK_G=BLOCK_G, BLOCK_S=BLOCK_S, BLOCK_MEAN=1024,
        num_warps=4 if BLOCK_S >= 128 else 1,
    )  # fmt: skip
    return out_loss, seq_logps, rewards, group_losses, balance_weights, coefficients


@launch.on_its_device
def preference_weights_backward(
    d_loss: Tensor,  # () float32
    coefficients: Tensor,  # (S,) float32
    cu_seqlens: Tensor,  # (S+1,) int32 | int64
    T: int,
) -> Tensor:  # (T,) float32
    """d_token_logps: d_loss times the coefficient of each token's sequence."""
    d_token_logps = coefficients.new_empty(T)
    S = coefficients.shape[0]
    preference_weights_bwd_kernel[(S,)](
        d_loss, coefficients.contiguous(), cu_seqlens.contiguous(), d_token_logps, T, S, BLOCK=256, num_warps=1
    )
    return d_token_logps
