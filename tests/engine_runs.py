"""GroupDPOTrainer on gloo processes, under DistributedDataParallel, FSDP2 and DeepSpeed, against one process that has
the whole batch. Processes that are started once run many cases, one after the other."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from processes import run_ranks
from prompt_groups import groups_of
from tiny_models import make
from tiny_trl import COMMON, steps, trainable
from torch import Tensor

from groupdpo_kernels import Objective
from groupdpo_kernels.trainers import GroupDPOConfig, GroupDPOTrainer

MPO = Objective("mpo", beta=2.0, average=True, nll_weight=1.0)
# (tokens of the prompt, tokens of each response). Some groups share their prompt, others do not where it is short.
EQUAL = [(9, [5, 3, 7, 2])] * 8
UNEQUAL = [(9, [5, 3]), (1, [2, 4, 3]), (6, [3, 1, 2, 4, 2]), (12, [2, 6, 1])]
UNEQUAL += [(2, [4, 4]), (8, [3, 3, 5, 1]), (1, [7, 2]), (10, [1, 2, 3, 4, 5])]


class Case(NamedTuple):
    engine: str  # ddp, fsdp2, zero1, zero2 or zero3
    adapter: bool = False
    tied: bool = False
    equal: bool = False
    options: dict[str, Any] | None = None  # of GroupDPOConfig

    @property
    def family(self) -> str:
        """Cases of one family share their processes."""
        return "zero" if self.engine.startswith("zero") else self.engine


def make_trainer(case: Case, folder: Path | str, **more: Any) -> Any:
    """A trainer of two steps. Its batch is that of one process of two, unless `more` says otherwise."""
    options = {"gradient_checkpointing": False, "max_steps": 2, "micro_batch_sequences": 2, "strategy": "two_pass"}
    config = GroupDPOConfig(output_dir=str(folder), **{**COMMON, **options, **(case.options or {}), **more})
    model = make("llama", tie_word_embeddings=case.tied)
    names = ["q_proj", "v_proj", *([] if case.tied else ["lm_head"])]
    adapter = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names) if case.adapter else None
    groups = groups_of(*(EQUAL if case.equal else UNEQUAL))
    return GroupDPOTrainer(model, args=config, train_dataset=groups, objective=MPO, peft_config=adapter)


def engine_options(engine: str, state_dict: str = "FULL_STATE_DICT") -> dict[str, Any]:
    """Options of TrainingArguments that ask for the engine."""
    if engine == "ddp":
        return {}
    if engine == "fsdp2":
        wrap = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "reshard_after_forward": True}
        return {"fsdp": True, "fsdp_config": wrap | {"state_dict_type": state_dict}}
    small = {"reduce_bucket_size": 5000, "stage3_prefetch_bucket_size": 5000, "stage3_param_persistence_threshold": 0}
    return {
        "deepspeed": {
            "zero_optimization": {"stage": int(engine[-1]), **small, "stage3_gather_16bit_weights_on_model_save": True},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    }


def whole_weights(trainer: Any) -> dict[str, Tensor]:
    """The weights of a trainer that has trained, by the names of the bare model; {} on ranks that do not get them."""
    wrapped = trainer.deepspeed if trainer.is_deepspeed_enabled else trainer.model
    found = trainer.accelerator.get_state_dict(wrapped)
    return {name.removeprefix("module."): x.clone() for name, x in (found or {}).items()}


def flat(weights: dict[str, Tensor], trainer: Any) -> Tensor:
    """What trains in `trainer`, out of weights by name."""
    names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    return torch.cat([weights[name].flatten().float() for name in names])


def start_ranks(job: Callable[..., Any], world: int, *arguments: Any, seconds: float = 300) -> None:
    """Runs job(rank, *arguments) in `world` processes, with the environment of `torchrun`. RuntimeError if one fails;
    all others are then ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if failure := run_ranks(_as_rank, world, port, job, arguments, ranks=world, timeout=seconds):
        raise RuntimeError(failure)


def _as_rank(rank: int, world: int, port: int, job: Callable[..., Any], arguments: Sequence[Any]) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ.update(address, WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    job(rank, *arguments)


def use(engine: str) -> None:
    """Lets accelerate run the engine on this rank's CPU, after another run in the same process."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = str(engine.startswith("zero")).lower()
    import accelerate_on_cpu  # noqa: F401
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState):
        state._reset_state()
    PartialState._shared_state.pop("distributed_type", None)


def train_cases(rank: int, folder: str, cases: dict[str, Case]) -> None:
    """Runs the cases, and saves what each ends with (type of the wrapper, strategy, weights, log), or its error."""
    run_all(rank, folder, {name: (case.engine, train, (case, f"{folder}/{name}")) for name, case in cases.items()})


def train(engine: str, case: Case, folder: str, **more: Any) -> Any:
    trainer = make_trainer(case, folder, **share_of_rank(case.engine) | more)
    trainer.train()
    return type(trainer.model_wrapped).__name__, trainer.strategy, whole_weights(trainer), steps(trainer)


def share_of_rank(engine: str) -> dict[str, Any]:
    """Options with which all ranks together take batches of four groups."""
    batch = 4 // int(os.environ["WORLD_SIZE"])
    return {"per_device_train_batch_size": batch, "ddp_timeout": 60, **engine_options(engine)}


def run_all(rank: int, folder: str, jobs: dict[str, tuple[str, Callable[..., Any], tuple[Any, ...]]]) -> None:
    """Runs jobs {name: (engine, function, arguments)} in turn, and saves what each returns, or its error."""
    for name, (engine, job, arguments) in jobs.items():
        use(engine)
        found: Any
        try:
            found = job(engine, *arguments)
        except Exception:
            found = traceback.format_exc()
        torch.save(found, f"{folder}/{name}.{rank}.pt")
        if isinstance(found, str):
            os._exit(1)


def results(folder: Path, name: str, world: int) -> list[Any]:
    """What run_all has saved, an assertion for an error."""
    paths = [folder / f"{name}.{rank}.pt" for rank in range(world)]
    found = [torch.load(path) if path.exists() else "did not run" for path in paths]
    assert not any(isinstance(each, str) for each in found), "\n".join(map(str, found))
    return found


def one_process(case: Case, folder: Path) -> tuple[Any, Tensor, Tensor]:
    """The trainer of the whole batch after its run, which shares no prompt; what trains, before and after."""
    trainer = make_trainer(case, folder / "one", per_device_train_batch_size=4, share_prompt=False)
    start = trainable(trainer)
    trainer.train()
    return trainer, start, trainable(trainer)


def check_as_one(found: Any, one: tuple[Any, Tensor, Tensor]) -> float:
    """A rank's run against that of one process: weights within 5e-6 of the way, and the same log. Returns how far the
    weights are off, relative to the way."""
    assert not isinstance(found, str), found
    trainer, start, expected = one
    _, _, weights, logged = found
    assert (expected - start).norm() > 1e-3 * start.norm()
    off = 0.0
    if weights:  # under some engines the first rank alone has the whole
        off = float((flat(weights, trainer) - expected).norm() / (expected - start).norm())
        assert off < 5e-6, f"{off:.1e} of the way off"
    for row, wanted in zip(logged, steps(trainer), strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "num_tokens"):
            assert abs(row[key] - wanted[key]) <= 1e-5 * (1 + abs(wanted[key])), (key, row[key], wanted[key])
    return off
