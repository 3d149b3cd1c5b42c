"""PreferenceGroups says which responses belong together, which of them are preferred, and what each counts: plain,
checked tensors.

What is derived from them is vectorised over ragged groups, stays in bounds whatever the offsets, and reads nothing back
from a device. Groups may span ranks: then each rank knows its own responses and, in `whole`, those of all ranks. The
module never sees a loss or a model. The cost is O(S) integers, and O(pairs) where pairs are listed; groups that span
ranks take two collective calls a process group to make, and are read back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checks import check_count, check_device, check_group, check_iterable, check_number, check_tensors
from .exchange import agreed, gathered
from .segments import as_offsets, bounded_offsets


def check_groups(groups: Any) -> None:
    """TypeError unless these are PreferenceGroups."""
    if not isinstance(groups, PreferenceGroups):
        raise TypeError(f"groups must be PreferenceGroups; got {type(groups).__name__}")


@dataclass(frozen=True, eq=False)
class PreferenceGroups:
    """Ragged groups of responses: group g owns sequences cu_groups[g] : cu_groups[g+1], positives anywhere among them.

    Each group needs a positive and a negative. On a CPU a ValueError names a group that lacks one; elsewhere values
    are not read back, and such groups give NaN. Make groups on the CPU and move them with `.to(device)`.

    `weights` is what each group, or pair, counts in the loss; `Objective.divide_by` says what the weighted sum is
    divided by. `response_weights` is how often each response counts: with weight 2 the loss is that of a group that
    holds it twice, and in all_pairs a pair counts the product of its two. Weights are finite and at least 0; neither
    all of them are 0, nor those of all responses of a side. On a CPU a ValueError names what is wrong, elsewhere the
    loss is NaN.

    With a process_group the responses of a group lie on its ranks: cu_groups and positive are those of this rank, which
    may have none of a group, and G is the same on all ranks. A whole group is the responses of the first rank, then
    those of the second, and so on; that is its ranking where the loss is one of rankings. With a context_parallel_group
    the tokens of each response lie on its ranks, all of which give the same cu_groups and positive. Every rank makes
    such groups at the same time, and tensors that are wrong on one of them raise on all.

    `preference_loss` and `group_backward` then give every rank the loss of the whole groups, and R times the gradient
    in what this rank has, where R is the number of ranks of the process_group, times that of the
    context_parallel_group. DistributedDataParallel and other engines average gradients over ranks, which makes them
    those of one process that has everything. Without an engine average them yourself: sum over the ranks, divide by R.
    """

    cu_groups: Tensor  # (G+1,) integer; stored as int32 or int64
    positive: Tensor  # (S,) bool
    weights: Tensor | None = field(default=None, kw_only=True)  # (G,) floating or integer; stored as float64
    response_weights: Tensor | None = field(default=None, kw_only=True)  # (S,) the same
    process_group: Any = field(default=None, kw_only=True)  # ranks with other responses of these groups
    context_parallel_group: Any = field(default=None, kw_only=True)  # ranks with other tokens of these responses
    ids: Tensor = field(init=False, repr=False)  # (S,) int64, the group of each sequence
    valid: Tensor = field(init=False, repr=False)  # () bool; False is possible only where values were not read
    max_size: int = field(init=False, repr=False)  # a bound on the responses of a group: S where sizes were not read
    _num_pairs: int | None = field(init=False, repr=False)  # None where it was not read
    _parts: _Parts | None = field(init=False, repr=False)  # None unless the groups span ranks

    def __post_init__(self) -> None:
        for name in ("process_group", "context_parallel_group"):
            check_group(name, getattr(self, name))
        parts = _Parts.of(self) if self.spans else None
        positive = self.positive
        cu = as_offsets("cu_groups", self.cu_groups) if self.spans else _checked(self)
        readable = cu.device.type == "cpu" and not torch.compiler.is_compiling()
        S = positive.shape[0]
        bounded, covered = bounded_offsets(cu, S)
        # repeat_interleave would trust the offsets; searchsorted stays in bounds.
        ids = torch.searchsorted(
            bounded[1:].contiguous(), torch.arange(S, device=cu.device, dtype=cu.dtype), right=True
        )
        object.__setattr__(self, "cu_groups", bounded)
        object.__setattr__(self, "ids", ids.clamp(max=cu.shape[0] - 2))
        for name in ("weights", "response_weights"):
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None else given.detach().double())
        positives, negatives = self.counts()
        valid = covered & ((positives > 0) & (negatives > 0)).all() & self._valid_weights()
        object.__setattr__(self, "valid", valid if parts is None else parts.whole.valid)
        object.__setattr__(self, "max_size", int(cu.diff().max()) if readable else S)
        object.__setattr__(self, "_num_pairs", int((positives * negatives).sum()) if readable else None)
        object.__setattr__(self, "_parts", parts)

    @classmethod
    def pairs(
        cls, n: int, device: torch.device | str | None = None, *, context_parallel_group: Any = None
    ) -> PreferenceGroups:
        """Makes n groups of two: a chosen response, then its rejected one."""
        check_count("n", n)
        return cls.from_lists([[True, False]] * n, device, context_parallel_group=context_parallel_group)

    @classmethod
    def from_lists(
        cls,
        positive: Iterable[Sequence[bool]],
        device: torch.device | str | None = None,
        *,
        weights: Sequence[float] | None = None,
        response_weights: Iterable[Sequence[float]] | None = None,
        process_group: Any = None,
        context_parallel_group: Any = None,
    ) -> PreferenceGroups:
        """Takes one list a group, one bool a response: `from_lists([[True, False, False], [False, True]])`.

        weights has a number a group, response_weights a list a group, a number a response.
        """
        check_iterable("positive", positive, "a list of lists of bools")
        lists = [[*map(bool, _own("positive", group))] for group in positive]
        if device is not None:
            check_device("device", device)
        sizes = torch.tensor([0, *map(len, lists)], dtype=torch.int64)
        each = None
        if response_weights is not None:
            check_iterable("response_weights", response_weights, "a list of lists of numbers")
            each = [_own("response_weights", group) for group in response_weights]
        if each is not None:
            _check_lists(each, lists)
        groups = cls(
            sizes.cumsum(0).int(),
            torch.tensor([x for group in lists for x in group], dtype=torch.bool),
            weights=None if weights is None else _numbers("weights", _own("weights", weights)),
            response_weights=None if each is None else _numbers("response_weights", [x for own in each for x in own]),
            process_group=process_group,
            context_parallel_group=context_parallel_group,
        )
        return groups if device is None else groups.to(device)

    @property
    def spans(self) -> bool:
        """Whether other ranks have responses of these groups, or tokens of these responses."""
        return self.process_group is not None or self.context_parallel_group is not None

    @property
    def whole(self) -> PreferenceGroups:
        """The groups with the responses of all ranks; these groups themselves where they span none."""
        return self if self._parts is None else self._parts.whole

    @property
    def own(self) -> Tensor:  # (S,) int64
        """The place of each sequence of this rank in `whole`."""
        return torch.arange(self.num_sequences, device=self.ids.device) if self._parts is None else self._parts.own

    def gathered(
        self,
        values: Tensor,  # (S,) a number of each sequence of this rank
    ) -> Tensor:  # (S of whole,) the dtype of values
        """The values of the sequences of all ranks, in the order of `whole`. No gradient flows.

        With a process_group every rank must call it. Integers must be below 2^53.
        """
        if self.process_group is None:
            return values.detach()
        assert self._parts is not None
        own, error = values.new_zeros(1, self.num_sequences, dtype=torch.float64), None
        if values.shape == (self.num_sequences,):
            own = values.detach().double()[None]
        else:
            error = ValueError(f"values must be (S,) = ({self.num_sequences},); got {tuple(values.shape)}")
        found, _, wrong = gathered("gathered", own, self._parts.most, 0, error, self.process_group)
        if wrong is not None:
            raise wrong
        return self._parts.joined(found)[0].to(values.dtype)

    @property
    def num_groups(self) -> int:
        """The number of groups, G."""
        return self.cu_groups.shape[0] - 1

    @property
    def num_sequences(self) -> int:
        """The number of sequences (responses), S."""
        return self.positive.shape[0]

    @property
    def num_pairs(self) -> int:
        """The number of pairs of a positive and a negative in one group. Groups made on a GPU are read back once."""
        if self._num_pairs is None:
            object.__setattr__(self, "_num_pairs", int(self.pair_offsets()[-1]))
        assert self._num_pairs is not None
        return self._num_pairs

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PreferenceGroups:
        """The same groups on another device; nothing is checked again."""
        moved = object.__new__(PreferenceGroups)
        for name, value in vars(self).items():
            moves = isinstance(value, (Tensor, _Parts))
            object.__setattr__(moved, name, value.to(device, non_blocking=non_blocking) if moves else value)
        return moved

    def counts(self) -> tuple[Tensor, Tensor]:
        """Numbers of positives and of negatives in each group, (G,) int64."""
        return _counts(self.cu_groups, self.positive)

    def side(self, positive: bool) -> Tensor:  # (S,) bool, or float64 with response_weights
        """What each sequence counts in the mean over the positives, or negatives, of its group; 0 on the other side."""
        chosen = self.positive if positive else ~self.positive
        return chosen if self.response_weights is None else self.response_weights * chosen

    def _valid_weights(self) -> Tensor:  # () bool
        found = torch.ones((), dtype=torch.bool, device=self.ids.device)
        for each in (self.weights, self.response_weights):
            if each is not None:
                found = found & ((each >= 0) & each.isfinite()).all() & (each.sum() > 0)
        if self.response_weights is not None:
            for positive in (True, False):
                of_side = self.ids.new_zeros(self.num_groups, dtype=torch.float64)
                found = found & (of_side.index_add(0, self.ids, self.side(positive)) > 0).all()
        return found

    def positives_first(self) -> Tensor:
        """() bool: in no group a negative comes before a positive."""
        same = self.ids[1:] == self.ids[:-1]
        return ~(same & self.positive[1:] & ~self.positive[:-1]).any()

    def pair_indices(self, every: bool) -> tuple[Tensor, Tensor]:
        """The (positive, negative) sequences of every pair, group by group, or of each group's only pair; int64."""
        S, device = self.num_sequences, self.positive.device
        if not every:
            start, first = torch.arange(0, S, 2, device=device), self.positive[0::2].long()
            return start + 1 - first, start + first
        pairs = self.counts()[1][self.ids] * self.positive  # (S,) the number of pairs whose positive this sequence is
        i = torch.repeat_interleave(torch.arange(S, device=device), pairs, output_size=self.num_pairs)
        nth = torch.arange(self.num_pairs, device=device) - (pairs.cumsum(0) - pairs)[i]
        by_side = torch.argsort(2 * self.ids + self.positive, stable=True)  # each group's negatives, then its positives
        return i, by_side[self.cu_groups[self.ids[i]] + nth]

    def pair_offsets(self) -> Tensor:
        """(G+1,) int64: group g owns pairs pair_offsets[g] : pair_offsets[g+1] of pair_indices(every=True)."""
        positives, negatives = self.counts()
        return torch.cat([self.ids.new_zeros(1), (positives * negatives).cumsum(0)])


def _own(name: str, values: Any) -> list[Any]:
    check_iterable(name, values, "a list, or lists, one a group")
    return [*values]


def _numbers(name: str, values: list[Any]) -> Tensor:
    for value in values:
        check_number(name, value)
        if isinstance(value, Tensor) and value.is_meta:
            raise ValueError(f"{name} must be numbers; got a tensor without values, on meta")
    return torch.tensor([float(x) for x in values], dtype=torch.float64)


def _counts(cu_groups: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    until = torch.cat([cu_groups.new_zeros(1, dtype=torch.int64), positive.cumsum(0)])
    positives = until[cu_groups.long()].diff()
    return positives, cu_groups.diff() - positives


def _checked(groups: PreferenceGroups, whole: bool = True) -> Tensor:  # (G+1,) int32 | int64
    """cu_groups as offsets. TypeError or ValueError for what is no tensor or has another shape; on a CPU also, naming
    the group, for values that are wrong. whole: whether each group must have a positive and a negative."""
    cu_groups, positive = groups.cu_groups, groups.positive
    check_tensors(cu_groups=cu_groups, positive=positive)
    cu = as_offsets("cu_groups", cu_groups)
    if cu.dim() != 1 or cu.shape[0] < 2:
        got = f"{tuple(cu.shape)} {cu.dtype}"
        raise ValueError(f"cu_groups must be integer and (G + 1,), with at least one group; got {got}")
    if positive.dtype != torch.bool or positive.dim() != 1:
        raise ValueError(f"positive must be bool and (S,); got {tuple(positive.shape)} {positive.dtype}")
    if cu.device != positive.device:
        raise ValueError(f"positive must be on the device of cu_groups, {cu.device}; got {positive.device}")
    S, G = positive.shape[0], cu.shape[0] - 1
    readable = cu.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable:
        _check_offsets(cu, S)
        if whole:
            _check_sides(cu, positive)
    _check_weights("weights", groups.weights, f"(G,) = ({G},)", G, cu.device, readable, whole)
    _check_weights("response_weights", groups.response_weights, f"(S,) = ({S},)", S, cu.device, readable, whole)
    if readable and whole and groups.response_weights is not None:
        _check_side_weights(cu, positive, groups.response_weights.double())
    return cu


def _check_weights(
    name: str, weights: Any, shape: str, n: int, device: torch.device, readable: bool, whole: bool
) -> None:
    if weights is None:
        return
    if not isinstance(weights, Tensor):
        raise TypeError(f"{name} must be a tensor or None; got {type(weights).__name__}")
    check_tensors(**{name: weights})
    if weights.shape != (n,) or weights.dtype == torch.bool or weights.is_complex():
        raise ValueError(f"{name} must be floating or integer and {shape}; got {tuple(weights.shape)} {weights.dtype}")
    if weights.device != device:
        raise ValueError(f"{name} must be on the device of cu_groups, {device}; got {weights.device}")
    if not readable:
        return
    weights = weights.double()
    wrong = (~((weights >= 0) & weights.isfinite())).nonzero()[:1, 0].tolist()
    for i in wrong:
        raise ValueError(f"{name} must be finite and at least 0; {name}[{i}] is {float(weights[i])}")
    if whole and not bool(weights.any()):
        raise ValueError(f"{name} must not all be 0; got {len(weights)} zeros")


def _check_lists(weights: list[list[float]], positive: list[list[bool]]) -> None:
    """ValueError unless the lists are as long; joined, they would say nothing of what belongs together."""
    if len(weights) != len(positive):
        raise ValueError(f"response_weights must have a list a group, {len(positive)}; got {len(weights)}")
    for g, (own, sides) in enumerate(zip(weights, positive)):
        if len(own) != len(sides):
            got = f"{len(own)} for {len(sides)} of group {g}"
            raise ValueError(f"response_weights must have a number a response; got {got}")


def _check_side_weights(cu_groups: Tensor, positive: Tensor, weights: Tensor) -> None:
    for side, chosen in {"positives": positive, "negatives": ~positive}.items():
        for g in (_counts(cu_groups, chosen & (weights > 0))[0] == 0).nonzero()[:1, 0].tolist():
            raise ValueError(f"response_weights must not all be 0 on a side; those of the {side} of group {g} are")


def _check_offsets(cu_groups: Tensor, S: int) -> None:
    offsets = cu_groups.tolist()
    if offsets[0] != 0 or offsets[-1] != S:
        raise ValueError(f"cu_groups must start at 0 and end at S = {S}; got {offsets[0]} and {offsets[-1]}")
    shrinks = (cu_groups.diff() < 0).nonzero()[:, 0].tolist()
    if shrinks:
        start, end = offsets[shrinks[0]], offsets[shrinks[0] + 1]
        raise ValueError(f"cu_groups must not decrease; group {shrinks[0]} starts at {start} and ends at {end}")


def _check_sides(cu_groups: Tensor, positive: Tensor) -> None:
    for side, counts in zip(("positive", "negative"), _counts(cu_groups, positive)):
        for g in (counts == 0).nonzero()[:1, 0].tolist():
            where = f"group {g} (sequences {cu_groups[g]}:{cu_groups[g + 1]})"
            raise ValueError(f"each group must have a positive and a negative; {where} has no {side}")


@dataclass(frozen=True)
class _Parts:
    """The whole groups, and how the numbers of all ranks become those of their sequences."""

    whole: PreferenceGroups
    own: Tensor  # (S,) int64, the place of each sequence of this rank in `whole`
    index: Tensor  # (S of whole,) int64, its place among the ranks' numbers, each rank's padded to `most`
    most: int  # the largest S of any rank

    def joined(
        self,
        values: Tensor,  # (R, k, most)
    ) -> Tensor:  # (k, S of whole)
        return values.transpose(0, 1).flatten(1)[:, self.index]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> _Parts:
        own, index = (x.to(device, non_blocking=non_blocking) for x in (self.own, self.index))
        return _Parts(self.whole.to(device, non_blocking), own, index, self.most)

    @classmethod
    def of(cls, groups: PreferenceGroups) -> _Parts:
        """Collective. It raises on every rank where one has wrong groups, or where those of the ranks do not fit."""
        error: Exception | None = None
        device, cu, body = None, torch.zeros(1, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.float64)
        given = [groups.weights is not None, groups.response_weights is not None]
        try:
            _checked(groups, whole=False)
            # Ranks tell each other their values, so these are read and checked on every device.
            device, cu = groups.positive.device, groups.cu_groups.cpu().long()
            S = groups.num_sequences
            _check_offsets(cu, S)
            ids = torch.repeat_interleave(cu.diff(), output_size=S)
            rows = [2 * ids.double() + groups.positive.cpu()]
            if groups.weights is not None:
                rows.append(groups.weights.detach().cpu().double()[ids])
            if groups.response_weights is not None:
                rows.append(groups.response_weights.detach().cpu().double())
            body = torch.stack(rows)
        except Exception as raised:  # the other ranks must know
            error = raised
        G, S = cu.shape[0] - 1, body.shape[1]
        told = [body]
        if groups.context_parallel_group is not None:
            told, error = _told(body, G, given, error, groups.context_parallel_group)
            if error is None and not all(torch.equal(told[0], other) for other in told):
                what = "cu_groups, positive and weights" if any(given) else "cu_groups and positive"
                error = ValueError(f"{what} must be the same on every rank of context_parallel_group")
            told = [body]
        if groups.process_group is not None:
            told, error = _told(body, G, given, error, groups.process_group)
        if error is not None:
            raise error
        joined = torch.cat(told, 1)
        code, *numbers = joined
        most = max(part.shape[1] for part in told)
        ids, order = (code.long() // 2).sort(stable=True)
        cu_whole = torch.cat([cu[:1], torch.bincount(ids, minlength=G).cumsum(0)])
        weights = _of_groups(numbers.pop(0)[order], ids, cu_whole) if given[0] else None
        whole = PreferenceGroups(
            cu_whole.int(),
            (code.long() % 2 == 1)[order],
            weights=weights,
            response_weights=numbers.pop(0)[order] if given[1] else None,
        )
        places = torch.cat([r * most + torch.arange(part.shape[1]) for r, part in enumerate(told)])
        rank = 0 if groups.process_group is None else torch.distributed.get_rank(groups.process_group)
        start = sum(part.shape[1] for part in told[:rank])
        own = order.argsort()[start : start + S]
        assert device is not None  # there is an error otherwise
        return cls(whole, own, places[order], most).to(device)


def _of_groups(
    weights: Tensor,  # (S,) float64, of the group of each sequence
    ids: Tensor,  # (S,) int64
    cu_groups: Tensor,  # (G+1,) int64
) -> Tensor:  # (G,)
    """The weight of each group. ValueError where its sequences, on several ranks, tell different ones."""
    found = weights[cu_groups[:-1].clamp(max=len(weights) - 1)]
    for i in (weights != found[ids]).nonzero()[:1, 0].tolist():
        got = f"{float(found[ids[i]])} and {float(weights[i])} for group {int(ids[i])}"
        raise ValueError(f"weights must be the same on every rank that has a part of a group; got {got}")
    return found


def _told(
    body: Tensor,  # (k, S) float64
    G: int,
    given: Sequence[bool],  # which weights there are
    error: Exception | None,
    group: Any,
) -> tuple[list[Tensor], Exception | None]:
    """The body of every rank, and the error that this rank must raise."""
    rows, error = agreed("PreferenceGroups", [G, body.shape[1], *given], error, group)
    if error is None and len({row[0] for row in rows}) > 1:
        got = ", ".join(str(row[0]) for row in rows)
        error = ValueError(f"cu_groups must have as many groups on every rank; got {got}")
    if error is None and len({(row[2], row[3]) for row in rows}) > 1:
        error = ValueError("weights and response_weights must be given on every rank, or on none; got both")
    if error is not None:
        return [body], error
    most = max(row[1] for row in rows)
    found, _, error = gathered("PreferenceGroups", body, most, 0, error, group)
    return [each[:, : row[1]] for each, row in zip(found, rows)], error
