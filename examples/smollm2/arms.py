"""The arms of online_arithmetic.py: what each is, its trainer, and the run that keeps what it measures.

All train the same adapter at the same learning rate, on the same prompts in the same order, so many a step. Prompts
whose answers are all right or all wrong are left out: online a step then has fewer groups, offline it takes the next.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from additions import LENGTH, QUIET, Task, lora  # type: ignore[import-not-found]  # beside this file
from datasets import Dataset  # type: ignore[import-untyped]
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from groupdpo_kernels import Objective
from groupdpo_kernels.files import write_json
from groupdpo_kernels.trainers import GroupDPOConfig, GroupDPOTrainer, OnlineGroupDPOConfig, OnlineGroupDPOTrainer

Rows = list[dict[str, Any]]
Points = list[dict[str, float]]  # step, accuracy, dropped, seconds_a_step
SIDES = {"positives": True, "negatives": False}
MPO = Objective("mpo", beta=2.0, average=True, nll_weight=1.0)


def first_and_last(rewards: Sequence[float]) -> list[tuple[int, bool]]:
    """DPO's pair: the best answer and the worst one, the first of each that are tied; none where all are."""
    best, worst = max(rewards), min(rewards)
    return [(rewards.index(best), True), (rewards.index(worst), False)] if best > worst else []


@dataclass(frozen=True)
class Arm:
    what: str
    objective: Objective
    rule: Any = "best_vs_rest"
    online: bool = True


ARMS = {
    "online GroupDPO": Arm("all answers of a group, by mpo and the likelihood of right ones", MPO),
    "online DPO": Arm("the best and the worst answer of a group, by sigmoid", Objective("sigmoid"), first_and_last),
    "offline GroupDPO": Arm("as online GroupDPO, on answers of the start to the same prompts", MPO, online=False),
}


@dataclass(frozen=True)
class Sizes:
    """What all runs of a comparison share."""

    group: int = 8  # G, answers of a prompt
    prompts: int = 4  # of a step
    every: int = 5  # steps between two measurements
    held_out: int = 100  # sums
    learning_rate: float = 1e-4


class Watch(TrainerCallback):
    """Measures every so many steps, writes a checkpoint then, and ends the run when its time is up."""

    def __init__(self, measure: Callable[[int, Any, float], None], every: int, deadline: float) -> None:
        self.measure, self.every, self.deadline = measure, every, deadline

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **named: Any) -> None:
        control.should_training_stop |= time.monotonic() > self.deadline
        last = control.should_training_stop or state.global_step == state.max_steps
        if last or state.global_step % self.every == 0:
            dropped = [row["groups/dropped"] for row in state.log_history if "groups/dropped" in row][-self.every :]
            self.measure(state.global_step, model, sum(dropped) / max(1, len(dropped)))
            control.should_save = True  # behind the measurement, so that every checkpoint has its point


def trainer_of(arm: Arm, seed: int, steps: int, model: Any, task: Task, rows: Rows, sizes: Sizes, folder: Path) -> Any:
    common: dict[str, Any] = {
        **QUIET,  # Watch says when to save
        "output_dir": str(folder),
        "max_steps": steps,
        "seed": seed,
        "learning_rate": sizes.learning_rate,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_total_limit": 1,
        "strategy": "coupled",  # a step's answers are short enough to keep the graph of all
        "micro_batch_sequences": None,
    }
    set_seed(seed)  # of the new adapter
    named: dict[str, Any] = {"processing_class": task.tokenizer, "peft_config": lora(), "objective": arm.objective}
    if not arm.online:
        common |= {"train_sampling_strategy": "sequential"}  # the order is random already, and the same online
        config: Any = GroupDPOConfig(**common, per_device_train_batch_size=sizes.prompts)
        return GroupDPOTrainer(model, args=config, train_dataset=rows, **named)
    config = OnlineGroupDPOConfig(
        **common,
        rule=arm.rule,
        num_generations=sizes.group,
        per_device_train_batch_size=sizes.group * sizes.prompts,
        max_completion_length=LENGTH,
        shuffle_dataset=False,
    )
    return OnlineGroupDPOTrainer(model, task.reward, config, train_dataset=Dataset.from_list(rows), **named)


def first_round(model: Any, task: Task, rows: Rows, sizes: Sizes, path: Path, deadline: float) -> Rows:
    """Groups of the start's own answers to these prompts, kept in a file; fewer if the time is up."""
    drawn: list[list[str]] = json.loads(path.read_text()) if path.exists() else []
    while len(drawn) < len(rows) and time.monotonic() < deadline:
        some = rows[len(drawn) : len(drawn) + sizes.prompts]
        set_seed(len(drawn))  # the same answers, wherever it was stopped
        texts = task.answers(model, [row["prompt"] for row in some], sizes.group)
        drawn += [texts[i : i + sizes.group] for i in range(0, len(texts), sizes.group)]
        write_json(path, drawn)
    groups = []
    for row, texts in zip(rows, drawn):
        sides = [task.is_right(text, row["answer"]) for text in texts]
        if any(sides) and not all(sides):
            of = {name: [t for t, right in zip(texts, sides) if right is side] for name, side in SIDES.items()}
            groups.append({"prompt": row["prompt"], **of})
    return groups


def train(
    name: str,  # of ARMS
    seed: int,
    steps: int,
    begin: tuple[Any, Task],  # of additions.start
    sizes: Sizes,
    out: Path,
    points: Points,  # what has been measured: it goes on behind the last checkpoint
    keep: Callable[[], None],  # called whenever points has changed
    deadline: float,  # by time.monotonic()
) -> None:
    """Trains, or goes on, up to this step, or as far as the time allows."""
    arm, (model, task) = ARMS[name], begin
    folder = out / f"{name.replace(' ', '-')}-{seed}"
    checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    reached = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
    points[:] = [point for point in points if point["step"] <= reached]
    rows, held_out = task.rows(seed, sizes.held_out)
    dropped_before = None
    if not arm.online:
        asked, kept = rows[: steps * sizes.prompts], out / f"first-round-{seed}.json"
        rows = first_round(model, task, asked, sizes, kept, deadline)
        dropped_before = 1 - len(rows) / len(asked)
        if time.monotonic() > deadline:
            return
    began = time.monotonic()

    def measure(step: int, learner: Any, dropped: float) -> None:
        nonlocal began
        seconds = (time.monotonic() - began) / (step - (points[-1]["step"] if points else 0))
        accuracy = task.accuracy(learner, held_out)
        dropped = dropped if dropped_before is None else dropped_before
        points.append({"step": step, "accuracy": accuracy, "dropped": dropped, "seconds_a_step": seconds})
        keep()
        print(f"{name:18}{seed:5}{step:6}{accuracy:19.3f}{dropped:16.2f}{seconds:13.1f}", flush=True)
        began = time.monotonic()

    trainer = trainer_of(arm, seed, steps, copy.deepcopy(model), task, rows, sizes, folder)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Watch(measure, sizes.every, deadline))
    trainer.train(resume_from_checkpoint=checkpoint)
