"""Predicts what the ranks of a training step send each other: bytes that each one receives, of three kinds.

    weights       what an engine gathers. FSDP2 is cut as accelerate and transformers cut it: each layer, and the
                  embedding, is gathered in every forward and every backward; the last norm and the head are one unit,
                  which stays from a forward to its backward, and which the embedding joins where it is the head too.
                  ZeRO 3 gathers each module in every forward and every backward, and after a forward without a
                  backward what it had prefetched for one: `fetched_in_vain`
    gradients     sums of gradients, scattered in each backward
    activations   tensor parallelism: sums of hidden states behind the embedding and twice in each layer; in a layer's
                  backward five sums of gradients (at queries, keys, values and two inputs of the MLP), and one at the
                  head

A step of two passes makes two forwards and one backward of each micro-batch. Where an engine shards the model, no graph
may wait while another forward runs, so that a shared prompt makes three forwards; elsewhere it makes two.
A rank receives all but its own share of what is gathered or scattered, and twice that of a sum that every rank gets.

Not counted: the few numbers of an agreement; broadcasts of buffers; the small parameters that ZeRO 3 keeps whole, which
it gathers once a step; and a layer that it gathers once more for a checkpoint where `stage3_max_reuse_distance` does
not keep it.
The module never runs a model. It needs the sizes of one layer and of the rest and, for ZeRO 3, the order of modules.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import NamedTuple

from .workload import Workload

ENGINES = ("fsdp2", "zero3")
# DeepSpeed's settings: stage3_prefetch_bucket_size, in tenths of D^2, and stage3_param_persistence_threshold, in D, as
# transformers sets them; stage3_max_live_parameters, as it is by default.
PREFETCH, KEPT, LIVE = 9, 10, 10**9


class Unit(NamedTuple):
    """Bytes of parameters, and of the gradients of those that train."""

    weights: int
    gradients: int


class Sizes(NamedTuple):
    """The units of a model on one rank of tensor parallelism, before an engine shards them."""

    embedding: Unit  # empty where it is the head too
    layer: Unit
    tail: Unit  # the last norm, the head, and all else

    def whole(self, layers: int) -> Unit:
        """All of the model."""
        return Unit(*(e + layers * each + t for e, each, t in zip(*self)))


class Order(NamedTuple):
    """What ZeRO 3 gathers: the parameters of each module, module after module as a forward and then its backward call
    them; without those that it keeps whole."""

    forward: list[list[str]]
    backward: list[list[str]]
    sizes: dict[str, int]  # elements


class Batch(NamedTuple):
    """Forwards of equally many tokens in a step, and their backwards."""

    tokens: int
    scored: int  # tokens that the head scores; 0 for a prompt
    forwards: int
    backwards: int


def batches_of(workload: Workload, sharded: bool) -> list[Batch]:
    """The batches of a step. sharded: whether an engine shards the model over ranks."""
    size, rows = workload.group, []
    row = workload.response if workload.share_prompt else workload.tokens
    if workload.strategy == "pairs":
        return [Batch(2 * row, 2 * workload.response, workload.num_pairs, workload.num_pairs)]
    if workload.strategy == "two_pass":
        full, rest = divmod(size, workload.micro_batch)
        rows = [Batch(workload.micro_batch * row, workload.micro_batch * workload.response, 2 * full, full)]
        rows += [Batch(rest * row, rest * workload.response, 2, 1)] * (rest > 0)
        prompt = Batch(workload.prefix, 0, 3 if sharded else 2, 1)
    elif workload.strategy == "one_pass":
        rows, prompt = [Batch(row, workload.response, size, size)], Batch(workload.prefix, 0, 1, 1)
    else:
        rows = [Batch(size * row, size * workload.response, 1, 1)]
        prompt = Batch(workload.prompts * workload.prefix, 0, 1, 1)
    return [batch for batch in (*rows, prompt) if batch.tokens and batch.forwards]


def fetched_in_vain(order: Order, bucket: int, live: int) -> set[str]:
    """The parameters that ZeRO 3 has gathered for a backward when its forward ends: at each call of a module it fetches
    so many elements (`bucket`) of what will be called next, while at most `live` are whole.

    A module without parameters counts too, so that fetching is soon far ahead of a forward. Where it comes to the
    backward, the last layers are whole and it goes past them; the first ones are not, and are fetched.
    """
    queue = deque(name for call in (*order.forward, *order.backward) for name in call)
    left = Counter(name for call in order.forward for name in call)  # uses in the forward
    ahead: Counter[str] = Counter()  # uses that the queue has passed before their call
    whole: set[str] = set()
    for call in order.forward:
        whole.update(call)
        for _ in range(sum(not ahead[name] for name in call)):
            ahead[queue.popleft()] += 1
        free = min(bucket, live - sum(order.sizes[name] for name in whole))
        while queue and free > 0:
            name = queue.popleft()
            ahead[name] += 1
            free -= order.sizes[name] * (name not in whole)
            whole.add(name)
        left.subtract(call)
        ahead.subtract(call)
        whole.difference_update(name for name in call if not left[name])
    return whole


def traffic(
    workload: Workload,
    sizes: Sizes,
    layers: int,
    hidden: int,
    ranks: int,
    engine: str,
    split: int,
    order: Order | None = None,
) -> dict[str, int]:
    """{kind: bytes that each rank receives in a step}. hidden: D; split: ranks of tensor parallelism."""
    batches = batches_of(workload, ranks > 1)
    forwards = sum(batch.forwards for batch in batches)
    backwards = sum(batch.backwards for batch in batches)
    reductions = 1 if workload.strategy in ("coupled", "coupled_logits") else backwards
    whole, embedding = sizes.whole(layers), sizes.embedding
    if order is not None:
        weights = _gathered_by_zero3(order, forwards, backwards, hidden) * (4 if workload.dtype == "float32" else 2)
    else:
        weights = (forwards + backwards) * layers * sizes.layer.weights + (forwards + reductions) * embedding.weights
        # A backward prefetches the unit that ran before the first of its own, where another forward has been.
        again = embedding.weights > 0 and (workload.strategy == "two_pass" or workload.share_prompt)
        weights += (reductions + again) * sizes.tail.weights
    gradients = reductions * whole.gradients
    activations = sum(_activations(workload, batch, layers, hidden, ranks > 1) for batch in batches)
    return {
        "weights": weights * (ranks - 1) // ranks,
        "gradients": gradients * (ranks - 1) // ranks,
        "activations": 2 * activations * (split - 1) // split,
    }


def _gathered_by_zero3(order: Order, forwards: int, backwards: int, hidden: int) -> int:
    """Elements, with DeepSpeed's settings as transformers makes them for a hidden size."""
    in_forward, in_backward = ({name for call in calls for name in call} for calls in order[:2])
    # It learns the order from a forward with its backward. Where a step has one backward, the forward before it
    # makes it forget the order each time.
    in_vain = fetched_in_vain(order, PREFETCH * hidden**2 // 10, LIVE) if backwards > 1 else set()
    times = ((forwards, in_forward), (backwards, in_backward), (forwards - backwards, in_vain))
    return sum(n * sum(order.sizes[name] for name in names) for n, names in times)


def _activations(workload: Workload, batch: Batch, layers: int, hidden: int, sharded: bool) -> int:
    """Bytes of the sums over ranks of tensor parallelism in the forwards and backwards of a batch."""
    narrow = workload.autocast or workload.dtype != "float32"
    in_forwards = (1 + 2 * layers) * batch.forwards
    # Of a prompt's last layer keys and values alone are read, and an engine's hooks lead through the rest of it. A
    # checkpoint computes a layer again up to its last sum, which the backward does not need.
    in_backward = 5 * layers - 3 * (not batch.scored and not sharded) + layers * workload.checkpointing
    sums = in_forwards + in_backward * batch.backwards
    return hidden * (sums * batch.tokens * (2 if narrow else 4) + 4 * batch.scored * batch.backwards)
