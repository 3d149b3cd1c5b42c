"""sDPO: processes that are killed, beside others and as ranks; files that are not what they seem."""

from __future__ import annotations

import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import CONTEXT
from tiny_models import batch, make
from tiny_training import PARTS, B, Counting, L, Training, lora, run_as_rank, run_until_killed, run_with_others, stages
from torch import Tensor, nn

from groupdpo_kernels.stepwise import reference_logps, run_stages, store
from groupdpo_kernels.stepwise.store import tensor_digests


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The same number of threads in every process, so that sums are the same bit for bit; and little load."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    torch.set_num_threads(1)
    return tensor_digests(stages(make("llama"), tmp_path_factory.mktemp("undisturbed")))


# ------------------------------------------------------------------------------------------------------------- resume


def in_process(target: Callable[..., None], *args: Any) -> Any:
    process = CONTEXT.Process(target=target, args=args)
    process.start()
    return process


@pytest.mark.parametrize(
    ("where", "at", "batches_left"),
    [
        ("score", 2, 5),  # in stage 1, with one chunk on disk
        ("score", 5, 2),  # in stage 2
        ("write", 700, 6),  # half of the first chunk's file
        ("write", 20_000, 3),  # part of the first checkpoint, after three chunks
        ("rename", 6, 2),  # of the second chunk of stage 2: the file is whole, under its temporary name
        ("train", 2, 0),  # after the first step of stage 2
    ],
)
def test_a_killed_process_resumes_to_the_same_bits(
    where: str, at: int, batches_left: int, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    process = in_process(run_until_killed, tmp_path, where, at)
    process.join()
    assert process.exitcode == -(signal.SIGXFSZ if where == "write" else signal.SIGKILL)
    left = list(tmp_path.rglob(".*.tmp"))
    assert len(left) == (where in ("write", "rename"))
    assert all(path.stat().st_size == at for path in left if where == "write"), "cut in the middle"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing that a killed process leaves is taken for a damaged file
        score = Counting()
        assert tensor_digests(stages(make("llama"), tmp_path, score=score)) == undisturbed
    assert score.done == batches_left, "what was on disk is not scored again"
    assert not list(tmp_path.rglob(".*.tmp")), "a later write removes what a killed process left"


def test_killed_again_and_again(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """Each attempt lives long enough for one file more; at last nothing is left to do."""
    exits = []
    while not exits or exits[-1]:
        process = in_process(run_until_killed, tmp_path, "rename", 2)
        process.join()
        exits.append(process.exitcode)
        assert len(exits) < 10
    assert exits == [-signal.SIGKILL] * 7 + [0], "eight files: three of scores and a checkpoint a stage"
    score = Counting()
    assert tensor_digests(stages(make("llama"), tmp_path, score=score)) == undisturbed and score.done == 0


def test_two_processes_at_once(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    barrier, results = CONTEXT.Barrier(2), CONTEXT.Queue()
    processes = [in_process(run_with_others, tmp_path, barrier, results) for _ in range(2)]
    assert [results.get(timeout=60) for _ in processes] == [undisturbed] * 2
    for process in processes:
        process.join()
    assert not list(tmp_path.rglob(".*.tmp"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score = Counting()
        assert tensor_digests(stages(make("llama"), tmp_path, score=score)) == undisturbed and score.done == 0


def test_ranks_go_in_step_whatever_each_has_on_disk(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """Disks of their own: rank 0 has stage 1 and two chunks of stage 2, rank 1 has two chunks of stage 1."""
    stages(make("llama"), tmp_path / "0")
    next((tmp_path / "0").glob("stage-2-*.pt")).unlink()
    first, second = sorted((tmp_path / "0").glob("ref-*"), key=lambda path: path.stat().st_mtime)
    (second / "000001.pt").unlink()
    (tmp_path / "1").mkdir()
    shutil.copytree(first, tmp_path / "1" / first.name)
    (tmp_path / "1" / first.name / "000000.pt").unlink()
    results = CONTEXT.Queue()
    processes = [in_process(run_as_rank, rank, tmp_path, results) for rank in range(2)]
    assert [results.get(timeout=60) for _ in processes] == [(1 + 3, undisturbed)] * 2
    for process in processes:
        process.join()


# -------------------------------------------------------------------------------------------------- trainers' own files


def test_a_trainer_saves_and_loads_by_itself(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    import safetensors.torch

    def save(model: nn.Module, path: Path) -> None:
        model.save_pretrained(path)

    def load(model: nn.Module, path: Path) -> None:
        model.load_state_dict(safetensors.torch.load_file(path / "model.safetensors"))

    assert tensor_digests(stages(make("llama"), tmp_path, save=save, load=load)) == undisturbed
    next(tmp_path.glob("stage-2-*.pt")).unlink()  # killed before the record: the folder alone counts for nothing
    train = Training()
    assert tensor_digests(stages(make("llama"), tmp_path, train, save=save, load=load)) == undisturbed
    assert list(train.losses) == [2]
    with pytest.raises(ValueError, match="weights that were saved after stage 2; it gave others"):
        stages(make("llama"), tmp_path, save=save, load=lambda model, path: None)


def test_a_fingerprint_of_ones_own(tmp_path: Path) -> None:
    """For weights that are not in the state dict: nothing else than what it says counts."""
    version = {"": "step 0"}

    def train(model: nn.Module, part: Any, ref_logps: Tensor, stage: int) -> None:
        Training()(model, part, ref_logps, stage)
        version[""] = f"step {stage}"

    def fingerprint(model: nn.Module) -> dict[str, str]:
        return dict(version)

    trained = stages(make("llama"), tmp_path, train, fingerprint=fingerprint)
    with pytest.raises(ValueError, match="it gave others"):
        version[""] = "step 0"
        stages(make("llama"), tmp_path, train, fingerprint=fingerprint)
    loaded = make("llama")
    loaded.load_state_dict(store.read(next(tmp_path.glob("stage-2-*.pt")))["tensors"])
    assert tensor_digests(loaded) == tensor_digests(trained)


# --------------------------------------------------------------------------------------------------------------- files


def scored(model: nn.Module, directory: Path, part: Any = PARTS[0], **changes: Any) -> tuple[Tensor, int]:
    score = Counting()
    values = reference_logps(
        model, part, directory, **{"score": score, "count": lambda row: B, "chunk_size": 1} | changes
    )
    return values, score.done


def test_scores_are_kept_by_weights_and_data(tmp_path: Path) -> None:
    model, part = make("llama"), PARTS[0]
    values, done = scored(model, tmp_path)
    assert done == 3
    again, done = scored(make("llama"), tmp_path)
    assert done == 0 and torch.equal(values, again)

    with torch.no_grad():
        model.model.norm.weight[0] = torch.nextafter(model.model.norm.weight[0], torch.tensor(9.0))
    changed_token = [part[0] | {"input_ids": part[0]["input_ids"].clone()}, *part[1:]]
    changed_token[0]["input_ids"][0, 0] += 1
    assert scored(model, tmp_path)[1] == 3, "one bit of one weight"
    assert scored(make("llama"), tmp_path, changed_token)[1] == 3, "one token"
    assert scored(make("llama"), tmp_path, part[::-1])[1] == 3, "another order"
    assert scored(make("llama").bfloat16(), tmp_path)[1] == 3, "another dtype"
    assert scored(make("llama", rms_norm_eps=1e-5), tmp_path)[1] == 3, "another config"
    assert scored(make("llama"), tmp_path, options={"temperature": 0.5})[1] == 3
    assert scored(make("llama"), tmp_path, chunk_size=2)[1] == 3, "sums may round otherwise"
    with torch.autocast("cpu", torch.bfloat16):
        assert scored(make("llama"), tmp_path)[1] == 3
    assert len(list(tmp_path.iterdir())) == 9
    assert scored(make("llama"), tmp_path)[1] == 0, "the first is still there"


def test_scores_are_kept_by_adapters(tmp_path: Path) -> None:
    model = lora()
    assert scored(model, tmp_path)[1] == 3 and scored(lora(), tmp_path)[1] == 0
    with torch.no_grad():
        next(x for name, x in model.named_parameters() if "lora_B" in name)[0, 0] = 1e-3
    assert scored(model, tmp_path)[1] == 3
    assert scored(lora(use_rslora=True), tmp_path)[1] == 3, "the same tensors, scaled otherwise"


def flipped(path: Path, others: list[Path]) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def evil(path: Path, others: list[Path]) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (path.with_suffix(".executed"),)

    store.write(path, {"key": Evil()})


DAMAGE: dict[str, Callable[[Path, list[Path]], Any]] = {
    "truncated": lambda path, others: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path, others: os.truncate(path, 0),
    "flipped": flipped,
    "a torch file": lambda path, others: torch.save({"values": torch.zeros(B)}, path),
    "another chunk": lambda path, others: shutil.copy(others[0], path),
    "other keys": lambda path, others: store.write(path, {"values": torch.zeros(B)}),
    "code": evil,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_file_is_computed_again_with_one_warning(damage: str, tmp_path: Path) -> None:
    model = make("llama")
    values, _ = scored(model, tmp_path)
    first, second, third = sorted(tmp_path.rglob("*.pt"))
    DAMAGE[damage](first, [third])
    DAMAGE[damage](second, [third])
    with pytest.warns(UserWarning, match=r"000000.pt .*\(and 1 more\): computed again") as caught:
        again, done = scored(model, tmp_path)
    assert len(caught) == 1 and done == 2 and torch.equal(again, values)
    assert not list(tmp_path.rglob("*.executed"))
    assert scored(model, tmp_path)[1] == 0


@pytest.mark.parametrize("damage", ["truncated", "flipped", "another chunk"])
def test_a_damaged_checkpoint_costs_its_stage(damage: str, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    stages(make("llama"), tmp_path)
    one, two = (next(tmp_path.glob(f"stage-{k}-*.pt")) for k in (1, 2))
    DAMAGE[damage](two, [one])
    train, score = Training(), Counting()
    with pytest.warns(UserWarning, match="stage 2 is trained again"):
        assert tensor_digests(stages(make("llama"), tmp_path, train, score)) == undisturbed
    assert list(train.losses) == [2] and score.done == 0


def test_another_model_seed_or_option_is_another_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stages(make("llama"), tmp_path)
    assert not caplog.records
    for build, changes in (
        (lambda: make("llama", seed=3), {}),
        (lambda: make("llama"), {"seed": 7}),
        (lambda: make("llama"), {"options": {"learning_rate": 3e-4}}),
    ):
        train = Training()
        stages(build(), tmp_path, train, **changes)
        assert list(train.losses) == [1, 2]
        assert "holds stages of other models, data or options" in caplog.text
        caplog.clear()
    train = Training()
    stages(make("llama"), tmp_path, train)
    assert not train.losses and not caplog.records


def test_parts_may_be_added_at_the_end(tmp_path: Path) -> None:
    options: dict[str, Any] = {"score": Counting(), "count": lambda row: B, "chunk_size": 1}
    train, more = Training(), [batch(B, L, seed=99)]
    run_stages(make("llama"), PARTS, train, tmp_path, **options)
    run_stages(grown := make("llama"), [*PARTS, more], train, tmp_path, **options)
    run_stages(whole := make("llama"), [*PARTS, more], Training(), tmp_path / "whole", **options)
    assert tensor_digests(grown) == tensor_digests(whole)
    assert {stage: len(losses) for stage, losses in train.losses.items()} == {1: 3, 2: 3, 3: 1}
