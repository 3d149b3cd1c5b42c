"""`GroupDPOTrainer` under FSDP2 and DeepSpeed: two gloo processes with half of the batch each, against one process.

test_distributed.py has the whole matrix, and what else runs on several processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_runs import Case, check_as_one, one_process, results, start_ranks, train_cases
from tiny_trl import COMMON

from groupdpo_kernels.trainers import GroupDPOConfig

COUPLED, APART = {"strategy": "coupled"}, {"share_prompt": False}
CHECKPOINTS, SCORED = {"gradient_checkpointing": True}, {"precompute_ref_log_probs": True}
ACCUMULATED = {"gradient_accumulation_steps": 2}
CASES: dict[str, Case] = {
    "fsdp2": Case("fsdp2"),
    "fsdp2 unshared": Case("fsdp2", tied=True, options=APART),
    "fsdp2 coupled": Case("fsdp2", options=COUPLED),
    "fsdp2 adapter": Case("fsdp2", adapter=True, options=CHECKPOINTS | SCORED),
    "fsdp2 accumulation": Case("fsdp2", options=ACCUMULATED | SCORED),
    "fsdp2 auto": Case("fsdp2", equal=True, options={"strategy": "auto", "micro_batch_sequences": None}),
    "zero 1": Case("zero1", options=SCORED),
    "zero 2 adapter": Case("zero2", adapter=True, options=CHECKPOINTS),
    "zero 2 accumulation": Case("zero2", tied=True, options=ACCUMULATED | APART),
    "zero 3": Case("zero3", options=SCORED),
    "zero 3 coupled": Case("zero3", options=COUPLED),
    "zero 3 adapter": Case("zero3", adapter=True, options=APART | SCORED),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the ranks of a run ended with. All runs of a family share two processes, started at its first test."""
    folder, started = tmp_path_factory.mktemp("ranks"), set()

    def of(name: str) -> list[Any]:
        family = CASES[name].family
        if family not in started:
            started.add(family)
            cases = {other: case for other, case in CASES.items() if case.family == family}
            try:
                start_ranks(train_cases, 2, str(folder), cases)
            except RuntimeError as error:
                print(error)  # the reports say where
        return results(folder, name, 2)

    return of


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process_with_the_whole_batch(ranks: Any, name: str, tmp_path: Path) -> None:
    options = CASES[name].options or {}
    same = {k: v for k, v in options.items() if k in ACCUMULATED}
    alone = one_process(CASES[name]._replace(options=same), tmp_path)
    for found in ranks(name):
        check_as_one(found, alone)
        assert found[1] == ("coupled" if options.get("strategy") == "coupled" else "two_pass")
        shares = options.get("share_prompt", True)
        assert (found[3][0]["computed_tokens"] < found[3][0]["num_tokens"]) == shares


@pytest.mark.parametrize(
    "engine, option, message",
    [
        ("fsdp", {"strategy": "one_pass"}, r"strategy must be 'two_pass' or 'coupled' under FSDP: .*; got 'one_pass'"),
        ("zero3", {"strategy": "one_pass"}, "strategy must be 'two_pass' or 'coupled' under DeepSpeed"),
        ("zero2", {"micro_batch_tokens": "auto", "strategy": "two_pass"}, "micro_batch_tokens must be a number"),
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
