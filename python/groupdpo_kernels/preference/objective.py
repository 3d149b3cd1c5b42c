"""Preference losses as pure functions of one vector: the log-probabilities of the responses.

`preference_loss` sums token_logps to seq_logps, turns them into scores u, and reduces each group to one number by a
row of `losses.LOSSES`. It is plain PyTorch without a loop over groups, and works in float64 whatever the inputs, as the
vectors are short. Results are float32, or float64 for float64 inputs. It never sees a model or a vocabulary.

    u_i = beta (s_i - r_i)            s_i, r_i: sums of the policy's and the reference's token log-probabilities
    average: u_i / n_i                n_i: number of tokens
    reference-free: r_i = 0

It needs a positive and a negative in every group, a token in every response, and a finite reference. On a CPU a
ValueError names what breaks this; on a GPU and in compiled code, where values are not read back, the loss and its
gradient are NaN. A policy that is not finite is never hidden either.
The cost is O(T + S), for all_pairs O(T + number of pairs). docs/math.md, section 3, has formulas and sources.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..checks import check_number, check_tensors, one_of, shown
from . import fused
from .exchange import gathered
from .fused import PreferenceWeights
from .groups import PreferenceGroups, check_groups
from .losses import LOSSES, Loss, Side, log1mexp, mean, policy_weight
from .segments import as_offsets, bounded_offsets, check_offsets, seq_logps


@dataclass(frozen=True)
class AdaBalance:
    """AdaDPO's balance: u_w becomes w u_w, with w = min(exp(b_w - b_l), ceiling) a constant for the gradient.

    DPO's gradient in the probability of a response is larger on the dispreferred side; w makes the two equal. b is the
    policy's log-probability (space="policy") or the log-ratio (space="reference"), a mean over tokens
    (normalize=True) or a sum. In a group b_l is the mean over its negatives (all_pairs takes the pair's own).
    The source is arXiv 2605.28440; this project extends it to groups.
    """

    ceiling: float = 2.0
    space: str = "policy"
    normalize: bool = True

    def __post_init__(self) -> None:
        _check_numbers(self, "ceiling")
        if not isinstance(self.normalize, bool):
            raise TypeError(f"normalize must be True or False; got {self.normalize!r}")
        if not (self.ceiling > 0 and math.isfinite(self.ceiling)):
            raise ValueError(f"ceiling must be positive and finite; got {self.ceiling}")
        if self.space not in ("policy", "reference"):
            raise ValueError(f"space must be 'policy' or 'reference'; got {self.space!r}")

    def coefficient(self, b_positive: Tensor, b_negative: Tensor) -> Tensor:
        """min(exp(b_positive - b_negative), ceiling), clipped before exp so that nothing overflows."""
        log_w = b_positive - b_negative
        w = torch.exp(log_w.clamp(max=math.log(self.ceiling)))
        return torch.where(log_w >= math.log(self.ceiling), self.ceiling, w)  # exp would round the ceiling


@dataclass(frozen=True)
class Objective:
    """What to minimise: a loss, its score, and its options.

    An option that belongs to another loss is ignored, so that one set of options can be swept over losses; the command
    line refuses it.

    Args:
        loss: name of the loss in `LOSSES`: sigmoid (DPO), mpo, all_pairs, simpo, and others. In Python it may also be a
            callable (scores (S,), groups) -> (G,).
        beta: scale of the scores; in orpo the weight of the odds-ratio term.
        average: whether scores are per token; by default as the loss has it (simpo, ipo: True).
        reference_free: whether scores leave the reference out; by default as the loss has it (simpo, cpo, orpo: True).
        nll_weight: weight of the positives' negative log-likelihood, the mean of -s_i / n_i, in addition to any loss.
        label_smoothing: probability that a label is wrong (sigmoid, robust, exo_pair; exo_pair needs more than 0).
        gamma: target margin (simpo only).
        alpha: reward added for each token of a response (rdpo only).
        tau: width in D of the change from the logistic to the exponential loss (discopop only).
        balance: AdaDPO's balance of the two sides.
        policy_weight: whether to multiply a group's loss, NLL included, by WPO's weight, a constant for the gradient:
            the product of exp(s_i / n_i) of the two of a pair (in a group of the geometric means of its two sides).
        divide_by: what the sum over groups of weight times loss is divided by: weights, their sum, or count, the number
            of groups. Without `PreferenceGroups.weights` the two are equal.
    """

    loss: str | Callable[[Tensor, PreferenceGroups], Tensor] = "sigmoid"
    beta: float = 0.1
    average: bool | None = None
    reference_free: bool | None = None
    nll_weight: float = 0.0
    label_smoothing: float = 0.0
    gamma: float = 0.0
    alpha: float = 0.0
    tau: float = 0.05
    balance: AdaBalance | None = None
    policy_weight: bool = False
    divide_by: Literal["weights", "count"] = "weights"

    def __post_init__(self) -> None:
        _check_loss(self.loss)
        _check_numbers(self, "beta", "nll_weight", "label_smoothing", "gamma", "alpha", "tau")
        if not (self.beta > 0 and math.isfinite(self.beta)):
            raise ValueError(f"beta must be positive and finite; got {self.beta}")
        if not (self.nll_weight >= 0 and math.isfinite(self.nll_weight)):
            raise ValueError(f"nll_weight must be at least 0 and finite; got {self.nll_weight}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5); got {self.label_smoothing}")
        if self.loss == "exo_pair" and self.label_smoothing == 0:
            raise ValueError(f"label_smoothing must be in (0, 0.5) with exo_pair; got {self.label_smoothing}")
        if not (self.tau > 0 and math.isfinite(self.tau)):
            raise ValueError(f"tau must be positive and finite; got {self.tau}")
        for name in ("gamma", "alpha"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite; got {getattr(self, name)}")
        for name in ("average", "reference_free"):
            if not isinstance(getattr(self, name), (bool, type(None))):
                raise TypeError(f"{name} must be True, False or None; got {getattr(self, name)!r}")
        if not isinstance(self.policy_weight, bool):
            raise TypeError(f"policy_weight must be True or False; got {self.policy_weight!r}")
        one_of("divide_by", self.divide_by, ("weights", "count"))
        if self.balance is not None and not isinstance(self.balance, AdaBalance):
            raise TypeError(f"balance must be an AdaBalance or None; got {self.balance!r}: write AdaBalance()")
        if self.balance is not None and self._row.no_balance:
            raise ValueError(f"balance must be None with {self.loss}: {self._row.no_balance}; got {self.balance}")

    @property
    def _row(self) -> Loss:
        return LOSSES[self.loss] if isinstance(self.loss, str) else Loss(group=self.loss)

    @property
    def averages(self) -> bool:
        """Whether scores are per token: `average`, or the loss's own convention."""
        return self._row.average if self.average is None else self.average

    @property
    def subtracts_reference(self) -> bool:
        """Whether scores are log-ratios: `reference_free`, or the loss's own convention."""
        return not (self._row.reference_free if self.reference_free is None else self.reference_free)

    @property
    def needs_reference(self) -> bool:
        """Whether ref_logps must be given, for the scores or for the balance."""
        return self.subtracts_reference or (self.balance is not None and self.balance.space == "reference")


# Names that other projects give to losses, and what to write here instead.
ELSEWHERE = {
    "dpo": "'sigmoid'",
    "slic": "'hinge'",
    "rso": "'hinge'",
    "exo": "'exo_pair'",
    "nca": "'nca_pair'",
    "sppo": "'sppo_hard'",
    "apo": "'apo_zero' or 'apo_down'",
    "robust_dpo": "'robust'",
    "length_dpo": "'rdpo'",
    "groupdpo": "'margin' or 'softmax'",
    "rpo": "Objective('sigmoid', nll_weight=1.0)",
    "adadpo": "Objective('sigmoid', balance=AdaBalance())",
    "sdpo": "'sigmoid', in stages (StepwiseDPO, stepwise.run_stages)",
}


def _check_loss(loss: Any) -> None:
    """TypeError for a loss that is neither text nor callable; ValueError for a name that is not in LOSSES."""
    known = f"a callable or one of {', '.join(LOSSES)}"
    if callable(loss) or (isinstance(loss, str) and loss in LOSSES):
        return
    if not isinstance(loss, str):
        raise TypeError(f"loss must be {known}; got {loss!r:.60}")
    plain = loss.strip().lower().replace("-", "_").replace(" ", "_")
    near = difflib.get_close_matches(plain, LOSSES, n=1)
    hint = f": here it is {ELSEWHERE[plain]}" if plain in ELSEWHERE else f": did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"loss must be {known}; got {loss!r}{hint}")


def _check_numbers(options: Any, *names: str) -> None:
    """TypeError for a field that is not a number: text, for example, a bool, or a tensor."""
    for name in names:
        value = getattr(options, name)
        if isinstance(value, Tensor):
            raise TypeError(f"{name} must be a number; got {shown(value)}")
        check_number(name, value)


class PreferenceLoss(NamedTuple):
    """The result of preference_loss. Only `loss` is differentiable, in token_logps; the rest is for logging.

    Where groups span ranks it is that of `groups.whole`, the same on every rank.
    """

    loss: Tensor  # () the mean of group_losses, weighted where the groups are
    seq_logps: Tensor  # (S,)
    rewards: Tensor  # (S,) the scores u, before balance
    group_losses: Tensor  # (G,) with WPO's weight, without the groups' own
    balance_weights: Tensor  # (S,) w on positives of weight above 0 (all_pairs: the mean over its pairs), 1 elsewhere


def preference_loss(
    token_logps: Tensor,  # (T,) floating
    cu_seqlens: Tensor,  # (S+1,) integer
    groups: PreferenceGroups,
    objective: Objective,
    ref_logps: Tensor | None = None,  # (S,) sums or (T,) tokens
    *,
    impl: str = "auto",
) -> PreferenceLoss:
    """The mean of the objective over groups, differentiable in token_logps. `groups.weights` weigh it; by default it
    divides by their sum, as `torch.nn.functional.cross_entropy(weight=, reduction="mean")` does (`divide_by`).

    Where `groups` span ranks, token_logps, cu_seqlens and ref_logps are those of this rank, and every rank makes the
    call. All get the same PreferenceLoss, of `groups.whole`. A rank's gradient is R times that of what it has, as
    `PreferenceGroups` describes, so that averages over ranks are those of one process.

    Args:
        token_logps: the policy's token log-probabilities, packed; 0 where a token does not count.
        cu_seqlens: sequence s owns tokens cu_seqlens[s] : cu_seqlens[s+1]; its length n_s is their number.
        groups: which sequences belong together, and which of them are positive.
        objective: see `Objective`.
        ref_logps: the reference's log-probabilities, of sequences or of tokens. No gradient flows into them. With a
            context_parallel_group they are of whole sequences, as `seq_logps(..., process_group=)` sums them.
        impl: "auto" takes "triton", one fused launch, where it can run, else "reference", plain PyTorch. An explicit
            choice never falls back. Groups that span ranks or have response_weights take "reference".

    Raises ValueError or TypeError for shapes that do not fit, a pairwise loss on larger groups, a missing reference;
    and, on a CPU, for values: offsets that do not cover the tokens or decrease, an empty response, a reference that
    is not finite, a ranking whose positives do not come first. Where groups span ranks an error of one is raised on
    all, and so is an objective that differs; whether there is one is read back from the device, once a process group.
    """
    check_groups(groups)
    if groups.spans:
        x = _of_all_ranks(token_logps, cu_seqlens, groups, objective, ref_logps, impl)
    else:
        cu_seqlens = as_offsets("cu_seqlens", cu_seqlens)
        _check_shapes(token_logps, cu_seqlens, groups, objective, ref_logps, impl)
        weighted = groups.response_weights is not None
        impl = fused.resolve(impl, token_logps.device, token_logps.dtype, objective.loss, groups.max_size, weighted)
        if impl != "reference":
            return _by_kernel(token_logps, cu_seqlens, groups, objective, ref_logps)
        x = _sequences(token_logps, cu_seqlens, ref_logps)
    row, balance, dtype, groups = objective._row, objective.balance, token_logps.dtype, groups.whole
    u = x.logps - x.ref_logps if objective.subtracts_reference and x.ref_logps is not None else x.logps
    u = objective.beta * (u / x.lengths if objective.averages else u)
    seen = x.logps.detach(), u.detach()
    if groups.response_weights is not None:
        # What has weight 0 is left out here: 0 times its gradient would be NaN where its values are not finite.
        absent = groups.response_weights == 0
        u = u.masked_fill(absent, 0)
        x = x._replace(logps=x.logps.masked_fill(absent, 0), mean_logps=x.mean_logps.masked_fill(absent, 0))
    b = None if balance is None else _balanced_quantity(x, balance, row.odds)

    weights = torch.ones_like(u).detach()
    if row.pair is not None:
        i, j = groups.pair_indices(every=row.every_pair)
        w = None if balance is None or b is None else balance.coefficient(b[i], b[j])
        preferred = Side(u[i] if w is None else w * u[i], x.mean_logps[i], x.lengths[i], w)
        losses = row.pair(preferred, Side(u[j], x.mean_logps[j], x.lengths[j], None), objective)
        each = torch.ones_like(losses).detach()  # what a pair counts in its group
        if row.every_pair:
            if groups.response_weights is not None:
                each = groups.response_weights[i] * groups.response_weights[j]
            offsets = groups.pair_offsets()
            losses = seq_logps(torch.where(each != 0, each * losses, 0), offsets) / seq_logps(each, offsets)
        if w is not None:
            pairs, total = (torch.zeros_like(weights).index_put((i,), y, accumulate=True) for y in (each, each * w))
            weights = torch.where(groups.positive & (pairs > 0), total / pairs, weights)
    else:
        assert row.group is not None  # a row has one of the two
        if balance is not None and b is not None:
            w = balance.coefficient(b, mean(b, groups.side(False), groups)[groups.ids])
            weights = torch.where(groups.side(True) != 0, w, weights)
        scores = u if balance is None else weights * u
        # A user's own loss gets scores of the precision that it was given.
        losses = row.group(
            scores if isinstance(objective.loss, str) or dtype == torch.float64 else scores.float(), groups
        )
        if losses.shape != (groups.num_groups,):
            raise ValueError(f"loss must give one value a group, ({groups.num_groups},); got {tuple(losses.shape)}")
    if objective.nll_weight:
        losses = losses + objective.nll_weight * mean(-x.mean_logps, groups.side(True), groups)
    if objective.policy_weight:
        losses = policy_weight(x.mean_logps, groups) * losses
    if row.ranks and not _unchecked(u) and not groups.positives_first():
        raise ValueError(f"{objective.loss} reads the order in a group as its ranking: positives must come first")
    # The NaN is a factor, so that the gradient is NaN too: that of a linear loss (hinge) does not depend on its score.
    bad = losses.isnan() | ~groups.valid
    if row.ranks:
        bad = bad | ~groups.positives_first()
    losses = losses * torch.where(bad, math.nan, 1.0)
    loss = losses.mean() if groups.weights is None else (_shares(groups, objective) * losses).sum()
    found = PreferenceLoss(loss, *seen, losses.detach(), weights)
    return found if dtype == torch.float64 else PreferenceLoss(*(value.float() for value in found))


def _by_kernel(
    token_logps: Tensor,  # (T,) bf16 | fp16 | fp32
    cu_seqlens: Tensor,  # (S+1,)
    groups: PreferenceGroups,
    objective: Objective,
    ref_logps: Tensor | None,  # (S,) or (T,)
) -> PreferenceLoss:
    """preference_loss in few launches, with the gradient in closed form; sums and scores are float64 inside."""
    assert isinstance(objective.loss, str)  # `resolve` has refused a callable
    if ref_logps is not None:  # sums in float64 keep their digits, as in plain PyTorch
        ref_logps = ref_logps.detach().to(torch.promote_types(ref_logps.dtype, torch.float32))
    if not _unchecked(token_logps):
        if objective._row.ranks and not groups.positives_first():
            raise ValueError(f"{objective.loss} reads the order in a group as its ranking: positives must come first")
        _check_values(cu_seqlens, token_logps.shape[0], ref_logps)
    balance, factors, policy = objective.balance, None, None
    if objective.policy_weight:  # from the sums, before the launch, which knows no factor of a group
        policy = policy_weight(_sequences(token_logps.detach(), cu_seqlens, None).mean_logps, groups)
        factors = policy / groups.num_groups
    if groups.weights is not None:
        factors = _shares(groups, objective) * (1 if policy is None else policy)
    spec = fused.LossSpec(
        objective.loss,
        objective.beta,
        objective.averages,
        objective.subtracts_reference,
        objective.nll_weight,
        objective.label_smoothing,
        objective.gamma,
        objective.alpha,
        objective.tau,
        0.0 if balance is None else balance.ceiling,
        balance is not None and balance.space == "reference",
        balance is not None and balance.normalize,
    )
    offsets = (cu_seqlens, groups.cu_groups)
    arguments = (token_logps.float(), ref_logps, *offsets, groups.positive, spec, groups.max_size)
    if factors is None:
        return PreferenceLoss(*PreferenceWeights.apply(*arguments))
    factors = factors * torch.where(groups.valid, 1.0, math.nan)
    found = PreferenceLoss(*fused.WeightedPreference.apply(*arguments, factors, groups.ids)[:5])
    return found if policy is None else found._replace(group_losses=(policy * found.group_losses).float())


def _shares(groups: PreferenceGroups, objective: Objective) -> Tensor:  # (G,) float64
    """What each group counts in the mean, by its weight."""
    assert groups.weights is not None
    return groups.weights / (groups.weights.sum() if objective.divide_by == "weights" else groups.num_groups)


class _Sequences(NamedTuple):
    logps: Tensor  # (S,) s
    ref_logps: Tensor | None  # (S,) r
    lengths: Tensor  # (S,) n, in the dtype of logps
    mean_logps: Tensor  # (S,) s / n


def _sequences(token_logps: Tensor, cu_seqlens: Tensor, ref_logps: Tensor | None, whole: bool = True) -> _Sequences:
    """Sums by sequence. Wrong values raise ValueError on a CPU, and give NaN on a GPU and in compiled code.

    whole: False where other ranks have more tokens of these sequences, so that here there may be none.
    """
    token_logps = token_logps.double()
    covered = None
    if token_logps.device.type != "cpu":  # seq_logps checks offsets on a CPU only
        cu_seqlens, covered = bounded_offsets(cu_seqlens, token_logps.shape[0])
    s, n = seq_logps(token_logps, cu_seqlens), cu_seqlens.diff()
    r = None if ref_logps is None else ref_logps.detach().to(s.dtype)
    if _unchecked(s):
        valid = (n > 0) | (not whole)
        s = s * torch.where(valid if covered is None else covered & valid, 1.0, math.nan)
        r = None if r is None else torch.where(torch.isfinite(r), r, math.nan)
    else:
        _check_values(cu_seqlens, token_logps.shape[0], r, whole)
    if r is not None and r.shape != s.shape:
        r = seq_logps(r, cu_seqlens)
    n = n.to(s.dtype)
    return _Sequences(s, r, n, s / n)


def _of_all_ranks(
    token_logps: Tensor,
    cu_seqlens: Tensor,
    groups: PreferenceGroups,
    objective: Objective,
    ref_logps: Tensor | None,
    impl: str,
) -> _Sequences:
    """Sums by sequence of groups.whole, whose sequences, or parts of each, lie on several ranks. Collective."""
    context = groups.context_parallel_group
    values = groups.positive.new_zeros(3, groups.num_sequences, dtype=torch.float64)  # s, n and r
    mark, error = 0, None
    try:
        cu_seqlens = as_offsets("cu_seqlens", cu_seqlens)
        _check_shapes(token_logps, cu_seqlens, groups, objective, ref_logps, impl)
        x = _sequences(token_logps, cu_seqlens, ref_logps, whole=context is None)
        values = torch.stack([x.logps, x.lengths, torch.zeros_like(x.logps) if x.ref_logps is None else x.ref_logps])
        mark = _mark(objective, ref_logps)
    except Exception as raised:  # the other ranks must know
        error = raised
    if context is not None:
        found, marks, error = gathered("preference_loss", values, values.shape[1], mark, error, context)
        error = _same(marks) if error is None else error
        if error is None:
            values, error = _added(found)
    if groups._parts is not None and groups.process_group is not None:
        most = groups._parts.most
        found, marks, error = gathered("preference_loss", values, most, mark, error, groups.process_group)
        error = _same(marks) if error is None else error
        values = groups._parts.joined(found)
    if error is not None:
        raise error
    s, n, r = values
    return _Sequences(s, None if ref_logps is None else r.detach(), n.detach(), s / n.detach())


def _mark(objective: Objective, ref_logps: Tensor | None) -> int:
    """A number that differs where the arguments differ that must be the same on every rank."""
    loss, balance = objective.loss, objective.balance
    values = [] if balance is None else [getattr(balance, field.name) for field in dataclasses.fields(balance)]
    values += [getattr(objective, f.name) for f in dataclasses.fields(objective) if f.name not in ("loss", "balance")]
    values += [loss if isinstance(loss, str) else getattr(loss, "__qualname__", type(loss).__name__), balance is None]
    told = [float(x) if isinstance(x, numbers.Real) else x for x in (*values, ref_logps is None)]  # 1 is 1.0
    return zlib.crc32(repr(told).encode())


def _same(marks: list[int]) -> Exception | None:
    if len({*marks}) == 1:
        return None
    return ValueError("objective, and whether ref_logps is given, must be the same on every rank; got different ones")


def _added(
    parts: Tensor,  # (R, 3, S): s and n of each rank's tokens, and r of whole sequences
) -> tuple[Tensor, Exception | None]:
    """s, n and r of whole sequences, (3, S). On a CPU an error for a sequence without a token, or where r differ."""
    s, n, r = parts.unbind(1)
    s, n, (first, *others) = s.sum(0), n.sum(0), r.detach()
    same = torch.stack([first == first, *(first == other for other in others)]).all(0)
    if _unchecked(s):
        return torch.stack([s * torch.where(n > 0, 1.0, math.nan), n, first.where(same, math.nan)]), None
    error = None
    if not bool((n > 0).all()):
        at = int((n < 1).nonzero()[0, 0])
        error = ValueError(f"cu_seqlens must give each sequence a token on some rank; sequence {at} has none")
    elif not bool(same.all()):
        error = ValueError(
            "ref_logps must be the same on every rank of context_parallel_group: sums over whole sequences, as"
            f" seq_logps(..., process_group=) makes them; those of sequence {int((~same).nonzero()[0, 0])} differ"
        )
    return torch.stack([s, n, first]), error


def _check_values(cu_seqlens: Tensor, T: int, ref_logps: Tensor | None, whole: bool = True) -> None:
    """ValueError for offsets that do not cover the tokens, an empty response, a reference that is not finite."""
    check_offsets("cu_seqlens", cu_seqlens, T, "the number of tokens")
    empty = cu_seqlens.diff() < int(whole)
    if bool(empty.any()):
        raise ValueError(f"cu_seqlens must give each sequence a token; sequence {int(empty.nonzero()[0, 0])} has none")
    if ref_logps is not None and not bool(torch.isfinite(ref_logps).all()):
        at = int((~torch.isfinite(ref_logps)).nonzero()[0, 0])
        raise ValueError(f"ref_logps must be finite; ref_logps[{at}] is {float(ref_logps[at])}")


def _balanced_quantity(x: _Sequences, balance: AdaBalance, odds: bool) -> Tensor:  # (S,)
    """The quantity b of AdaDPO that `AdaBalance` compares between the two sides."""
    b = x.logps if balance.space == "policy" or x.ref_logps is None else x.logps - x.ref_logps
    b = (b / x.lengths if balance.normalize else b).detach()
    return b + log1mexp(x.mean_logps.detach()) if odds else b


def _unchecked(x: Tensor) -> bool:
    """Whether values must not be read back: on a GPU, and while torch.compile traces."""
    return x.device.type != "cpu" or torch.compiler.is_compiling()


def _check_shapes(
    token_logps: Tensor,
    cu_seqlens: Tensor,
    groups: PreferenceGroups,
    objective: Objective,
    ref_logps: Tensor | None,
    impl: str,
) -> None:
    if impl not in ("auto", *fused.IMPLS):
        raise ValueError(f"impl must be one of {('auto', *fused.IMPLS)}; got {impl!r}")
    if groups.spans and impl not in ("auto", "reference"):
        raise ValueError(f"impl must be 'auto' or 'reference' for groups that span ranks; got {impl!r}")
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an Objective; got {objective!r}")
    check_tensors(token_logps=token_logps, cu_seqlens=cu_seqlens)
    if ref_logps is not None:
        check_tensors(ref_logps=ref_logps)
    if token_logps.dim() != 1 or not token_logps.is_floating_point():
        raise ValueError(
            f"token_logps must be a floating (T,) tensor; got {tuple(token_logps.shape)} {token_logps.dtype}"
        )
    S = groups.num_sequences
    if cu_seqlens.shape != (S + 1,):
        raise ValueError(
            f"cu_seqlens must be an integer tensor of S + 1 = {S + 1} offsets, for the {S} sequences of groups;"
            f" got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    whole = groups.whole.num_sequences
    if objective._row.pair is not None and not objective._row.every_pair and groups.num_groups * 2 != whole:
        raise ValueError(
            f"groups must be pairs for loss {objective.loss!r}, one positive and one negative each; got {whole}"
            f" sequences in {groups.num_groups} groups. all_pairs, margin, mpo and softmax take larger groups"
        )
    if groups.whole.response_weights is not None and not objective._row.weighs_responses:
        raise ValueError(
            f"response_weights must be None for loss {objective.loss!r}, which does not weigh the responses of a side:"
            f" give groups weights, or take all_pairs, margin, mpo or softmax; got {len(groups.positive)} of them"
        )
    if ref_logps is None:
        if objective.needs_reference:
            raise ValueError(f"ref_logps must be given: {objective} uses a reference")
    elif not ref_logps.is_floating_point() or ref_logps.shape not in ((S,), token_logps.shape):
        T = token_logps.shape[0]
        raise ValueError(
            f"ref_logps must be floating and (S,) = ({S},) or (T,) = ({T},);"
            f" got {tuple(ref_logps.shape)} {ref_logps.dtype}"
        )
    elif groups.context_parallel_group is not None and ref_logps.shape != (S,):
        raise ValueError(
            f"ref_logps must be (S,) = ({S},), sums over whole sequences, where context_parallel_group splits tokens,"
            f" as seq_logps(..., process_group=) makes them; got {tuple(ref_logps.shape)}"
        )
    for name, x in {"cu_seqlens": cu_seqlens, "groups": groups.positive, "ref_logps": ref_logps}.items():
        if x is not None and x.device != token_logps.device:
            raise ValueError(f"{name} must be on the device of token_logps, {token_logps.device}; got {x.device}")
