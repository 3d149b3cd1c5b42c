"""Pure maths on tiles: the GEMM, the map from its result to logits, and the order in which tiles are visited. All
kernels of an LM head share it.

No kernel and no launcher lives here. A tile is (BLOCK_T tokens x BLOCK_V vocabulary entries), float32 from the GEMM on.
"""

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
FLOAT64_EPS = tl.constexpr(2.0**-52)


@triton.jit
def tile_position(tile, tiles_t, tiles_v, GROUP_T: tl.constexpr):
    """(token tile, vocabulary tile) of a linear id: groups of GROUP_T token tiles sweep the vocabulary together, so
    that hidden stays in L2.
    """
    per_group = GROUP_T * tiles_v
    group = tile // per_group
    first = group * GROUP_T
    size = tl.minimum(tiles_t - first, GROUP_T)
    within = tile % per_group
    return first + within % size, within // size


@triton.jit
def rows_from(first, size, BLOCK: tl.constexpr):
    """The ids first, first + 1, ... of `size` rows, (BLOCK,) int64; the last one again where there are no more: a clamp
    is one mask less in a loop.
    """
    return tl.minimum(first + tl.arange(0, BLOCK), size - 1).to(tl.int64)


@triton.jit
def products_pointer(
    hidden,  # if LIBRARY (rows in whole tiles, stride) float32: the products of rows row0 : and columns column0 :
    row0,
    column0,
    strides,
    LIBRARY: tl.constexpr,
):
    """What gemm_tile takes: if LIBRARY the place where row 0 and column 0 would stand, so that ids are those of the
    whole head; else `hidden` as it is.
    """
    if LIBRARY:
        hidden -= row0.to(tl.int64) * strides[0] + column0
    return hidden


@triton.jit
def gemm_tile(
    hidden,  # (T, D) pointer or descriptor, contiguous; if LIBRARY of products_pointer
    weight,  # (V, D) pointer or descriptor
    low_rank_hidden_ptr,  # (T, R) contiguous
    low_rank_weight_ptr,  # (V, R)
    t,  # (BLOCK_T,) int64: any valid rows; with TMA those of rows_from(t0, T, BLOCK_T)
    t0,  # read with TMA alone
    v0,
    V,
    strides,  # of weight (v, d), then of low_rank_weight (v, r)
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    LIBRARY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """hidden[t] @ weight[v0:].T + low_rank_hidden[t] @ low_rank_weight[v0:].T, (BLOCK_T, BLOCK_V) in float32. What lies
    past T or V is finite; the caller masks it.
    """
    acc = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    v = rows_from(v0, V, BLOCK_V)
    if LIBRARY:
        column = v0 + tl.arange(0, BLOCK_V)
        acc = tl.load(hidden + t[:, None] * strides[0] + column[None, :], mask=(column < V)[None, :], other=0.0)
    elif TMA:
        for d0 in range(0, D, BLOCK_D):
            acc = tl.dot(hidden.load([t0, d0]), weight.load([v0, d0]).T, acc, input_precision=PRECISION)
    else:
        d = tl.arange(0, BLOCK_D)
        hidden_ptrs = hidden + t[:, None] * D + d[None, :]
        weight_ptrs = weight + v[None, :] * strides[0] + d[:, None] * strides[1]
        for d0 in range(0, D, BLOCK_D):
            inside = d0 + d < D
            h = tl.load(hidden_ptrs, mask=inside[None, :], other=0.0)
            w = tl.load(weight_ptrs, mask=inside[:, None], other=0.0)
            acc = tl.dot(h, w, acc, input_precision=PRECISION)
            hidden_ptrs += BLOCK_D
            weight_ptrs += BLOCK_D * strides[1]
    if R > 0:
        for r0 in tl.static_range(0, R, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            x = tl.load(low_rank_hidden_ptr + t[:, None] * R + r[None, :], mask=r[None, :] < R, other=0.0)
            w = tl.load(
                low_rank_weight_ptr + v[None, :] * strides[2] + r[:, None] * strides[3],
                mask=r[:, None] < R,
                other=0.0,
            )
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def logits_tile(
    hidden,  # (T, D) pointer or descriptor, contiguous; if LIBRARY of products_pointer
    weight,  # (V, D) pointer or descriptor
    bias_ptr,  # (V,)
    low_rank_hidden_ptr,  # (T, R) contiguous
    low_rank_weight_ptr,  # (V, R)
    t,  # (BLOCK_T,) int64: any valid rows; with TMA those of rows_from(t0, T, BLOCK_T)
    t0,  # read with TMA alone
    v0,
    V,
    strides,  # of weight (v, d), then of low_rank_weight (v, r)
    scale,
    D: tl.constexpr,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    LIBRARY: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCURATE: tl.constexpr,
):
    """The logits of rows t and columns v0 : v0 + BLOCK_V, under softcap divided by `cap`: (BLOCK_T, BLOCK_V) float32.
    What lies past T or V is finite; the caller masks it.
    """
    acc = gemm_tile(
        hidden, weight, low_rank_hidden_ptr, low_rank_weight_ptr, t, t0, v0, V, strides,
        D, R, BLOCK_R, BLOCK_T, BLOCK_V, BLOCK_D, TMA, LIBRARY, PRECISION,
    )  # fmt: skip
    return squash(acc, bias_ptr, v0 + tl.arange(0, BLOCK_V), V, scale, HAS_BIAS, HAS_SOFTCAP, ACCURATE)


@triton.jit
def halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Left and right half of a tile's columns: what an epilogue holds beside the tile is half as much."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def tanh(x, ACCURATE: tl.constexpr):
    """float32 tanh without libdevice (which neither the interpreter nor every backend has): to 1e-7, or if ACCURATE
    to about 2 ulp.

    Near zero 1 - 2 / (e^2x + 1) cancels and would cost softcap * 6e-8 in every small logit, which float32 inputs would
    show; there an odd polynomial (Cephes tanhf) takes over. The reciprocal is a square of rsqrt, two instructions where
    a division is nine.
    """
    r = tl.rsqrt(tl.exp2(x * (2.0 * LOG2_E)) + 1.0)
    y = 1.0 - 2.0 * (r * r)
    if ACCURATE:
        x2 = x * x
        small = (
            ((-5.70498872745e-3 * x2 + 2.06390887954e-2) * x2 - 5.37397155531e-2) * x2 + 1.33314422036e-1
        ) * x2 - 3.33332819422e-1
        y = tl.where(tl.abs(x) < 0.625, x + x * x2 * small, y)
    return y


@triton.jit
def squash(
    acc,  # (BLOCK_T, columns) float32, of gemm_tile
    bias_ptr,  # (V,)
    v,  # (columns,): the columns' ids
    V,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ACCURATE: tl.constexpr,
):
    """scale * (acc + bias), or tanh of that under softcap: `cap` times this is the logit."""
    acc = acc * scale
    if HAS_BIAS:
        # After the scale: Triton turns a GEMM of one step, and a sum that follows at once, into a GEMM that starts from
        # the bias. Its steps would be rounded to the last digit of that, which for an offset of 1e4 is 1e-3.
        acc += (tl.load(bias_ptr + v, mask=v < V, other=0.0).to(tl.float32) * scale)[None, :]
    if HAS_SOFTCAP:
        acc = tanh(acc, ACCURATE)
    return acc


@triton.jit
def exp_difference(z, shift):
    """exp(z - shift), one instruction more than exp2. The difference first, in the unit that z was rounded in: of
    logits in base 2, a common offset would cost digits a second time.
    """
    return tl.exp2((z - shift) * LOG2_E)


@triton.jit
def finite_or_zero(m):
    """A maximum that is safe to subtract: neither -inf + inf in a row of -inf so far, nor inf - inf."""
    return tl.where(tl.abs(m) == float("inf"), 0.0, m)


@triton.jit
def lse_of(shift, total):
    """shift + log(total) in float64, for a row's sum of exponentials relative to `shift`."""
    return shift.to(tl.float64) + tl.log(total).to(tl.float64)


@triton.jit
def log_probs(z, lse):
    """z - lse in float32, by the two float32 parts of lse, so that its rounding, which all entries of a row share, is
    not lost. NaN where the lse is infinite, as in torch.log_softmax.
    """
    high = lse.to(tl.float32)
    return (z - high) - (lse - high.to(tl.float64)).to(tl.float32)


@triton.jit
def log_one_plus(e):
    """log(1 + e) for e >= 0, to full relative precision: what 1 + e has rounded off cancels in the quotient (Kahan)."""
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))


@triton.jit
def neg_log_sigmoid(x):
    """-log sigma(x) without overflow, and without losing the small values of a large x."""
    return tl.maximum(-x, 0.0) + log_one_plus(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), also in the tail where e^-x overflows."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def exp_minus_one(m):
    """e^m - 1 for m <= 0, to full relative precision: what e^m has rounded off cancels in the quotient (Kahan)."""
    u = tl.exp(m)
    return tl.where(u == 1.0, m, tl.where(m > -0.35, (u - 1.0) * (m / tl.log(u)), u - 1.0))


@triton.jit
def log1mexp(m):
    """log(1 - e^m) for m <= 0 in float64; closer to 0 than one unit of precision m counts as that unit. NaN stays."""
    return tl.log(-exp_minus_one(tl.where(m > -FLOAT64_EPS, -FLOAT64_EPS, m)))


@triton.jit
def log_add_exp(a, b):
    """log(e^a + e^b); -inf for none."""
    nothing = (a == -float("inf")) & (b == -float("inf"))
    return tl.where(nothing, a, tl.maximum(a, b) + log_one_plus(tl.exp(-tl.abs(a - b))))
