"""Predicts the memory of a training step on hardware that is not at hand: which group fits, and what takes the most.

The step of workload.py runs on fake tensors (shapes, no memory, no arithmetic) under the tracker of tracker.py. A
deep model is not run in full: a step of n equal layers has parts (a layer's forward, its backward, the head, the
optimizer), the peak of each is linear in n and in the size of a batch, and the peak of the step is the largest of them.
So few layers of each kind and two group sizes give all others, exactly (layers of one kind must be alike: a model whose
config does not name its kinds has one). Small models, and groups no larger than those that were run, are run as they
are. A prompt that runs once is the same in all groups, so its parts of the step are kept apart from those of batches.

Rules, not the tracker, give the workspace of this package's ops (`lm_head.workspace`) and what engines do.
FSDP2 splits parameters, gradients and the optimizer's state over the ranks. The head is whole from a forward to the end
of its backward, and so are two layers, with the gradient of one; the embedding, and the gradients of both, are whole
where they are at work.
ZeRO 3 splits the same. Up to 10^9 parameters are whole at a time, and up to 5 x 10^8 gradients wait for their sum, as
its configuration has it unless told otherwise; it steps float32 weights of its own, with float32 states.
A rank of tensor parallelism runs a model of its own share: attention heads, MLP, and rows of embedding and LM head are
divided. `traffic.py` says what ranks send each other.
`headroom` stands for what a framework takes besides tensors (about half a GiB of a GPU) and what an allocator loses to
fragments. Masks of padded batches are not counted.
The planner never downloads or allocates what it counts. It needs transformers, seconds a strategy, and some 100 MB.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..distributed import planned_as_sharded
from ..lm_head.logit_cache import nothing_kept
from ..models.api import assume_logit_map
from ..models.decoder_layers import layers_of
from ..models.head_call import LogitMap
from .fake import fake_copy, tensors_in
from .tracker import BLOCK, MemoryTracker, Part, Peak, follow_layers
from .traffic import ENGINES, KEPT, Order, Sizes, Unit, batches_of, traffic
from .workload import STRATEGIES, TrainingStep, Workload, build_model, config_of, strategies_of, take_layers

GiB = 2**30
MOST_RESPONSES = 4096  # no plan looks for larger groups
_SPLIT = ("parameters", "gradients", "optimizer")
# Elements that DeepSpeed holds at once unless told otherwise: whole parameters, gradients, what a step takes.
_ZERO3_WHOLE, _ZERO3_WAITING, _ZERO3_STEP = 10**9, 5 * 10**8, 10**9


@dataclass(frozen=True)
class Hardware:
    """The devices that the step runs on.

    Args:
        memory: bytes of one device.
        ranks: number of devices over which the engine shards the model; 1 means that none does.
        engine: what shards the model: fsdp2 or zero3.
        tensor_parallel: number of devices that share each layer and the head; there are so many times ranks devices.
        headroom: share of the memory that must stay free.
        device: kind of device that is planned for, cuda or cpu, because the ops' workspace depends on it.
        reference: whether the device also holds a frozen copy of the model.
    """

    memory: int = 80 * 10**9
    ranks: int = 1
    headroom: float = 0.05
    device: str = "cuda"
    reference: bool = False
    engine: str = "fsdp2"
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        for name in ("memory", "ranks", "tensor_parallel"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1; got {value!r}")
        if not 0 <= self.headroom < 1:
            raise ValueError(f"headroom must be in [0, 1); got {self.headroom}")
        if self.device not in ("cuda", "cpu"):
            raise ValueError(f"device must be cuda or cpu; got {self.device!r}")
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {self.engine!r}")

    @property
    def devices(self) -> int:
        return self.ranks * self.tensor_parallel

    @property
    def usable(self) -> int:
        return int(self.memory * (1 - self.headroom))


# -------------------------------------------------------------------------------------------------------------- a trace


def trace(workload: Workload, model: nn.Module, device: str | None, sharded: bool = False) -> dict[str, Peak]:
    """{part of the step: its peak} of a step on fake tensors. `model` is on the device meta, and is changed. sharded:
    whether the step is in the order that an engine needs which shards the model."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    step = TrainingStep(workload, "cpu", fake_copy(model, mode))
    step.group_of(workload.group, workload.num_positives)
    step.group_of(2, 1)
    vocabulary = int(step.model.config.get_text_config().vocab_size)  # type: ignore[union-attr,operator]
    assume_logit_map(step.model, LogitMap(vocabulary))
    tracker = tracker_of(workload, vocabulary, device, fake=True)
    follow_layers(layers_of(step.model), tracker)
    with contextlib.ExitStack() as contexts:
        for context in (mode, tracker, *[nothing_kept()] * (device == "cuda"), *[planned_as_sharded()] * sharded):
            contexts.enter_context(context)
        return track(step, tracker)


def track(step: TrainingStep, tracker: MemoryTracker) -> dict[str, Peak]:
    """Runs a step within its tracker, on fake or real tensors, and returns {part of the step: its peak}."""
    tracker.follow(step.model)
    if step.workload.lora_rank:
        tracker.gradient_shapes = {p.shape for p in step.trainable}
    step.begin = tracker.begin
    step.make_state()
    state = [x for values in step.optimizer.state.values() for x in values.values() if isinstance(x, Tensor)]
    tracker.adopt(state, "optimizer")
    tracker.peaks.clear()  # drops the peaks of the preparation
    tracker.begin("start")

    def mark(name: str) -> None:
        tracker.new = "optimizer" if name == "optimizer" else "activations"
        tracker.begin(name)

    step.run(mark=mark)
    return tracker.peaks


def tracker_of(workload: Workload, vocabulary: int, device: str | None, *, fake: bool) -> MemoryTracker:
    """A tracker that knows the sizes of the step's batches."""
    sizes = {"two_pass": min(workload.micro_batch, workload.group), "one_pass": 1, "pairs": 2}
    lengths = (workload.response,) if workload.share_prompt else (workload.response, workload.tokens)
    return MemoryTracker(vocabulary, sizes.get(workload.strategy, workload.group), lengths, device, fake=fake)


def skeleton(model: nn.Module, layers: Sequence[int] | None = None) -> nn.Module:
    """A copy of the model, or of these layers of it, on the device meta, which allocates no weights."""
    memo: dict[int, Any] = {}
    for x in (*model.parameters(), *model.buffers()):
        bare = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        memo[id(x)] = nn.Parameter(bare, x.requires_grad) if isinstance(x, nn.Parameter) else bare
    found: Any = copy.deepcopy(model, memo)
    if layers is not None:
        own = layers_of(found)
        kept = [own[i] for i in layers]
        del own[:]
        own.extend(kept)
        take_layers(found.config.get_text_config(), layers)
    return found


# -------------------------------------------------------------------------------------------------------- extrapolation


def depths_of(config: Any, last: int = 1) -> tuple[list[int], list[tuple[list[int], int]]]:
    """Few layers that stand for all: (their numbers, [(these and one more of a kind, how many more there are)]).

    Layers are of one kind, or of several where the config says so (sliding and full attention). The numbers hold the
    first layer, the `last` ones, and one of each kind between them.
    """
    n = int(config.num_hidden_layers)
    kinds = list(getattr(config, "layer_types", None) or ["layer"] * n)
    numbers = {kind: [i for i in range(1, n - last) if kinds[i] == kind] for kind in dict.fromkeys(kinds)}
    inner = {kind: some for kind, some in numbers.items() if some}
    if n <= 1 + last + 2 * len(inner):
        return list(range(n)), []
    base = [0, *sorted(some[0] for some in inner.values()), *range(n - last, n)]
    more = [(sorted([*base, some[1]]), len(some) - 1) for some in inner.values() if len(some) > 1]
    return base, more


class Prediction:
    """Predicts the peaks of a workload's strategy at any group size.

    Args:
        make: a function from numbers of layers to the model with these layers alone, on the device meta.
        config: the config of the whole model.
    """

    def __init__(
        self,
        workload: Workload,
        hardware: Hardware,
        make: Callable[[Sequence[int]], nn.Module] | None = None,
        config: Any = None,
    ) -> None:
        self.workload, self.hardware = workload, hardware
        split = hardware.tensor_parallel
        self.make = make or (lambda layers: build_model(workload, torch.device("meta"), layers, split))
        self.config = config_of(workload) if config is None else config
        self._traced: dict[int, dict[str, Peak]] = {}
        size, least = workload.micro_batch, workload.prompts + workload.prompts % 2
        self.bases = {"two_pass": (2 * size, 4 * size), "pairs": (4, 4)}.get(workload.strategy, (least, 2 * least))

    def at(self, group: int) -> Peak:
        """The step's peak at this group size, and what is alive then."""
        parts = self.parts_at(group)
        return max(parts.values(), key=lambda peak: peak.total)

    def parts_at(self, group: int) -> dict[str, Peak]:
        """{part of the step: its peak} at this group size."""
        low, high = self.bases
        if self.workload.share_prompt and self.workload.strategy == "two_pass":
            # The last micro-batch, whose backward runs with that of the prompt, is as small as in the whole group.
            low, high = (size + group % self.workload.micro_batch for size in (low, high))
        if group <= high:
            parts = self._deep(group)
        elif low == high:
            parts = self._deep(high)  # a larger group repeats the batches of a smaller one
        else:
            parts = _sum(self._deep(low), self._deep(low), self._deep(high), (group - low) / (high - low))
        return {name: self._placed(name, peak) for name, peak in parts.items()}

    def largest_group(self) -> int:
        """The largest group that fits, or 0 where none does. Its size is even unless `positives` is given."""
        positives = self.workload.positives
        step, least = (2, 2) if positives is None else (1, positives + 1)
        if self.at(least).total > self.hardware.usable:
            return 0
        low, high = 0, max(0, (MOST_RESPONSES - least) // step)
        if self.at(least + step * high).total <= self.hardware.usable:
            return least + step * high
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.at(least + step * middle).total <= self.hardware.usable
            low, high = (middle, high) if fits else (low, middle - 1)
        return least + step * low

    def _deep(self, group: int) -> dict[str, Peak]:
        if group not in self._traced:
            # The number of positives changes no tensor's size, so groups that stand for others may be smaller than it.
            workload = replace(self.workload, group=group, positives=1 if group % 2 else None)
            # A shared prompt's backward begins within its last layer, at keys and values: the one before is its first.
            few, more = depths_of(self.config, 2 if workload.share_prompt else 1)
            base = self._trace(workload, few)
            found = base
            for layers, times in more:
                found = _sum(found, base, self._trace(workload, layers), times)
            self._traced[group] = found
        return self._traced[group]

    def _trace(self, workload: Workload, layers: Sequence[int]) -> dict[str, Peak]:
        return trace(workload, self.make(layers), self.hardware.device, self.hardware.ranks > 1)

    def traffic_at(self, group: int) -> dict[str, int]:
        """Bytes that each rank receives in a step at this group size, by kind, as `traffic.py` says."""
        given = self.hardware
        layers, hidden = int(self.config.num_hidden_layers), int(self.config.hidden_size)
        load = replace(self.workload, group=group)
        order = self._order(layers, hidden) if given.ranks > 1 and given.engine == "zero3" else None
        return traffic(load, self._sizes(), layers, hidden, given.ranks, given.engine, given.tensor_parallel, order)

    # ------------------------------------------------------------------------------------------- what is not tracked

    def _sizes(self) -> Sizes:
        if not hasattr(self, "_known_sizes"):
            model: Any = self.make([0])
            layer, table = list(layers_of(model)[0].parameters()), model.get_input_embeddings().weight
            embedding = [table] * (table is not model.get_output_embeddings().weight)
            inside = {id(p) for p in (*layer, *embedding)}
            tail = [p for p in model.parameters() if id(p) not in inside]
            self._known_sizes = Sizes(
                *(
                    Unit(sum(p.nbytes for p in some), sum(p.nbytes for p in some if p.requires_grad))
                    for some in (embedding, layer, tail)
                )
            )
        return self._known_sizes

    def _order(self, layers: int, hidden: int) -> Order:
        """The order in which the modules run that ZeRO 3 gathers: that of two layers, the second of which stands for
        all that follow."""
        model: Any = self.make(range(min(2, layers)))
        names = {id(p): name for name, p in model.named_parameters()}
        layer_of = {id(m): i for i, layer in enumerate(layers_of(model)) for m in layer.modules()}
        begun, ended = list[nn.Module](), list[nn.Module]()

        def end(module: nn.Module, args: Any, out: Any) -> None:
            if any(x.requires_grad for x in tensors_in([out])):
                ended.append(module)

        for module in model.modules():
            module.register_forward_pre_hook(lambda module, args: begun.append(module))
            module.register_forward_hook(end)
        # Masks that transformers would make itself read values.
        mask = torch.ones(1, 1, 2, 2, dtype=torch.bool, device="meta")
        model(input_ids=mask[0, 0, :1].long(), attention_mask=mask, use_cache=False)
        sizes: dict[str, int] = {}

        def calls(modules: Sequence[nn.Module]) -> list[list[str]]:
            found = []
            for i, run in itertools.groupby(modules, lambda module: layer_of.get(id(module))):
                some = list(run)
                for n in range(layers - 1 if i == 1 else 1):
                    for module in some:
                        own = [p for p in module.parameters(recurse=False) if p.numel() > KEPT * hidden]
                        found.append([f"{names[id(p)]} {n}" for p in own])
                        sizes.update({name: p.numel() for name, p in zip(found[-1], own)})
            return found

        return Order(calls(begun), calls(ended)[::-1], sizes)

    def _placed(self, name: str, peak: Peak) -> Peak:
        hardware, extra = self.hardware, dict[Part, int]()
        if hardware.devices == 1 and not hardware.reference:
            return peak
        sizes, ranks = self._sizes(), hardware.ranks
        whole = sizes.whole(int(self.config.num_hidden_layers))
        what = name.removeprefix("prompt ")
        if hardware.reference:
            extra["parameters", "the reference's"] = whole.weights // ranks
        if hardware.tensor_parallel > 1 and what.startswith("head") and self.workload.dtype != "float32":
            extra["activations", "float32 gradient of the head's input"] = (
                4 * max(batch.scored for batch in batches_of(self.workload, ranks > 1)) * int(self.config.hidden_size)
            )
        parts = {part: -(-size // ranks) if part[0] in _SPLIT else size for part, size in peak.parts.items()}
        if ranks > 1 and hardware.engine == "zero3":
            parts = self._as_zero3(what, parts, whole)
        elif ranks > 1 and what not in ("optimizer", "end", "start"):
            backward = what.startswith(("backward", "head"))
            first, last = what == "backward layer 0", what.startswith("head") or what == "backward layer -1"
            begins = not what.startswith(("backward", "head", "forward layer"))
            tied = not sizes.embedding.weights
            extra["parameters", "whole: head and two layers"] = sizes.tail.weights + 2 * sizes.layer.weights
            extra["parameters", "whole: embedding"] = sizes.embedding.weights * (begins or first)
            extra["gradients", "whole: one layer"] = sizes.layer.gradients * backward
            extra["gradients", "whole: head"] = sizes.tail.gradients * (last or (tied and backward))
            extra["gradients", "whole: embedding"] = sizes.embedding.gradients * first
        parts |= {part: size for part, size in extra.items() if size}
        return Peak(sum(parts.values()), parts)

    def _as_zero3(self, what: str, parts: dict[Part, int], whole: Unit) -> dict[Part, int]:
        """The parts of a rank under ZeRO 3, whose optimizer steps float32 weights with float32 states and gradients."""
        item = 4 if self.workload.dtype == "float32" else 2
        trains = whole.gradients // item
        own = -(-trains // self.hardware.ranks)
        found = {part: size * (4 // item) if part[0] == "optimizer" else size for part, size in parts.items()}
        found["optimizer", "float32 weights"] = 4 * own
        if what == "optimizer":
            found["optimizer", "float32 gradients"] = 4 * min(own, _ZERO3_STEP)
        elif what not in ("end", "start"):
            found["parameters", "whole: what DeepSpeed keeps"] = min(whole.weights, _ZERO3_WHOLE * item)
        if what.startswith(("backward", "head")):
            found["gradients", "whole: what waits for its sum"] = min(trains, _ZERO3_WAITING) * item
        return found


def _sum(start: dict[str, Peak], low: dict[str, Peak], high: dict[str, Peak], times: float) -> dict[str, Peak]:
    """start + times (high - low), for each part that all three have. A part that one lacks lies between other parts."""
    found = {}
    for name in start.keys() & low.keys() & high.keys():
        x, a, b = (peaks[name].parts for peaks in (start, low, high))
        sizes = {part: x.get(part, 0) + times * (b.get(part, 0) - a.get(part, 0)) for part in (x | a | b)}
        parts = {part: round(size) for part, size in sizes.items() if abs(size) >= 0.5}
        most = max(peaks[name].most_block for peaks in (start, low, high))
        if BLOCK in parts:
            parts[BLOCK] = min(parts[BLOCK], most)
        found[name] = Peak(sum(parts.values()), parts, most)
    return found


# --------------------------------------------------------------------------------------------------------------- a plan


def plan(
    base: Workload,
    groups: Sequence[int],
    hardware: Hardware,
    strategies: Sequence[str] | None = None,
    progress: Callable[[str], None] | None = None,
    processes: int = 1,
) -> list[dict[str, Any]]:
    """One row for each strategy: its peak at each group size, the largest group that fits, and its largest part.

    `progress` is called with the name of each strategy that is done. More than one of `processes` needs a main module
    that can be imported, as multiprocessing does.

    Raises ValueError for what a Workload refuses and for a model without a config, before anything long runs.
    """
    names = strategies_of(base) if strategies is None else list(strategies)
    _check_split(base, hardware)
    # group_backward refuses one_pass there. A head that tensor parallelism splits gives logits that are gathered.
    without = ["one_pass"] * (hardware.ranks > 1) + ["coupled_logits"] * (hardware.tensor_parallel > 1)
    for name in without:
        if strategies is not None and name in names:
            raise ValueError(f"strategies must not hold {name!r} where a model is split over ranks so; got {names}")
        names = [other for other in names if other != name]
    loads = [replace(base, strategy=name, group=group) for name in names for group in groups]
    if not loads:
        raise ValueError("groups and strategies must not be empty; got none")
    config_of(base)
    rows: dict[str, dict[str, Any]] = {}

    def done(name: str, row: dict[str, Any]) -> None:
        rows[name] = row
        if progress:
            progress(name)

    bases = {name: replace(base, strategy=name) for name in names}
    if processes > 1 and len(names) > 1:
        with ProcessPoolExecutor(min(processes, len(names)), mp_context=get_context("spawn")) as pool:
            # Strategies with many passes start first, so that the last to run is the shortest.
            order = sorted(names, key=STRATEGIES.index, reverse=True)
            running = {pool.submit(plan_row, bases[name], groups, hardware): name for name in order}
            for future in as_completed(running):
                done(running[future], future.result())
    else:
        for name in names:
            done(name, plan_row(bases[name], groups, hardware))
    return [rows[name] for name in names]


def _check_split(base: Workload, hardware: Hardware) -> None:
    """ValueError where the workload's model has no share for each rank of tensor parallelism that is known here."""
    split = hardware.tensor_parallel
    if split == 1:
        return
    if base.lora_rank:
        raise ValueError(f"lora_rank must be 0 with tensor_parallel: no plan splits an adapter; got {base.lora_rank}")
    config = config_of(base)
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(config, name, None)
        if size is None or size % split:
            raise ValueError(f"tensor_parallel must divide the model's {name}, {size}; got {split}")


def plan_row(workload: Workload, groups: Sequence[int], hardware: Hardware) -> dict[str, Any]:
    """The row of one strategy, the workload's."""
    prediction = Prediction(workload, hardware)
    peaks = {group: prediction.at(group) for group in groups}
    largest = prediction.largest_group()
    loads = [replace(workload, group=group) for group in groups]
    (category, what), size = max(peaks[max(groups)].parts.items(), key=lambda item: item[1])
    return {
        "strategy": workload.strategy,
        "peaks": {group: peak.total for group, peak in peaks.items()},
        "breakdown": {group: peak.by_category() for group, peak in peaks.items()},
        "largest_group": largest,
        "limit": {"category": category, "tensor": what, "bytes": size},
        "usable": hardware.usable,
        "computed_tokens": {w.group: w.computed_tokens for w in loads},
        "unshared_tokens": {w.group: replace(w, share_prompt=False, prompts=1).computed_tokens for w in loads},
        "traffic": {group: prediction.traffic_at(group) for group in groups} if hardware.devices > 1 else {},
    }


def savings_text(row: dict[str, Any]) -> str:
    """A text: how many tokens a forward computes at each group size, and how many without a shared prompt."""
    whole = row["unshared_tokens"]
    found = [
        f"{n:,} instead of {whole[g]:,} at G = {g} ({n / whole[g]:.2f})" for g, n in row["computed_tokens"].items()
    ]
    return f"The prompt runs once. Tokens that a forward computes: {', '.join(found)}"


def traffic_text(rows: Sequence[dict[str, Any]]) -> str:
    """A text: what each rank receives in a step of the largest group, and of what kinds."""
    found = []
    for row in rows:
        group, sizes = max(row["traffic"].items())
        kinds = ", ".join(f"{size / GiB:.1f} of {kind}" for kind, size in sizes.items() if size)
        found.append(f"{row['strategy']} {sum(sizes.values()) / GiB:.1f} GiB ({kinds})")
    return f"Each GPU receives in a step of G = {group}: {'; '.join(found)}"


def plan_table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: GiB at each group size, in brackets where it does not fit."""
    groups = list(rows[0]["peaks"])
    lines = ["| strategy | " + " | ".join(f"G = {g}" for g in groups) + " | largest group | largest part |"]
    lines.append("|---" * (len(groups) + 3) + "|")
    for row in rows:
        cells = [f"{p / GiB:.1f}" if p <= row["usable"] else f"({p / GiB:.1f})" for p in row["peaks"].values()]
        limit, n = row["limit"], row["largest_group"]
        largest = f"{n} or more" if n == MOST_RESPONSES else str(n) if n else "none"
        part = f"{limit['category']}: {limit['tensor'].strip()}, {limit['bytes'] / GiB:.1f} GiB"
        lines.append(f"| {row['strategy']} | {' | '.join(cells)} | {largest} | {part} |")
    return "\n".join(lines)


def largest_micro_batch(
    model: nn.Module,
    tokens: int,
    memory: int,
    *,
    autocast: bool = False,
    device: str = "cuda",
    optimizer: str = "adamw",
    prompt: int = 0,
    share_prompt: bool = False,
) -> tuple[int, int]:
    """(sequences of `tokens` tokens that a micro-batch of two passes may hold within `memory` bytes, bytes of one).

    `model` is the one that trains, adapter and checkpointing included, and is not changed. 0 means that none fits.
    `prompt` and `share_prompt` are those of a Workload: a shared prompt takes memory beside the micro-batch.
    """
    base = Workload(
        tokens=tokens, autocast=autocast, optimizer=optimizer, lora_rank=_adapted(model), micro_batch=1,
        prompt=prompt, share_prompt=share_prompt,
    )  # fmt: skip

    def peaks(size: int) -> dict[str, Peak]:
        load = replace(base, micro_batch=size, group=2 * size)
        return _prediction_of(model, load, memory, device).parts_at(2 * size)

    one, two = peaks(1), peaks(2)
    alone = max(peak.total for peak in one.values())
    lines = []  # of each part: what grows with the size, and by how much; the block of logits, and up to what
    for name in one.keys() & two.keys():
        x, y = one[name], two[name]
        block, more = x.parts.get(BLOCK, 0), y.parts.get(BLOCK, 0) - x.parts.get(BLOCK, 0)
        lines.append((x.total - block, y.total - x.total - more, block, more, max(x.most_block, y.most_block)))

    def fits(size: int) -> bool:
        # Each part is linear in the size. Their maximum is not: one that grows may be below another at first.
        n = size - 1
        return all(rest + n * slope + min(block + n * more, top) <= memory for rest, slope, block, more, top in lines)

    if alone > memory:
        return 0, alone
    low, high = 1, 2
    while high < memory and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, alone


def step_peak(
    model: nn.Module,
    responses: int,
    tokens: int,
    memory: int,
    *,
    autocast: bool = False,
    device: str = "cuda",
    optimizer: str = "adamw",
    prompt: int = 0,
    share_prompt: bool = False,
    prompts: int = 1,
) -> int:
    """Bytes of a step that keeps the graph of all of its `responses`, at least two, of `tokens` tokens each.

    `prompt`, `share_prompt` and `prompts` are those of a Workload.
    """
    load = Workload(
        strategy="coupled", group=responses, tokens=tokens, autocast=autocast, optimizer=optimizer,
        lora_rank=_adapted(model), positives=1 if responses % 2 else None, prompt=prompt, share_prompt=share_prompt,
        prompts=prompts,
    )  # fmt: skip
    return _prediction_of(model, load, memory, device).at(responses).total


def _adapted(model: nn.Module) -> int:
    return 1 if any(not p.requires_grad for p in model.parameters()) else 0


def _prediction_of(model: nn.Module, workload: Workload, memory: int, device: str) -> Prediction:
    """The Prediction for the model that trains, which is not changed."""
    layers_of(model)  # refuses what it cannot take apart
    config: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    hardware = Hardware(memory, headroom=0.0, device=device)
    return Prediction(workload, hardware, lambda layers: skeleton(model, layers), config)


def categories(peak: Peak) -> str:
    """A text of the categories and their GiB, the largest first."""
    found = sorted(((size, name) for name, size in peak.by_category().items() if size), reverse=True)
    return ", ".join(f"{name} {size / GiB:.2f} GiB" for size, name in found)
