"""`GroupDPOTrainer` under FSDP2 and DeepSpeed: two gloo processes with half of the batch each, against one process."""

from __future__ import annotations

import os
import socket
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_ranks
from tiny_trl import COMMON, GROUPS, llama, lora, run, steps, trainable

from groupdpo_kernels import Objective
from groupdpo_kernels.trainers import GroupDPOConfig, GroupDPOTrainer

MPO = Objective("mpo", beta=2.0, average=True, nll_weight=1.0)
TWO = {"strategy": "two_pass", "micro_batch_sequences": 2}
CHECKPOINTS = {**TWO, "gradient_checkpointing": True}
ACCUMULATED = {**TWO, "gradient_accumulation_steps": 2, "max_steps": 2}
# name: (engine, options of the config, whether an adapter trains)
RUNS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "fsdp2": ("fsdp", TWO, False),
    "fsdp2 coupled": ("fsdp", {**TWO, "strategy": "coupled"}, False),
    "fsdp2 adapter": ("fsdp", CHECKPOINTS, True),
    "fsdp2 accumulation": ("fsdp", ACCUMULATED, False),
    "fsdp2 auto": ("fsdp", {"strategy": "auto"}, False),
    "zero 1": ("zero1", TWO, False),
    "zero 2 adapter": ("zero2", CHECKPOINTS, True),
    "zero 2 accumulation": ("zero2", ACCUMULATED, False),
    "zero 3": ("zero3", TWO, False),
    "zero 3 coupled": ("zero3", {**TWO, "strategy": "coupled"}, False),
    "zero 3 adapter": ("zero3", TWO, True),
}


def make_trainer(name: str, folder: str, **more: Any) -> Any:
    from tiny_tokenizers import byte_level_bpe

    _, options, with_lora = RUNS[name]
    options = {"gradient_checkpointing": False, "per_device_train_batch_size": 2} | options | more
    config = GroupDPOConfig(output_dir=folder, **COMMON | options)
    named: dict[str, Any] = {"peft_config": lora("lm_head")} if with_lora else {}
    return GroupDPOTrainer(
        llama(), args=config, train_dataset=GROUPS, processing_class=byte_level_bpe(), objective=MPO, **named
    )


def engine_options(engine: str) -> dict[str, Any]:
    if engine == "fsdp":
        wrap = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "reshard_after_forward": True}
        return {"fsdp": True, "fsdp_config": wrap | {"state_dict_type": "FULL_STATE_DICT"}}
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


def as_rank(rank: int, port: int, folder: str, names: list[str]) -> None:
    """Runs these settings one after the other, and saves what each ends with, or its error."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ.update(address, WORLD_SIZE="2", DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="lo")
    if RUNS[names[0]][0] != "fsdp":
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    torch.set_num_threads(1)
    import accelerate_on_cpu  # noqa: F401
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for name in names:
        found: Any
        try:
            options = engine_options(RUNS[name][0])
            trainer = make_trainer(name, f"{folder}/{name}", per_device_train_batch_size=1, ddp_timeout=60, **options)
            trainer.train()
            wrapped = trainer.deepspeed if RUNS[name][0].startswith("zero") else trainer.model
            weights = trainer.accelerator.get_state_dict(wrapped)
            kind = type(trainer.model_wrapped).__name__, trainer.strategy
            found = kind, weights, steps(trainer)
        except Exception:
            found = traceback.format_exc()
        torch.save(found, f"{folder}/{name}.{rank}.pt")
        if isinstance(found, str):
            os._exit(1)
        for state in (AcceleratorState, GradientState):
            state._reset_state()
        PartialState._shared_state.pop("distributed_type", None)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the ranks of a run ended with. All runs of an engine share two processes, started at its first test."""
    folder, started = tmp_path_factory.mktemp("ranks"), set()

    def of(name: str) -> list[Any]:
        engine = RUNS[name][0][:4]
        if engine not in started:
            started.add(engine)
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            names = [other for other, row in RUNS.items() if row[0][:4] == engine]
            run_ranks(as_rank, port, str(folder), names)
        paths = [folder / f"{name}.{rank}.pt" for rank in range(2)]
        found = [torch.load(path) if path.exists() else "did not run" for path in paths]
        assert not any(isinstance(each, str) for each in found), "\n".join(map(str, found))
        return found

    return of


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_are_one_process_with_the_whole_batch(ranks: Any, name: str, tmp_path: Path) -> None:
    whole, start, expected = run(make_trainer(name, str(tmp_path / "one"), share_prompt=False))
    names = [key for key, p in whole.model.named_parameters() if p.requires_grad]
    for (_, strategy), weights, logged in ranks(name):
        if weights:  # the first rank alone has the whole
            flat = torch.cat([weights[key.removeprefix("module.")].flatten().float() for key in names])
            assert (flat - expected).norm() < 5e-6 * (expected - start).norm()
        assert strategy == (whole.strategy if RUNS[name][1]["strategy"] != "auto" else "two_pass")
        for row, wanted in zip(logged, steps(whole), strict=True):
            for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "num_tokens"):
                assert row[key] == pytest.approx(wanted[key], rel=1e-5, abs=1e-5), key
    assert torch.equal(trainable(whole), expected)


@pytest.mark.parametrize(
    "engine, option, message",
    [
        ("fsdp", {"strategy": "one_pass"}, r"strategy must be 'two_pass' or 'coupled' under FSDP: .*; got 'one_pass'"),
        ("zero3", {"strategy": "one_pass"}, "strategy must be 'two_pass' or 'coupled' under DeepSpeed"),
        ("zero2", {"micro_batch_tokens": "auto", "strategy": "two_pass"}, "micro_batch_tokens must be a number"),
        ("fsdp", {"precompute_ref_log_probs": True}, "precompute_ref_log_probs must be False, with an adapter or ref_"),
        ("fsdp", {"share_prompt": True}, "share_prompt must be 'auto' or False under FSDP: .*; got True"),
        ("zero1", {"fp16": True}, "fp16 must be False, with bf16 under DeepSpeed: .*; got True"),
    ],
    ids=str,
)
def test_what_an_engine_cannot_do_is_refused(
    engine: str, option: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is built: the engine is asked for by `accelerate launch`."""
    name = "FSDP" if engine == "fsdp" else "DEEPSPEED"
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=message):
        GroupDPOConfig(**COMMON | {"output_dir": str(tmp_path), "gradient_checkpointing": False} | option)
