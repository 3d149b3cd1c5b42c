"""Online runs on a tiny model: rewards that note what was generated, and the gradient that a plain loop gives on it."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from tiny_models import from_logits
from tiny_trl import COMMON, PROMPTS, llama
from torch import Tensor, nn
from transformers import TrainerCallback

from groupdpo_kernels import Objective, PreferenceGroups, preference_loss
from groupdpo_kernels.data import RULES
from groupdpo_kernels.data.rules import Rule

ONLINE: dict[str, Any] = COMMON | {
    "max_steps": 2,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_completion_length": 8,
    "max_grad_norm": 0.0,
    "gradient_checkpointing": False,
}


class Rewards:
    """A reward function of the first and the last token, which notes its calls. Completions of prompts in `flat` have
    the same reward."""

    __name__ = "first_token"

    def __init__(self, *flat: str) -> None:
        self.flat = flat
        self.calls: list[list[tuple[str, list[int], float]]] = []  # (prompt, completion, reward) of each completion

    def __call__(self, prompts: list[str], completion_ids: list[list[int]], **named: Any) -> list[float]:
        rewards = [1.0 if p in self.flat else ids[0] % 5 + ids[-1] % 7 / 10 for p, ids in zip(prompts, completion_ids)]
        self.calls.append(list(zip(prompts, completion_ids, rewards)))
        return rewards


class Gradients(TrainerCallback):
    """The gradients of each optimizer step, and the weights that they were taken at. Copies of the model itself would
    run it: TRL patches its forward."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.states: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **named: Any) -> None:
        bare = getattr(model, "module", model)
        self.states.append({name: x.detach().clone() for name, x in bare.state_dict().items()})
        trains = [p for p in bare.parameters() if p.requires_grad]
        self.seen.append(
            torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trains])
        )


Noted = Sequence[tuple[str, list[int], float]]


def groups_of(noted: Noted, G: int, rule: str | Rule = "best_vs_rest") -> list[tuple[str, list[list[int]], list[bool]]]:
    """(prompt, completions, sides) of each group that has two sides, by the rule."""
    rule = RULES[rule]() if isinstance(rule, str) else rule
    found = []
    for start in range(0, len(noted), G):
        rows = noted[start : start + G]
        assert len({prompt for prompt, _, _ in rows}) == 1
        picked = rule([reward for _, _, reward in rows])
        sides = [side for _, side in picked]
        if any(sides) and not all(sides):
            found.append((rows[0][0], [rows[i][1] for i, _ in picked], sides))
    return found


def loaded(state: dict[str, Tensor]) -> nn.Module:
    model = llama()
    model.load_state_dict(state)
    return model


def plain_gradient(
    model: nn.Module, groups: Any, tokenizer: Any, objective: Objective, reference: nn.Module | None = None
) -> Tensor:
    """The gradient of the loss on these groups: one sequence at a time, logits and all, in one graph, in float64."""
    model = copy.deepcopy(model).double()
    reference = None if reference is None else copy.deepcopy(reference).double()

    def logps(of: nn.Module) -> list[Tensor]:
        found = []
        for prompt, completions, _ in groups:
            for ids in completions:
                whole = torch.tensor([tokenizer(prompt)["input_ids"] + ids])
                targets = whole.roll(-1).index_fill(1, torch.tensor([whole.shape[1] - 1]), -100)
                found.append(from_logits(of(input_ids=whole).logits, targets)[0, -len(ids) - 1 : -1])
        return found

    own = logps(model)
    lengths = torch.tensor([len(x) for x in own])
    ref_logps = None
    if reference is not None:
        with torch.no_grad():
            ref_logps = torch.stack([x.sum() for x in logps(reference)])
    sizes = torch.tensor([0, *(len(sides) for _, _, sides in groups)]).cumsum(0)
    positive = torch.tensor([side for _, _, sides in groups for side in sides])
    of_groups = PreferenceGroups(sizes.int(), positive)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    loss = preference_loss(torch.cat(own), cu_seqlens, of_groups, objective, ref_logps).loss
    trains = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trains)])


def far(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def run_as_rank(rank: int, port: int, folder: str) -> None:
    """Two ranks, of half a group a step each (three groups a generation, of which the second begins on the first rank),
    or of a group a step each. Groups of some prompts are dropped, so that a slice of a generation has none."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", **address)
    torch.set_num_threads(1)
    from datasets import Dataset
    from tiny_tokenizers import byte_level_bpe

    from groupdpo_kernels.trainers import OnlineGroupDPOConfig, OnlineGroupDPOTrainer

    found: dict[str, Any] = {}
    for strategy, batch, accumulation in (("two_pass", 2, 3), ("coupled", 4, 2)):
        rewards, gradients = Rewards(*PROMPTS[2:]), Gradients()
        more = {"strategy": strategy, "shuffle_dataset": False, "max_steps": 2, "micro_batch_sequences": 3}
        more |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        more |= {"per_device_eval_batch_size": 2}
        config = OnlineGroupDPOConfig(output_dir=f"{folder}/{strategy}-{rank}", **ONLINE | more)
        trainer = OnlineGroupDPOTrainer(
            llama(),
            rewards,
            config,
            train_dataset=Dataset.from_dict({"prompt": [*PROMPTS, PROMPTS[0], PROMPTS[2], PROMPTS[1], PROMPTS[3]]}),
            processing_class=byte_level_bpe(),
            callbacks=[gradients],
        )
        trainer.train()
        rows = [row for row in trainer.state.log_history if "loss" in row]
        kind = type(trainer.model_wrapped).__name__
        ends = {
            name: x.detach().clone() for name, x in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()
        }
        found[strategy] = kind, [*rewards.calls], gradients.seen, [*gradients.states, ends], rows
    found["evaluated"] = trainer.evaluate(Dataset.from_dict({"prompt": PROMPTS[:2]}))
    try:
        trainer._from_first_rank(lambda: [][0])
    except (IndexError, ValueError) as error:
        found["failed"] = repr(error)
    torch.save(found, f"{folder}/{rank}.pt")
