"""PreferenceGroups says which responses belong together, and which of them are preferred: plain, checked tensors.

What is derived from them is vectorised over ragged groups, stays in bounds whatever the offsets, and reads nothing back
from a device. The module never sees a loss or a model. The cost is O(S) integers, and O(pairs) where pairs are listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .segments import as_offsets, bounded_offsets


@dataclass(frozen=True, eq=False)
class PreferenceGroups:
    """Ragged groups of responses: group g owns sequences cu_groups[g] : cu_groups[g+1], positives anywhere among them.

    Each group needs a positive and a negative. On a CPU a ValueError names a group that lacks one; elsewhere values
    are not read back, and such groups give NaN. Make groups on the CPU and move them with `.to(device)`.
    """

    cu_groups: Tensor  # (G+1,) integer; stored as int32 or int64
    positive: Tensor  # (S,) bool
    ids: Tensor = field(init=False, repr=False)  # (S,) int64, the group of each sequence
    valid: Tensor = field(init=False, repr=False)  # () bool; False is possible only where values were not read
    max_size: int = field(init=False, repr=False)  # a bound on the responses of a group: S where sizes were not read
    _num_pairs: int | None = field(init=False, repr=False)  # None where it was not read

    def __post_init__(self) -> None:
        cu, positive = self.cu_groups, self.positive
        for name, x in {"cu_groups": cu, "positive": positive}.items():
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
        cu = as_offsets("cu_groups", cu)
        if cu.dim() != 1 or cu.shape[0] < 2:
            got = f"{tuple(cu.shape)} {cu.dtype}"
            raise ValueError(f"cu_groups must be integer and (G + 1,), with at least one group; got {got}")
        if positive.dtype != torch.bool or positive.dim() != 1:
            raise ValueError(f"positive must be bool and (S,); got {tuple(positive.shape)} {positive.dtype}")
        if cu.device != positive.device:
            raise ValueError(f"positive must be on the device of cu_groups, {cu.device}; got {positive.device}")
        readable = cu.device.type == "cpu" and not torch.compiler.is_compiling()
        S = positive.shape[0]
        if readable:
            _check_groups(cu, positive)
        bounded, covered = bounded_offsets(cu, S)
        # repeat_interleave would trust the offsets; searchsorted stays in bounds.
        ids = torch.searchsorted(
            bounded[1:].contiguous(), torch.arange(S, device=cu.device, dtype=cu.dtype), right=True
        )
        object.__setattr__(self, "cu_groups", bounded)
        object.__setattr__(self, "ids", ids.clamp(max=cu.shape[0] - 2))
        positives, negatives = self.counts()
        object.__setattr__(self, "valid", covered & ((positives > 0) & (negatives > 0)).all())
        object.__setattr__(self, "max_size", int(cu.diff().max()) if readable else S)
        object.__setattr__(self, "_num_pairs", int((positives * negatives).sum()) if readable else None)

    @classmethod
    def pairs(cls, n: int, device: torch.device | str | None = None) -> PreferenceGroups:
        """Makes n groups of two: a chosen response, then its rejected one."""
        if n < 1:
            raise ValueError(f"n must be at least 1; got {n}")
        return cls.from_lists([[True, False]] * n, device)

    @classmethod
    def from_lists(
        cls,
        positive: Iterable[Sequence[bool]],
        device: torch.device | str | None = None,
    ) -> PreferenceGroups:
        """Takes one list a group, one bool a response: `from_lists([[True, False, False], [False, True]])`."""
        lists = [list(map(bool, group)) for group in positive]
        sizes = torch.tensor([0, *map(len, lists)], dtype=torch.int64)
        groups = cls(sizes.cumsum(0).int(), torch.tensor([x for group in lists for x in group], dtype=torch.bool))
        return groups if device is None else groups.to(device)

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
            is_tensor = isinstance(value, Tensor)
            object.__setattr__(moved, name, value.to(device, non_blocking=non_blocking) if is_tensor else value)
        return moved

    def counts(self) -> tuple[Tensor, Tensor]:
        """Numbers of positives and of negatives in each group, (G,) int64."""
        return _counts(self.cu_groups, self.positive)

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


def _counts(cu_groups: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    until = torch.cat([cu_groups.new_zeros(1, dtype=torch.int64), positive.cumsum(0)])
    positives = until[cu_groups.long()].diff()
    return positives, cu_groups.diff() - positives


def _check_groups(cu_groups: Tensor, positive: Tensor) -> None:
    """ValueError, naming the group, unless offsets are right and each group has both sides. Reads values."""
    offsets, S = cu_groups.tolist(), positive.shape[0]
    if offsets[0] != 0 or offsets[-1] != S:
        raise ValueError(f"cu_groups must start at 0 and end at S = {S}; got {offsets[0]} and {offsets[-1]}")
    shrinks = (cu_groups.diff() < 0).nonzero()[:, 0].tolist()
    if shrinks:
        start, end = offsets[shrinks[0]], offsets[shrinks[0] + 1]
        raise ValueError(f"cu_groups must not decrease; group {shrinks[0]} starts at {start} and ends at {end}")
    for side, counts in zip(("positive", "negative"), _counts(cu_groups, positive)):
        for g in (counts == 0).nonzero()[:1, 0].tolist():
            where = f"group {g} (sequences {offsets[g]}:{offsets[g + 1]})"
            raise ValueError(f"each group must have a positive and a negative; {where} has no {side}")
