"""Profiles: the rows they draw are as peaked as they say, at any shape; the script that recorded them runs."""

import math
from pathlib import Path

import pytest
import torch
from processes import run_script
from safetensors import safe_open

from bench import recorded_rows
from bench.recorded_rows import PROFILES, RECORDED, Rows, describe_rows, draw_profile, load_rows

ROOT = Path(__file__).resolve().parent.parent
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("name", PROFILES)
def test_deterministic(name):
    first, again, other = (draw_profile(name, 40, 48, 700, BF16, seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not any(torch.equal(a, b) for a, b in zip(first, other))


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize(
    "T, D, V, dtype",
    [(1, 2, 2, FP32), (5, 16, 9, BF16), (600, 24, 300, FP16), (64, 64, 1000, BF16), (3, 256, 20000, FP32)],
)
def test_shapes(name, T, D, V, dtype):
    hidden, weight, targets = draw_profile(name, T, D, V, dtype)
    assert hidden.shape == (T, D) and weight.shape == (V, D) and targets.shape == (T,)
    assert hidden.dtype == weight.dtype == dtype and targets.dtype == torch.long
    assert hidden.isfinite().all() and weight.isfinite().all()
    assert targets.min() >= 0 and targets.max() < V


def test_flat():
    V = 2000
    rows = describe_rows(*draw_profile("flat", 100, 64, V, BF16))
    assert rows.entropy == pytest.approx(math.log(V), abs=0.03) and rows.not_target > 0.99


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_confident(dtype):
    """0.4 nats after rounding; and the targets are what such rows would say."""
    hidden, weight, targets = draw_profile("confident", 256, 256, 2000, dtype)
    rows = describe_rows(hidden, weight, targets)
    assert abs(rows.entropy - 0.4) < 0.02
    p = (hidden.float() @ weight.float().T).softmax(-1)
    assert abs(1 - rows.not_target - p.square().sum(-1).mean()) < 0.05


@pytest.mark.parametrize("name", RECORDED)
def test_rows_are_as_recorded(name):
    """At the recorded vocabulary, every recorded row once; and rows share their candidates as they did."""
    recorded = load_rows(RECORDED[name])
    inputs = draw_profile(name, 512, 1024, recorded.V, BF16)
    found = describe_rows(*inputs)
    model = recorded_rows.summarise(recorded.statistics)
    for field in ("entropy", "candidates", "kept_mass", "dropped_mass", "not_target"):
        assert getattr(found, field) == pytest.approx(getattr(model, field), rel=0.15), field
    assert abs(found.sparse_rows - model.sparse_rows) < 0.05
    assert recorded_rows.shared_candidates(*inputs[:2]) == pytest.approx(recorded.sharing.tolist(), rel=0.35)


def test_describe_rows_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125], [1 - 3e-4, 1e-4, 1e-4, 1e-4]])
    entropy = -(p * p.log()).sum(-1).mean().item()
    # Candidates at 0.2 / 32 = 2^-7.3: the first row has all; the second its first token, and its target.
    found = describe_rows(p.log(), torch.eye(4), torch.tensor([1, 3]), grad_tol=0.2)
    assert found == pytest.approx(Rows(entropy, 3.0, 1 - 1e-4, 1e-4, (0.75 + 1 - 1e-4) / 2, 1.0), rel=1e-3)
    # With the first token as its target the second row has a gradient of 3e-4, all of it dropped.
    assert describe_rows(p.log(), torch.eye(4), torch.tensor([1, 0]), grad_tol=0.2).sparse_rows == 0.5


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"flat, trained, smollm2, confident; got 'peaked'"):
        draw_profile("peaked", 4, 4, 4, FP32)
    with pytest.raises(ValueError, match=r"T >= 1, D >= 2 and V >= 2; got 0, 4 and 4"):
        draw_profile("flat", 0, 4, 4, FP32)
    with pytest.raises(FileNotFoundError, match=r"bench/train_rows\.py"):
        load_rows(Path("nowhere.safetensors"))


@pytest.mark.parametrize("name", RECORDED)
def test_data_files_are_small_and_what_the_package_reads(name):
    assert RECORDED[name].stat().st_size <= 200_000
    tensors, texts = recorded_rows.read_safetensors(RECORDED[name])
    with safe_open(RECORDED[name], "pt") as file:
        assert texts == file.metadata() and tensors.keys() == set(file.keys())
        assert all(torch.equal(x, file.get_tensor(key)) for key, x in tensors.items())


def test_script_writes_rows(tmp_path):
    path = tmp_path / "rows.safetensors"
    done = run_script("bench/train_rows.py", "--quick", "--out", path, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    recorded = load_rows(path)
    assert recorded.V == 1024 and len(recorded.ids) == len(recorded.statistics) == 32 and "seed 0" in recorded.made_by
    for row, ids in zip(recorded.logps, recorded.ids):
        assert (row.diff() <= 0).all() and ids.unique().numel() == recorded_rows.HEAD
