"""The pairwise losses and their derivatives in closed form, on tiles of pairs: pure maths, the second form of the
formulas in preference/losses.py. No loads and no stores. Formulas: docs/math.md, section 3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import neg_log_sigmoid, sigmoid

PAIRWISE = (
    "sigmoid", "hinge", "ipo", "rdpo", "simpo", "cpo", "orpo", "robust", "exo_pair", "discopop",
    "nca_pair", "apo_zero", "apo_down", "sppo_hard",
)  # fmt: skip


@triton.jit
def pair_loss(
    v_w,  # (K,) float64: score of the preferred response
    v_l,  # (K,) float64: score of the dispreferred one
    longer,  # (K,) float64: n_w - n_l
    beta,
    label_smoothing,
    gamma,
    alpha,
    tau,
    LOSS: tl.constexpr,
):
    """(loss, d loss / d v_w, d loss / d v_l), each (K,) float64. NaN stays in the loss."""
    x = v_w - v_l
    zero = tl.zeros_like(x)
    e = zero + label_smoothing
    # The derivatives in x, and in the two sides apart.
    d_x, d_w, d_l = zero, zero, zero
    if LOSS == "sigmoid":
        losses = (1 - e) * neg_log_sigmoid(x) + tl.where(e == 0, 0.0, e * neg_log_sigmoid(-x))  # 0 times infinity: NaN
        d_x = e * sigmoid(x) - (1 - e) * sigmoid(-x)
    elif LOSS == "hinge":
        losses = tl.where(x == x, tl.maximum(1.0 - x, 0.0), x)
        d_x = tl.where(x < 1.0, -1.0, 0.0)
    elif LOSS == "ipo":
        losses = ((x - 0.5) / beta) * ((x - 0.5) / beta)
        d_x = 2.0 * (x - 0.5) / (beta * beta)
    elif LOSS == "orpo":
        losses = beta * neg_log_sigmoid(x)
        d_x = -beta * sigmoid(-x)
    elif LOSS == "robust":
        losses = neg_log_sigmoid(x) - e / (1 - 2 * e) * x
        d_x = -sigmoid(-x) - e / (1 - 2 * e)
    elif LOSS == "exo_pair":
        losses = -sigmoid(x) * (neg_log_sigmoid(x) + tl.log(1 - e))
        losses -= sigmoid(-x) * (neg_log_sigmoid(-x) + tl.log(e))
        d_x = sigmoid(x) * sigmoid(-x) * (x + tl.log(e) - tl.log(1 - e))
    elif LOSS == "discopop":
        # 1 - m, and m e^-x as one exponential: for a negative x of a large size it is 0 times infinity.
        rest = sigmoid(-x / tau)
        grown = tl.exp(-x - neg_log_sigmoid(x / tau))
        losses = rest * neg_log_sigmoid(x) + grown
        d_x = rest * ((grown - sigmoid(x / tau) * neg_log_sigmoid(x)) / tau - sigmoid(-x)) - grown
    elif LOSS == "nca_pair":
        losses = neg_log_sigmoid(v_w) + 0.5 * (neg_log_sigmoid(-v_w) + neg_log_sigmoid(-v_l))
        d_w = 0.5 * sigmoid(v_w) - sigmoid(-v_w)
        d_l = 0.5 * sigmoid(v_l)
    elif LOSS == "apo_zero":
        losses = sigmoid(-v_w) + sigmoid(v_l)
        d_w = -sigmoid(v_w) * sigmoid(-v_w)
        d_l = sigmoid(v_l) * sigmoid(-v_l)
    elif LOSS == "apo_down":
        losses = sigmoid(v_w) + sigmoid(-x)
        d_x = -sigmoid(x) * sigmoid(-x)
        d_w = sigmoid(v_w) * sigmoid(-v_w)
    elif LOSS == "sppo_hard":
        losses = ((v_w - 0.5) / beta) * ((v_w - 0.5) / beta) + ((v_l + 0.5) / beta) * ((v_l + 0.5) / beta)
        d_w = 2.0 * (v_w - 0.5) / (beta * beta)
        d_l = 2.0 * (v_l + 0.5) / (beta * beta)
    else:
        if LOSS == "rdpo":
            x += alpha * longer
        elif LOSS == "simpo":
            x -= gamma
        losses = neg_log_sigmoid(x)
        d_x = -sigmoid(-x)
    return losses, d_w + d_x, d_l - d_x
