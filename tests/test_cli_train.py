"""`train`: learns, resumes to the same bits after a kill, saves what loads again, refuses what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_cli import PREFERENCES, invoke, refused, run_until, save_model, write_rows
from tiny_models import make

from groupdpo_kernels.cli.training import TrainSettings, read_settings, train

FLAGS = ("--loss", "mpo", "--beta", 1, "--average", "--nll-weight", 0.5, "--lr", 0.01, "--groups-per-step", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("model"))
    write_rows(folder / "rows.jsonl", PREFERENCES)
    write_rows(folder / "pairs.jsonl", [PREFERENCES[3], {"prompt": "Tea?", "chosen": " Green.", "rejected": " No."}])
    return folder


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def test_trains_reports_and_saves(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = ("--data", folder / "rows.jsonl", "--eval-data", folder / "pairs.jsonl")
    result = invoke("train", "--model", folder, *data, "--out", out, *FLAGS, "--max-steps", 12, "--seed", 3)
    assert result.exit_code == 0, result.stderr
    for words in ("4 rows", "chunks to score", "step 12 of 12: loss", "held out"):
        assert words in result.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["steps"] == 12 and report["groups_per_step"] == 2 and report["resumed_from"] is None
    assert report["parameters"] == report["trainable_parameters"] > 10_000
    assert report["data"]["train"]["kept"] == {"read": [4, 11], "tokenized": [4, 11]}
    steps = [row["step"] for row in report["history"] if "loss" in row]
    assert steps == list(range(1, 13))
    assert report["last"]["loss"] < 0.7 * report["first"]["loss"] and report["last"]["rewards/accuracies"] > 0.8
    assert report["evaluation"]["step"] == 12 and 0 <= report["evaluation"]["eval_rewards/accuracies"] <= 1
    assert report["run"]["settings"]["objective"] == {"loss": "mpo", "beta": 1.0, "average": True, "nll_weight": 0.5}
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    start = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    found = transformers.AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
    assert all(not torch.equal(found[name], value) for name, value in start.items() if value.dim() > 1)
    assert transformers.AutoTokenizer.from_pretrained(out / "model")("Tea?") is not None
    assert len([*out.glob("checkpoint-*")]) == 1 and not [*out.glob(".model*")]
    again = invoke("train", "--model", folder, *data, "--out", out, *FLAGS, "--max-steps", 12, "--seed", 3)
    assert again.exit_code == 0 and "holds the whole run already" in again.stderr


def test_a_killed_run_ends_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    config = folder / "killed.toml"
    config.write_text(
        f"""model = "{folder}"
data = "{folder / "rows.jsonl"}"
[objective]
loss = "all_pairs"
balance = {{ ceiling = 1.5 }}
[training]
max_steps = 60
save_steps = 4
learning_rate = 1e-3
per_device_train_batch_size = 2
"""
    )
    assert invoke("train", config, "--out", whole).exit_code == 0
    run_until((out / "checkpoint-8" / "whole").exists, "train", config, "--out", out)
    assert not (out / "report.json").exists() and not (out / "model").exists()
    broken = out / "checkpoint-59"  # as a kill in the middle of writing one leaves it
    broken.mkdir()
    (broken / "trainer_state.json").write_text("{}")
    result = invoke("train", config, "--out", out)
    assert result.exit_code == 0 and "going on from" in result.stderr, result.stderr
    assert not broken.exists()
    ours, theirs = weights(out), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("report.json", "curves.png"):  # a kill after the last step, in the middle of what comes then
        (whole / name).unlink()
    (whole / "model").rename(whole / ".model.tmp")
    assert invoke("train", config, "--out", whole).exit_code == 0
    assert all(torch.equal(ours[name], value) for name, value in weights(whole).items())
    assert not (whole / ".model.tmp").exists()
    reports = [json.loads((place / "report.json").read_text()) for place in (out, whole)]
    assert reports[0]["resumed_from"] is not None and reports[1]["resumed_from"] == "checkpoint-60"
    numbers = [[(row["step"], row["loss"], row["rewards/margins"]) for row in report["history"]] for report in reports]
    assert numbers[0] == numbers[1] and len(numbers[0]) == 60


def test_another_run_in_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    settings = {"model": str(folder), "data": str(folder / "rows.jsonl"), "output_dir": str(tmp_path / "out")}
    options = {"objective": {"loss": "simpo"}, "training": {"max_steps": 2, "rule": "best_vs_rest"}}
    pairs = {**settings, "data": str(folder / "pairs.jsonl")}
    assert train(TrainSettings(**pairs, **options))["steps"] == 2
    changed = {**options, "objective": {"loss": "simpo", "gamma": 0.5}}
    with pytest.raises(ValueError, match=r"begun otherwise: objective.gamma was None and is 0.5; give another"):
        train(TrainSettings(**pairs, **changed))
    with pytest.raises(ValueError, match="the train data has changed"):
        train(TrainSettings(**settings, **options))
    other = save_model(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="the model has changed"):
        train(TrainSettings(**{**pairs, "model": str(other)}, **options))
    (tmp_path / "out" / "run.json").unlink()
    with pytest.raises(ValueError, match="holds another trainer's"):
        train(TrainSettings(**pairs, **options))


@pytest.mark.parametrize("strategy", ["two_pass", "one_pass"])
def test_lora_from_a_config_of_random_weights(folder: Path, tmp_path: Path, strategy: str) -> None:
    """Both strategies, bf16 arithmetic, an adapter, no checkpoint to begin with: a config.json is a model."""
    out, config = tmp_path / "out", tmp_path / "config.json"
    shutil.copy(folder / "config.json", config)
    arguments = ("--model", config, "--tokenizer", folder, "--data", folder / "rows.jsonl", "--out", out)
    more = ("--strategy", strategy, "--lora-rank", 4, "--lr", 0.05, "--max-steps", 10, "--bf16", *FLAGS[:5])
    result = invoke("train", *arguments, *more, "--micro-batch-sequences", 1 if strategy == "one_pass" else 3)
    assert result.exit_code == 0, result.stderr
    report = json.loads((out / "report.json").read_text())
    assert 0 < report["trainable_parameters"] < 0.3 * report["parameters"]
    assert report["last"]["loss"] < report["first"]["loss"]
    assert (out / "model" / "adapter_model.safetensors").exists() and not (out / "model" / "model.safetensors").exists()
    assert json.loads((out / "model" / "adapter_config.json").read_text())["r"] == 4


def test_reference_free_losses_score_no_reference(folder: Path, tmp_path: Path) -> None:
    arguments = ("--model", folder, "--data", folder / "pairs.jsonl", "--out", tmp_path / "out", "--max-steps", 1)
    assert invoke("train", *arguments, "--loss", "cpo").exit_code == 0
    assert not (tmp_path / "out" / "ref_logps").exists()


def test_fewer_steps_than_one_log_takes(folder: Path, tmp_path: Path) -> None:
    training = {"max_steps": 2, "logging_steps": 100, "per_device_train_batch_size": 2}
    settings = TrainSettings(
        str(folder), str(folder / "rows.jsonl"), str(tmp_path / "out"), objective={"loss": "mpo"}, training=training
    )
    report = train(settings)
    assert report["steps"] == 2 and report["first"]["loss"] == report["last"]["loss"] > 0


def test_files_of_settings(tmp_path: Path) -> None:
    json_file, toml = tmp_path / "a.json", tmp_path / "a.toml"
    json_file.write_text('{"model": "m", "objective": {"loss": "mpo"}, "training": {"max_steps": 3}}')
    toml.write_text('model = "m"\nobjective = { loss = "mpo" }\n[training]\nmax_steps = 3\n')
    assert read_settings(json_file) == read_settings(toml)
    for content, message in {
        "{": "Expecting property name",
        "[1]": "must be an object",
        '{"modle": "m"}': "no option 'modle'; did you mean model?",
        '{"objective": "mpo"}': "objective must be a table; got 'mpo'",
    }.items():
        json_file.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_settings(json_file)
    with pytest.raises(ValueError, match=r"must end in .toml or .json"):
        read_settings(Path(__file__))


def test_bad_input(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each before anything is trained: one message that names the argument, what it must be, and what it is."""
    rows, out, given = folder / "rows.jsonl", tmp_path / "out", tmp_path / "given.jsonl"
    known = ("--model", folder, "--out", out)

    def says(*flags: Any, content: dict[str, Any] | None = None) -> str:
        data = rows if content is None else write_rows(given, [content])
        return refused("train", *known, "--data", data, *flags)

    assert "loss must be a callable or one of sigmoid, hinge" in says("--loss", "dpo")
    assert "beta must be positive" in says("--beta", -1)
    assert "strategy must be one of auto, two_pass, one_pass, coupled; got 'three'" in says("--strategy", "three")
    assert "groups must be pairs for loss 'sigmoid'; row 0 of train_dataset has 3 responses" in says()
    message = says("--loss", "mpo", content={"prompt": "Tea?", "good": " Green.", "bad": " Coffee."})
    assert "row 0" in message and "pairs: chosen, rejected" in message and "got bad, good, prompt" in message
    only = {"prompt": "Tea?", "positives": [" Green."], "negatives": []}
    assert "must hold a group that can be used" in says("--loss", "mpo", content=only)
    assert "error: row 0: its group is left without a negative response" in says(
        "--loss", "mpo", "--on-bad", "error", content=only
    )
    assert "model must be a folder or a hub name; /no/model is not there" in refused(
        "train", "--model", "/no/model", "--tokenizer", folder, "--data", rows, "--out", out
    )
    assert "data must be a file" in refused("train", *known, "--data", tmp_path)
    assert "--out must be given" in refused("train", "--model", folder, "--data", rows)
    config = tmp_path / "c.json"
    for content, wanted in {
        '{"training": {"lerning_rate": 1}}': "training has no option 'lerning_rate'; did you mean learning_rate",
        '{"training": {"save_total_limit": 1}}': "save_total_limit must be at least 2",
        '{"training": {"logging_strategy": "no"}}': "logging_strategy must be steps or epoch",
        '{"training": {"output_dir": "x"}}': "training has no option 'output_dir'",
        '{"objective": {"beta": "much"}}': "objective must have numbers for numbers",
        '{"objective": {"balance": {"cap": 2}}}': "objective.balance has no option 'cap'",
        '{"lora": {"rank": 2}, "objective": {"loss": "mpo"}}': "lora has no option 'rank'",
    }.items():
        config.write_text(content)
        assert wanted in refused("train", config, *known, "--data", rows), content
    bare = shutil.copytree(folder, tmp_path / "bare")
    path = bare / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None, "pad_token": None}))
    message = refused("train", "--model", bare, "--data", rows, "--out", tmp_path / "two", "--loss", "mpo")
    assert "must have a pad_token, or an eos_token" in message
    small = tmp_path / "small"
    make("llama", vocab_size=300).save_pretrained(small)
    message = refused("train", "--model", small, "--tokenizer", folder, "--data", rows, "--out", tmp_path / "three")
    assert "no more ids than the model has embeddings" in message
    assert "device must be one of auto, cpu, cuda; got 'cuda:1'" in says("--device", "cuda:1")
    assert not (out / "model").exists() and not [*out.glob("checkpoint-*")]
