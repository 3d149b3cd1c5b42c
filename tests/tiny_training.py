"""sDPO on tiny models with a plain loop, and runs of it for processes of their own: killed, beside others, as ranks."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_models import batch, make
from torch import Tensor, nn

from groupdpo_kernels import Objective, PreferenceGroups, model_logps, preference_loss
from groupdpo_kernels.stepwise import run_stages, sequence_logps
from groupdpo_kernels.stepwise.store import tensor_digests

B, L = 4, 13  # two pairs a batch, chosen then rejected
PARTS = [[batch(B, L, seed=10 * k + i) for i in range(3)] for k in range(2)]


def lora(**changes: Any) -> nn.Module:
    import peft  # slow, and processes that are killed do without

    model = make("llama")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "lm_head"], **changes)
    return peft.get_peft_model(model, config)


class Training:
    """A plain loop: AdamW, DPO on shuffled batches. Keeps the loss of every step."""

    def __init__(self, hook: Callable[[int, int], None] = lambda stage, step: None) -> None:
        self.losses: dict[int, list[float]] = defaultdict(list)
        self.hook = hook

    def __call__(self, model: nn.Module, part: list[dict[str, Tensor]], ref_logps: Tensor, stage: int) -> None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        offsets, groups = torch.arange(0, B * L + 1, L), PreferenceGroups.pairs(B // 2)
        for step, i in enumerate(torch.randperm(len(part)).tolist()):
            token_logps = model_logps(model, **part[i]).flatten()
            ref = ref_logps[i * B : (i + 1) * B]
            loss = preference_loss(token_logps, offsets, groups, Objective("sigmoid", beta=0.5), ref).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            self.losses[stage].append(loss.item())
            self.hook(stage, step)


class Counting:
    """`sequence_logps` that knows how many batches it scored."""

    def __init__(self, hook: Callable[[int], None] = lambda done: None) -> None:
        self.done, self.hook = 0, hook

    def __call__(self, model: nn.Module, rows: list[dict[str, Tensor]]) -> Tensor:
        values = []
        for row in rows:
            values.append(sequence_logps(model, [row]))
            self.done += 1
            self.hook(self.done)
        return torch.cat(values)


def stages(model: nn.Module, directory: Path, train: Any = None, score: Any = None, **changes: Any) -> nn.Module:
    train, score = train or Training(), score or Counting()
    run_stages(model, PARTS, train, directory, **{"score": score, "count": lambda row: B, "chunk_size": 1} | changes)
    return model


# ------------------------------------------------------------------------------------------ in processes of their own


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_until_killed(directory: Path, where: str, at: int) -> None:
    torch.set_num_threads(1)
    renames = 0

    def count_renames(event: str, args: Any) -> None:
        nonlocal renames
        if event == "os.rename":  # os.replace: the file is whole, under its temporary name
            renames += 1
            if renames == at:
                die()

    train, score = Training(), Counting()
    if where == "rename":
        sys.addaudithook(count_renames)
    elif where == "write":  # the kernel kills the process once a file would grow past this size
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (at, at))
    elif where == "score":
        score = Counting(lambda done: die() if done == at else None)
    elif where == "train":
        train = Training(lambda stage, step: die() if (stage, step) == (at, 1) else None)
    stages(make("llama"), directory, train, score)


def run_with_others(directory: Path, barrier: Any, results: Any) -> None:
    torch.set_num_threads(1)
    score = Counting(lambda done: barrier.wait(60) and None)  # batch by batch at the same time
    model = stages(make("llama"), directory, score=score)
    results.put(tensor_digests(model))


def run_as_rank(rank: int, directory: Path, results: Any) -> None:
    torch.set_num_threads(1)
    group = f"file://{directory}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=group, rank=rank, world_size=2)

    def collective(done: int) -> None:  # as the forward of a sharded model: hangs if the other rank does not come
        torch.distributed.all_reduce(torch.ones(()))

    score = Counting(collective)
    model = stages(make("llama"), directory / str(rank), Training(lambda stage, step: collective(step)), score)
    results.put((score.done, tensor_digests(model)))
    torch.distributed.destroy_process_group()
