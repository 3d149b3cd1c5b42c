"""What a bonus for the entropy costs: forward and backward with its gradient and without, ours beside TRL's function.

    python bench/entropy.py --T 512 --D 1024 --V 32000

Rounds are interleaved, and each ratio is of two runs of one round; its median and its quartiles are printed. The time
is the processor's, of all threads, so that work beside it counts little. The head is trained. CPU only.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench.peers import load_peer
from groupdpo_kernels import linear_logp_stats
from groupdpo_kernels.testing import Case, Inputs, make_inputs

Scored = Callable[[Inputs], tuple[Tensor, Tensor]]  # token log-probabilities and entropies


def ours(inputs: Inputs) -> tuple[Tensor, Tensor]:
    stats = linear_logp_stats(inputs.hidden, inputs.weight, inputs.targets, impl="cpu")
    assert stats.entropy is not None
    return stats.token_logps, stats.entropy


def trl(inputs: Inputs) -> tuple[Tensor, Tensor]:
    utils = load_peer("trl.trainer.utils")
    arguments = (inputs.hidden, inputs.weight, None, inputs.targets, 1.0, utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0)
    return utils._ChunkedLogProbFunction.apply(*arguments, ("entropy",))[:2]


def step(scored: Scored, inputs: Inputs, bonus: bool) -> tuple[float, float]:
    """Seconds of the processor in forward and in backward."""
    begin = time.process_time()
    logps, entropy = scored(inputs)
    assert inputs.d_entropy is not None
    between = time.process_time()
    outputs, upstream = (logps, entropy), (inputs.d_token_logps.to(logps.dtype), inputs.d_entropy.to(logps.dtype))
    count = 2 if bonus else 1
    torch.autograd.grad(outputs[:count], (inputs.hidden, inputs.weight), upstream[:count])
    return between - begin, time.process_time() - between


def quartiles(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(description="The cost of the entropy's gradient.")
    for name, default in (("T", 512), ("D", 1024), ("V", 32000), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"])
    o = parser.parse_args()
    dtype = getattr(torch, o.dtype)
    inputs = make_inputs(Case("entropy", o.T, o.D, o.V, "", dtype, ignored="none", entropy=True))
    backward: dict[str, list[float]] = {"ours": [], "TRL": []}
    beside: dict[bool, list[float]] = {False: [], True: []}
    for i in range(o.rounds + 1):
        took = {
            (name, bonus): step(scored, inputs, bonus)
            for name, scored in (("ours", ours), ("TRL", trl))
            for bonus in (False, True)
        }
        if i == 0:  # the first is a warm-up
            continue
        for name in backward:
            backward[name].append(took[name, True][1] / took[name, False][1])
        for bonus in beside:
            beside[bonus].append(sum(took["ours", bonus]) / sum(took["TRL", bonus]))
    print(f"T {o.T}, D {o.D}, V {o.V}, {o.dtype}, {torch.get_num_threads()} threads, {o.rounds} rounds")
    for name, ratios in backward.items():
        print(f"{name}: backward with the entropy's gradient, of that without: {quartiles(ratios)}")
    for bonus, ratios in beside.items():
        print(f"ours of TRL's forward and backward, {'with' if bonus else 'without'} it: {quartiles(ratios)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
