"""Peak memory of one training step against the size of the group: coupled backward or two passes.

    python examples/group_memory.py

One prompt with G answers of random tokens, half of them right, through a Llama of 4 layers. `coupled` keeps the graph
of all answers until the loss is known; `two_pass` is group_backward with micro-batches of one answer. Both take
log-probabilities from model_logps, so neither has logits: the difference is activations alone.

What is measured: the process's resident memory at its peak during the step, less that before it, when the model, its
gradients and the libraries' own buffers are there already. Each point is a fresh process, so that nothing is left over
from another. Linux; elsewhere the peak since the process began, which includes the making of the model.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from groupdpo_kernels import Objective, PreferenceGroups, group_backward, model_logps, preference_loss
from groupdpo_kernels.memory.rss import forget_peak, resident, return_freed_memory

OBJECTIVE = Objective("mpo", beta=5.0, average=True, nll_weight=1.0)


@dataclass(frozen=True)
class Point:
    """What one measurement is of."""

    backward: str  # "coupled" | "two_pass"
    group: int  # G
    tokens: int = 256  # of an answer
    hidden: int = 256
    layers: int = 4
    vocabulary: int = 8192


def step(model: LlamaForCausalLM, backward: str, input_ids: Tensor) -> None:  # (G, L)
    """Loss and gradients of one group."""
    G, L = input_ids.shape
    groups, ref_logps = PreferenceGroups.from_lists([[i < G // 2 for i in range(G)]]), torch.zeros(G)

    def forward(ids: Tensor) -> tuple[Tensor, Tensor]:
        return model_logps(model, ids, ids.roll(-1, 1)).flatten(), torch.arange(0, len(ids) * L + 1, L)

    if backward == "coupled":
        preference_loss(*forward(input_ids), groups, OBJECTIVE, ref_logps).loss.backward()
    else:
        group_backward(input_ids.split(1), forward, groups, OBJECTIVE, ref_logps)


def peak_memory(point: Point) -> int:
    """Bytes that the step takes at its peak beyond the model and its gradients."""
    return_freed_memory()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=point.hidden,
        intermediate_size=3 * point.hidden,
        num_hidden_layers=point.layers,
        num_attention_heads=4,
        vocab_size=point.vocabulary,
        max_position_embeddings=point.tokens,
    )
    model = LlamaForCausalLM(config)
    input_ids = torch.randint(0, point.vocabulary, (point.group, point.tokens))
    # Makes the gradients and the libraries' buffers, at next to no activations.
    step(model, point.backward, input_ids[:2, :8])
    forget_peak()
    before = resident("VmRSS")
    step(model, point.backward, input_ids)
    return resident("VmHWM") - before


def measure(points: list[Point]) -> Iterator[tuple[Point, int]]:
    """(point, bytes) one by one, from a process that has imported all this, done nothing, and forks one for each."""
    command = [sys.executable, __file__, json.dumps([asdict(point) for point in points])]
    # In a session of its own: Ctrl-C reaches every process of a terminal, and only the first one decides.
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert child.stdout is not None
    try:
        for point in points:
            line = child.stdout.readline()
            if not line:
                raise RuntimeError(f"the measurement of {point} has failed; its error stands above")
            yield point, int(line)
    finally:
        child.stdout.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def points_of(sizes: list[int]) -> list[Point]:
    return [Point(backward, size) for size in sizes for backward in ("coupled", "two_pass")]


if __name__ == "__main__" and len(sys.argv) == 1:
    for point, peak in measure(points_of([2, 4, 8, 16, 32])):
        print(f"G = {point.group:<4d}{point.backward:10s}{peak / 2**20:8.1f} MiB", flush=True)
elif __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for peak in pool.imap(peak_memory, [Point(**point) for point in json.loads(sys.argv[1])]):
            print(peak, flush=True)
