"""sDPO (arXiv 2403.19270): the data comes in K parts, and the reference of stage k is the model after stage k-1.

The loss of each stage is DPO's, and so its first value is ln 2.

`run_stages` needs no trainer: it scores part k once under the current weights, in evaluation mode and without
gradients, keeps the log-probabilities on disk, then calls train(model, part, ref_logps, stage), which trains this
model in place. The reference is those numbers, so a second model is never held: neither in full fine-tuning nor with
LoRA, where the reference is base + adapters as of the start of the stage (which no `disable_adapter()` gives back once
the adapters train on).

A process may die at any point, and the same call resumes to the same result, bit for bit where train is deterministic:
files are written under another name, synchronised, then renamed; each carries a checksum and the hash of all that its
content depends on, so that a stale, half-written or foreign one is never read. Any number of processes may share a
directory. A stage that was interrupted starts again from its first step, but keeps its scores.

The module never changes the data, the trainer or the mode of a module, or unpickles anything but tensors and plain
values. It needs a train that depends on its arguments, the seeded generators and `options` alone, and parts whose items
are the same each time they are read. Under torch.distributed all ranks call, and each scores the whole part or, with
spread=True, some chunks of it.
The cost is a forward of the data, a hash of the data and one of the weights each stage; on disk the scores, and after
each stage the tensors that differ from the model as given.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..distributed import is_distributed
from ..files import check_writable
from ..models.api import model_logps
from ..preference.groups import PreferenceGroups
from ..preference.segments import seq_logps
from .store import UnusableFileError, description, digest, read, tensor_digests, write

logger = logging.getLogger(__name__)


class Rows(Protocol):
    """Data, or a part of it: a list, a torch Dataset, a datasets.Dataset."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


# ------------------------------------------------------------------------------------------------------------- splits


def equal_parts(num_rows: int, num_parts: int) -> list[list[int]]:
    """Row indices in their order, in parts whose sizes differ by one at most."""
    if not 1 <= num_parts <= num_rows:
        raise ValueError(f"num_parts must be from 1 to the number of rows, {num_rows}; got {num_parts}")
    ends = [num_rows * k // num_parts for k in range(num_parts + 1)]
    return [list(range(start, end)) for start, end in itertools.pairwise(ends)]


def by_column(rows: Rows, column: str = "stage", order: Sequence[Any] | None = None) -> list[list[int]]:
    """Row indices, in one part for each value of a column; parts have the order of the values, or that of `order`."""
    parts: dict[Any, list[int]] = {} if order is None else {value: [] for value in order}
    for i in range(len(rows)):
        row = rows[i]
        if column not in row:
            raise ValueError(f"column {column!r} must be in every row; row {i} has only {[*row]}")
        if order is not None and row[column] not in parts:
            raise ValueError(f"order must name every value of {column!r}; row {i} has {row[column]!r}")
        parts.setdefault(row[column], []).append(i)
    for value in (value for value, part in parts.items() if not part):
        raise ValueError(f"order must name values of {column!r} only; no row has {value!r}")
    try:
        return [parts[value] for value in (sorted(parts) if order is None else order)]
    except TypeError as e:
        raise TypeError(f"values of {column!r} must have an order, or give `order`; got {list(parts)[:8]}") from e


def reward_accuracy(
    scores: Tensor,  # (S,) floating
    groups: PreferenceGroups,
) -> tuple[Tensor, Tensor]:  # (G,), (G,) float64
    """(accuracy, margin): the share of a group's pairs that scores order rightly, ties by half, and the mean margin."""
    if scores.shape != (groups.num_sequences,) or not scores.is_floating_point():
        got = f"{tuple(scores.shape)} {scores.dtype}"
        raise ValueError(f"scores must be floating and (S,) = ({groups.num_sequences},); got {got}")
    scores, groups = scores.detach().double().cpu(), groups.to("cpu")
    for s in (~scores.isfinite()).nonzero()[:1, 0].tolist():
        raise ValueError(f"scores must be finite; scores[{s}] is {float(scores[s])}")
    positive, negative = groups.pair_indices(every=True)
    margin, offsets = scores[positive] - scores[negative], groups.pair_offsets()
    right = (margin > 0).double() + (margin == 0).double() / 2
    return seq_logps(right, offsets) / offsets.diff(), seq_logps(margin, offsets) / offsets.diff()


def easy_to_hard(
    scores: Tensor,  # (S,) floating
    groups: PreferenceGroups,
    into: int | Sequence[Sequence[int]],
) -> list[list[int]]:
    """Group indices in parts, the most accurate first by `reward_accuracy`; equal ones by margin, then in their order.

    Args:
        scores: log-probabilities of the responses under the reference (`reference_logps`), sums or means.
        groups: which responses belong together; a group is a row of the data. Pairs are ordered by their margins.
        into: a number of equal parts, or given parts (sources of data, as in the paper), which are then only ordered.
    """
    accuracy, margin = (x.tolist() for x in reward_accuracy(scores, groups))
    if isinstance(into, int):
        order = sorted(range(len(accuracy)), key=lambda g: (-accuracy[g], -margin[g], g))
        return [[order[i] for i in part] for part in equal_parts(len(order), into)]
    parts = [list(part) for part in into]
    _check_parts(parts)

    def ease(part: list[int]) -> tuple[float, float]:
        return -sum(accuracy[g] for g in part) / len(part), -sum(margin[g] for g in part) / len(part)

    return sorted(parts, key=ease)


def take(rows: Rows, indices: Iterable[int]) -> Any:
    """The rows with these indices: a datasets.Dataset where the data is one, else a list."""
    chosen = list(indices)
    for i in (i for i in chosen if not 0 <= i < len(rows)):
        raise ValueError(f"indices must be from 0 to {len(rows) - 1}; got {i}")
    select = getattr(rows, "select", None)
    return [rows[i] for i in chosen] if select is None else select(chosen)


# ------------------------------------------------------------------------------------------------------------- runner


def sequence_logps(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Tensor:  # (S,) float32
    """The default `score`: log-probabilities of the sequences of batches, in order, by `model_logps`.

    A batch has input_ids (B, L), targets (B, L) as in `model_logps`, and what else the model's forward takes. With
    cu_seqlens (s+1,) its rows, laid end to end, hold packed sequences; without it each row is one sequence. `groups`,
    `positive` and `cu_groups` are not passed to the forward.
    """
    device, sums = next(model.parameters()).device, []
    for batch in batches:
        inputs: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        input_ids, targets, cu_seqlens = (inputs.pop(k, None) for k in ("input_ids", "targets", "cu_seqlens"))
        if not all(isinstance(x, Tensor) and x.dim() == 2 for x in (input_ids, targets)):
            raise ValueError(f"a batch must hold (B, L) tensors input_ids and targets, or give `score`; got {[*batch]}")
        for name in ("groups", "positive", "cu_groups"):
            inputs.pop(name, None)
        token_logps = model_logps(model, input_ids, targets, **inputs)
        if cu_seqlens is None:
            B, L = token_logps.shape
            cu_seqlens = torch.arange(0, B * L + 1, L, device=device)
        sums.append(seq_logps(token_logps.flatten(), cu_seqlens))
    return torch.cat(sums)


def _num_sequences(batch: Mapping[str, Any]) -> int:
    cu_seqlens = batch.get("cu_seqlens")
    return len(batch["input_ids"]) if cu_seqlens is None else len(cu_seqlens) - 1


def reference_logps(
    model: nn.Module,
    part: Rows,
    directory: str | Path,
    *,
    score: Callable[[nn.Module, Any], Tensor] | None = None,
    count: Callable[[Any], int] | None = None,
    chunk_size: int = 64,
    options: Mapping[str, Any] | None = None,
    fingerprint: Callable[[nn.Module], Mapping[str, str]] = tensor_digests,
    spread: bool = False,
) -> Tensor:  # (S, ...) on the CPU
    """Scores of a part under the model as it is, read from disk where they are. The arguments are `run_stages`'s."""
    _check_parts([part])
    scorer = _Scorer(Path(directory), score, count, chunk_size, [options, description(model)], spread)
    return scorer(model, part, _digest_rows(part), fingerprint(model), "part")


def run_stages(
    model: nn.Module,
    parts: Sequence[Rows],
    train: Callable[[nn.Module, Any, Tensor, int], Any],
    directory: str | Path,
    *,
    score: Callable[[nn.Module, Any], Tensor] | None = None,
    count: Callable[[Any], int] | None = None,
    chunk_size: int = 64,
    options: Mapping[str, Any] | None = None,
    seed: int | None = 0,
    save: Callable[[nn.Module, Path], Any] | None = None,
    load: Callable[[nn.Module, Path], Any] | None = None,
    fingerprint: Callable[[nn.Module], Mapping[str, str]] = tensor_digests,
    spread: bool = False,
) -> None:
    """Trains the model in place on one part after the other, and resumes where an earlier call with this directory was.

        parts = [take(rows, indices) for indices in by_column(rows, "stage")]
        run_stages(model, parts, train, "sdpo", score=score)

    Args:
        model: the reference of stage 1, and the policy throughout. To resume, it must have the weights of the first
            call: a model that an exception left half-trained is another model, and begins another run.
        parts: the data of each stage, in order; see `equal_parts`, `by_column`, `easy_to_hard` and `take`.
        train: train(model, part, ref_logps, stage), stage from 1. ref_logps holds the results of score, on the CPU.
        directory: the folder of the results, made if need be. Files of other models, data or options are kept.
        score: score(model, rows) -> (S, ...) floating, for `chunk_size` rows of a part. None takes `sequence_logps`.
        count: how many values a row gives. None means one or, with score=None, the batch's number of sequences.
        chunk_size: the number of rows in a file of scores, which is what an interruption can cost.
        options: what else the result depends on (learning rate, temperature): plain values. Others start a new run.
        seed: each stage seeds Python, NumPy if loaded, and torch with seed + stage. None leaves this to train.
        save, load: called as (model, path), path free for a file or a folder. They must give back the same weights.
            Under torch.distributed every rank calls them with the same path; other processes need other directories.
            None saves the changed tensors of the state dict in one file; sharded models need functions of their own.
        fingerprint: a function from the model to {name: hash of the weight}, for weights outside the state dict.
        spread: whether ranks score different chunks, each once, instead of all chunks each. `score` is called equally
            often on every rank, with no rows where a rank has none left: it must then give an empty tensor.

    Raises ValueError for no or empty parts, for scores of another length or not finite (naming the row and the value),
    and where `load` gives back other weights than `save` was given. Progress goes to the logger of this module.
    """
    if (save is None) != (load is None):
        raise ValueError(f"save and load must be given together; got save={save!r}, load={load!r}")
    parts = list(parts)
    _check_parts(parts)
    context = [options, description(model)]  # taken now, since trainers write into a model's config
    scorer = _Scorer(Path(directory), score, count, chunk_size, context, spread)
    rows = [_digest_rows(part) for part in parts]
    start, names = fingerprint(model), set(model.state_dict())
    # Stage k depends on the stages before it, not on those after it, so that parts may be added at the end.
    run = digest(["run", context, scorer.name, chunk_size, seed, start])
    runs = list(itertools.accumulate(rows, lambda run, part: digest([run, part]), initial=run))
    records = {k: scorer.directory / f"stage-{k}-{runs[k][:16]}.pt" for k in range(1, len(runs))}
    (done, record), weights = _last_stage(records, runs), start
    if record is not None:
        if load is None:
            _copy_into(model, record["tensors"])
        else:
            load(model, records[done].with_suffix(""))
        weights = fingerprint(model)
        if digest(weights) != record["weights"]:
            raise ValueError(f"load must give back the weights that were saved after stage {done}; it gave others")
        logger.info("stage %d of %d: done before, loaded from %s", done, len(parts), records[done])
    elif any(path not in records.values() for path in scorer.directory.glob("stage-*.pt")):
        logger.warning("%s holds stages of other models, data or options: training from stage 1", directory)
    if done < len(parts):
        check_writable(scorer.directory)
    for k in range(done + 1, len(parts) + 1):
        part, before = parts[k - 1], weights
        ref_logps = scorer(model, part, rows[k - 1], before, f"stage {k}")
        logger.info("stage %d of %d: training on %d rows", k, len(parts), len(part))
        if seed is not None:
            _seed(seed + k)
        train(model, part, ref_logps, k)
        weights = fingerprint(model)
        if weights == before:
            warnings.warn(f"stage {k} left the weights as they were: train must train the model given", stacklevel=2)
        content: dict[str, Any] = {"run": runs[k], "weights": digest(weights)}
        if save is None:
            state = model.state_dict()
            if state.keys() != names:
                more = sorted(state.keys() ^ names)[:3]
                raise ValueError(f"train must not add or remove tensors (adapters: before); stage {k} did: {more} ...")
            changed = (name for name in state if weights.get(name, "") != start.get(name))
            content["tensors"] = {name: state[name].detach().cpu() for name in changed}
        else:
            save(model, records[k].with_suffix(""))
            _gather(None)  # the record is written after every rank has saved
        write(records[k], content)
        logger.info("stage %d of %d: done, saved to %s", k, len(parts), records[k])


def _last_stage(records: Mapping[int, Path], runs: Sequence[str]) -> tuple[int, dict[str, Any] | None]:
    """The last stage that all ranks can load, and its record; (0, None) stands for the model as given."""
    for k in sorted(records, reverse=True):
        record = None
        try:
            record = read(records[k], run=runs[k])
        except FileNotFoundError:
            pass
        except UnusableFileError as e:
            warnings.warn(f"{e}: stage {k} is trained again", stacklevel=3)
        if all(_gather(record is not None)):
            return k, record
    return 0, None


class _Scorer:
    """Scores parts, with one file a chunk."""

    def __init__(
        self,
        directory: Path,
        score: Callable[[nn.Module, Any], Tensor] | None,
        count: Callable[[Any], int] | None,
        chunk_size: int,
        context: list[Any],
        spread: bool,
    ) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1; got {chunk_size}")
        self.directory, self.chunk_size, self.context, self.spread = directory, chunk_size, context, spread
        self.score = sequence_logps if score is None else score
        self.count = _num_sequences if score is None and count is None else count
        self.name = getattr(self.score, "__qualname__", type(self.score).__qualname__)

    def __call__(self, model: nn.Module, part: Rows, rows: str, weights: Mapping[str, str], where: str) -> Tensor:
        kind = next(model.parameters()).device.type
        autocast = [torch.is_autocast_enabled(kind), str(torch.get_autocast_dtype(kind))]
        key = digest(["ref", self.context, self.name, self.chunk_size, autocast, rows, weights])
        folder = self.directory / f"ref-{key[:16]}"
        chunks = range(-(-len(part) // self.chunk_size))
        paths = [folder / f"{i:06}.pt" for i in chunks]
        found, unusable = {}, []
        for i in chunks:
            try:
                found[i] = read(paths[i], key=key, chunk=i)["values"]
            except FileNotFoundError:
                pass
            except UnusableFileError as e:
                unusable.append(str(e))
        if unusable:
            more = f" (and {len(unusable) - 1} more)" if unusable[1:] else ""
            warnings.warn(f"{unusable[0]}{more}: computed again", stacklevel=3)
        held = _gather(set(found))
        # A forward may be a collective: without `spread` all ranks score the chunks that any of them lacks.
        lacking = set(chunks) - (set.union if self.spread else set.intersection)(*held)
        missing, (ranks, rank) = sorted(lacking), _place() if self.spread else (1, 0)
        logger.info("%s: %d of %d chunks to score", where, len(missing), len(chunks))
        if missing:
            check_writable(folder)
        with _evaluating(model):
            for at in range(0, len(missing), ranks):
                turn = missing[at : at + ranks]
                try:
                    for i in turn[rank : rank + 1]:
                        found[i] = self._score_chunk(model, part, i * self.chunk_size, where)
                        write(paths[i], {"key": key, "chunk": i, "values": found[i]})
                    if rank >= len(turn):
                        self.score(model, [])
                except Exception:
                    if ranks > 1:
                        _gather(True)
                    raise
                if ranks > 1 and any(_gather(False)):
                    raise RuntimeError(
                        f"scoring stops on every rank, because it has failed on another; {where}: its error says why"
                    )
                if (turn[-1] + 1) % max(1, len(chunks) // 10) < len(turn):
                    logger.info("%s: scored chunk %d of %d", where, turn[-1] + 1, len(chunks))
        if self.spread:
            self._exchange(found)
        return torch.cat([found[i] for i in chunks])

    def _exchange(self, found: dict[int, Tensor]) -> None:
        """Gives each rank the chunks that it lacks, from the first rank that holds them."""
        held, (_, rank) = _gather(set(found)), _place()
        lacking = set.union(*held) - set.intersection(*held)
        sender = {i: next(r for r, has in enumerate(held) if i in has) for i in lacking}
        for sent in _gather({i: found[i] for i in lacking if sender[i] == rank}):
            found.update(sent)

    def _score_chunk(self, model: nn.Module, part: Rows, start: int, where: str) -> Tensor:
        chunk = take(part, range(start, min(start + self.chunk_size, len(part))))
        values = self.score(model, chunk)
        counts = [1 if self.count is None else self.count(chunk[i]) for i in range(len(chunk))]
        if not isinstance(values, Tensor) or not values.is_floating_point():
            got = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"score must give a floating tensor; {where}: got {got}")
        span = f"rows {start}:{start + len(chunk)}"
        if values.dim() < 1 or len(values) != sum(counts):
            raise ValueError(f"score must give {sum(counts)} values for {where}, {span}; got {tuple(values.shape)}")
        values = values.detach().cpu().clone()  # a view would be saved with its whole storage
        for at in (~values.isfinite()).nonzero()[:1].tolist():
            row = next(n for n in range(len(counts)) if at[0] < sum(counts[: n + 1]))
            raise ValueError(f"score must be finite; {where}, row {start + row} has {float(values[tuple(at)])}")
        return values


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """A context without gradients and dropout; each module's mode is restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _copy_into(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    state = model.state_dict()
    with torch.no_grad():
        for name, value in tensors.items():
            state[name].copy_(value)


def _seed(seed: int) -> None:
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _gather(value: Any) -> list[Any]:
    """The value of each rank, after waiting for all; that of this process alone where there are no ranks."""
    if not is_distributed():
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _place() -> tuple[int, int]:
    """(number of ranks, this rank)."""
    if not is_distributed():
        return 1, 0
    return torch.distributed.get_world_size(), torch.distributed.get_rank()


def _check_parts(parts: Sequence[Rows]) -> None:
    if not parts:
        raise ValueError("parts must be at least one; got none")
    for k, part in enumerate(parts, 1):
        if not len(part):
            raise ValueError(f"parts must not be empty; part {k} of {len(parts)} is")


def _digest_rows(rows: Rows) -> str:
    return digest([digest(rows[i]) for i in range(len(rows))])
