"""`logps`: the right numbers for every kind of row, the same bytes after a kill, refusals that say what is wrong."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_cli import PREFERENCES, invoke, lines, refused, run_until, save_model, write_rows
from tiny_models import eager_logps, make

from groupdpo_kernels.data import BadRow
from groupdpo_kernels.data.formats import read_responses

ROWS: list[dict[str, Any]] = [
    {"prompt": "Tea?", "response": " Green."},
    {"prompt": "How long does tea steep?", "completion": " Three minutes.", "response": None, "id": 7},
    {"prompt": [{"role": "user", "content": "Hi."}], "completion": [{"role": "assistant", "content": "Hello."}]},
    {"prompt": "Be brief.", "response": [" Hello.", " No idea. Be brief. Green."]},
    *PREFERENCES,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def expected(folder: Path, prompt: Any, response: str) -> list[float]:
    """Token log-probabilities from the logits of one sequence at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    if isinstance(prompt, str):
        head = tokenizer(prompt)["input_ids"]
        tail = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    else:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        head = tokenizer(text, add_special_tokens=False)["input_ids"]
        tail = tokenizer(response + "</s>", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([head + tail])
    targets = torch.full_like(ids, -100)
    targets[0, len(head) - 1 : -1] = ids[0, len(head) :]
    with torch.no_grad():
        found: list[float] = eager_logps(model, ids, targets)[targets != -100].tolist()
    return found


def test_scores_every_kind_of_row(folder: Path, tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "deep" / "out.jsonl"
    result = invoke("logps", folder, rows, out, "--tokens", "--window", 5, "--max-tokens", 40)
    assert result.exit_code == 0 and "16 responses" in result.stderr, result.stderr
    wanted = [(i, k, *pair) for i, row in enumerate(ROWS) for k, pair in enumerate(_pairs(row))]
    found = lines(out)
    assert [(line["row"], line["response"]) for line in found] == [(i, k) for i, k, _, _ in wanted]
    for line, (_, _, prompt, response) in zip(found, wanted):
        truth = expected(folder, prompt, response)
        assert line["num_tokens"] == len(truth)
        assert line["token_logps"] == pytest.approx(truth, abs=2e-5)
        assert line["logp"] == pytest.approx(sum(line["token_logps"]), abs=1e-9)
    assert "there already" in invoke("logps", folder, rows, out, "--tokens", "--window", 5, "--max-tokens", 40).stderr
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.jsonl", "out.jsonl.state.json"]


def _pairs(row: dict[str, Any]) -> list[tuple[Any, str]]:
    prompt, responses, _ = read_responses(row)
    return [(prompt, response) for response in responses]


def test_what_cannot_be_scored_has_a_line(folder: Path, tmp_path: Path) -> None:
    long = {"prompt": "Be brief. " * 9, "response": " No."}
    rows = write_rows(tmp_path / "rows.jsonl", [ROWS[0], long, {"prompt": "Hi.", "response": ""}])
    out = tmp_path / "out.jsonl"
    result = invoke("logps", folder, rows, out, "--max-length", 20)
    assert result.exit_code == 0 and "2 could not be scored" in result.stderr
    first, second, third = lines(out)
    assert first["logp"] < 0 and "skipped" not in first and "token_logps" not in first
    assert second["logp"] is None and second["skipped"].startswith("too long: a response of")
    assert third["skipped"] == "empty: a response has no tokens"
    other = tmp_path / "cut.jsonl"
    assert invoke("logps", folder, rows, other, "--max-length", 20, "--too-long", "truncate_prompt").exit_code == 0
    again, cut, _ = lines(other)
    assert cut["logp"] < 0 and again["row"] == 0
    assert again["logp"] == pytest.approx(first["logp"], rel=1e-6)  # in another batch, a GEMM may round otherwise


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(folder: Path, tmp_path: Path, dtype: str) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", ROWS[:2]), tmp_path / "out.jsonl"
    invoke("logps", folder, rows, out, "--dtype", dtype)
    for line, row in zip(lines(out), ROWS):
        truth = sum(expected(folder, *_pairs(row)[0]))
        assert line["logp"] == pytest.approx(truth, rel=0.05) and line["logp"] != pytest.approx(truth, rel=1e-7)


def test_a_killed_run_ends_with_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": f"{i}?", "response": " Tea." * (i % 5 + 1)} for i in range(240)]
    )
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    part, state = tmp_path / "out.jsonl.part", tmp_path / "out.jsonl.state.json"
    assert invoke("logps", folder, rows, whole, "--window", 2).exit_code == 0
    run_until(lambda: state.exists() and part.stat().st_size > 2000, "logps", folder, rows, out, "--window", 2)
    assert not out.exists() and 0 < json.loads(state.read_text())["responses"] < 240
    with part.open("ab") as file:  # as a kill within the write of a window leaves it
        file.write(b'{"row": 239, "respo')
    result = invoke("logps", folder, rows, out, "--window", 2)
    assert result.exit_code == 0 and "responses were there already" in result.stderr
    assert out.read_bytes() == whole.read_bytes() and not part.exists()


def test_a_kill_around_the_last_rename(folder: Path, tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "out.jsonl"
    invoke("logps", folder, rows, out)
    content = out.read_bytes()
    out.rename(tmp_path / "out.jsonl.part")  # the state says done, the rename did not come
    assert invoke("logps", folder, rows, out).exit_code == 0
    assert out.read_bytes() == content and not (tmp_path / "out.jsonl.part").exists()


def test_one_process_a_file(folder: Path, tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "out.jsonl"
    with open(tmp_path / "out.jsonl.part", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "is being written by another process" in refused("logps", folder, rows, out)
        assert "is being written by another process" in refused("logps", folder, rows, out, "--overwrite")
    assert invoke("logps", folder, rows, out).exit_code == 0


def test_another_input_model_or_option_is_refused(folder: Path, tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "out.jsonl"
    invoke("logps", folder, rows, out)
    content = out.read_bytes()
    assert "max_length was None and is 30" in refused("logps", folder, rows, out, "--max-length", 30)
    assert "dtype was float32 and is bfloat16" in refused("logps", folder, rows, out, "--dtype", "bfloat16")
    other = shutil.copytree(folder, tmp_path / "other")
    make("llama", seed=1).save_pretrained(other)
    assert "the model has changed" in refused("logps", other, rows, out)
    write_rows(rows, ROWS[:-1])
    message = refused("logps", folder, rows, out)
    assert "the input has changed" in message and "--overwrite" in message
    assert out.read_bytes() == content  # refusing touches nothing
    assert invoke("logps", folder, rows, out, "--overwrite").exit_code == 0
    assert len(lines(out)) == len(content.splitlines()) - 2
    (tmp_path / "out.jsonl.state.json").unlink()
    assert "no run wrote it" in refused("logps", folder, rows, out)
    assert not (tmp_path / "out.jsonl.part").exists()


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    out, rows = tmp_path / "out.jsonl", tmp_path / "rows.jsonl"

    def says(content: str, *more: Any, model: Any = folder) -> str:
        rows.write_text(content)
        return refused("logps", model, rows, out, *more)

    good = json.dumps(ROWS[0]) + "\n"
    message = says(good + '{"prompt": "Tea?", "answer": "Green."}\n')
    assert "row 1" in message and "single: prompt, response|completion" in message and "got answer, prompt" in message
    assert "line 2, must be a JSON object" in says(good + "{prompt}\n")
    assert "line 3, must be a JSON object; got '[1]'" in says(good + "\n[1]\n")
    assert "row 0: a message must have a role" in says('{"prompt": [{"text": "Tea?"}], "response": "Green."}\n')
    assert "row 0: the prompt is empty" in says('{"prompt": "", "response": "Green."}\n')
    assert "row 0: it has no response" in says('{"prompt": "Tea?", "response": []}\n')
    assert "must hold at least one row" in says("\n")
    assert "too_long must be one of skip, truncate_prompt; got 'cut'" in says(good, "--too-long", "cut")
    assert "window must be at least 1; got 0" in says(good, "--window", "0")
    assert "dtype must be one of auto, float32, bfloat16, float16; got 'int8'" in says(good, "--dtype", "int8")
    assert "device must be auto, cpu, cuda or cuda:N; got 'tpux'" in says(good, "--device", "tpux")
    assert "model must be a folder or a hub name" in says(good, "--tokenizer", folder, model=tmp_path / "none")
    assert "rows must be a file" in refused("logps", folder, tmp_path / "none.jsonl", out)
    assert not out.exists() and not (tmp_path / "out.jsonl.part").exists()


def test_tokenizers_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", ROWS[:1]), tmp_path / "out.jsonl"
    bare = shutil.copytree(folder, tmp_path / "bare")
    _change(bare / "tokenizer_config.json", eos_token=None, pad_token=None)
    assert "tokenizer must have an eos token" in refused("logps", bare, rows, out)
    assert invoke("logps", bare, rows, out, "--no-eos").exit_code == 0  # a pad token is nobody's need
    small = tmp_path / "small"
    make("llama", vocab_size=300).save_pretrained(small)
    message = refused("logps", small, rows, tmp_path / "two.jsonl", "--tokenizer", folder)
    assert "tokenizer must have no more ids than the model has embeddings, 300; got" in message
    assert "tokenizer must be a folder or a hub name" in refused("logps", small, rows, tmp_path / "three.jsonl")


def _change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_log_probability_that_is_no_number(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    model.save_pretrained(folder)
    rows, out = write_rows(tmp_path / "rows.jsonl", ROWS[:2]), tmp_path / "out.jsonl"
    assert "row 0, response 0: its log-probability is nan" in refused("logps", folder, rows, out)


def test_rows_of_one_side_only() -> None:
    assert read_responses({"prompt": "Tea?", "response": "Green.", "completion": None}) == ("Tea?", ["Green."], None)
    assert read_responses(PREFERENCES[0])[1] == [" Green.", " Hi. Green tea.", " Coffee."]
    with pytest.raises(BadRow, match="a response must begin and end with a message of the assistant"):
        read_responses({"prompt": "Tea?", "response": [{"role": "user", "content": "Green."}]})
