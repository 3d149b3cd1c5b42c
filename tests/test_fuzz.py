"""A slice of `make fuzz`: the same draws every run. Below it, a test for each kind of fault that fuzzing has found."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_arguments import CALLS, wrong
from fuzz_arguments import fault_of as fault_of_argument
from fuzz_bytes import fault_of as fault_of_file
from fuzz_bytes import mutated
from fuzz_rows import deep, fault_of, tokenizer, wrong_rows
from hypothesis import Phase, given, settings
from preference_rows import EXAMPLES, TEA, says

from groupdpo_kernels import PreferenceGroups, linear_logps
from groupdpo_kernels.cli import loading
from groupdpo_kernels.cli.training import TrainSettings, make_objective, read_settings
from groupdpo_kernels.data import Report, margin, read_groups, threshold, tokenize_groups
from groupdpo_kernels.data.formats import as_score
from groupdpo_kernels.lm_head.extension import extension_why_not

PAIR = EXAMPLES["texts"][0]


@settings(max_examples=500, phases=[Phase.generate])
@given(row=wrong_rows())
def test_rows(row: dict[Any, Any]) -> None:
    assert not fault_of(row)


def test_bytes(tmp_path: Path) -> None:
    files = [mutated(random.Random(seed)) for seed in range(1000)]
    assert not {fault for data in files if (fault := fault_of_file(data, tmp_path / "rows.jsonl"))}


def test_ops_in_a_process_that_may_die() -> None:
    script = Path(__file__).with_name("fuzz_tensors.py")
    done = subprocess.run([sys.executable, script, "0", "250"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "done", (done.stdout[-500:], done.stderr[-500:])


@pytest.mark.parametrize("call", [call for call in CALLS if call != "GroupDPOTrainer"])
def test_arguments(call: str) -> None:
    """A third of the wrong values of each argument."""
    faults = []
    for name, value in CALLS[call][1]().items():
        for what, odd in wrong(name, value):
            if zlib.crc32(f"{call} {name} {type(odd)} {what[:12]}".encode(errors="replace")) % 3 == 0:
                fault = fault_of_argument(call, name, odd)
                faults += [f"{name}, {what}: {fault}"] * bool(fault)
    assert not faults


# -------------------------------------------------------------------------------------------------- what was found


def why_dropped(row: dict[str, Any]) -> str:
    report = Report()
    assert not [*read_groups(row, report=report)]
    return " ".join(report.first.values())


@pytest.mark.parametrize(
    "role", ["user\u200b", "us\u0435r", "user ", "User", "", "user\u0301", "\u202euser", 5, ["user"]]
)
def test_a_role_is_a_plain_word(role: Any) -> None:
    """A template writes it as it is: a look-alike of user would be another speaker."""
    assert "a role must be a word of ASCII letters" in why_dropped(
        {**PAIR, "prompt": [{"role": role, "content": "Tea?"}]}
    )
    (group,) = read_groups({**PAIR, "prompt": [{"role": "developer", "content": "Tea?"}]})
    assert group.prompt == [{"role": "developer", "content": "Tea?"}]


@pytest.mark.parametrize("content", [5, True, {"text": "Tea?"}, b"Tea?", math.nan])
def test_a_content_is_a_text(content: Any) -> None:
    """A template would write the repr of anything."""
    assert "a message must be text; got" in why_dropped({**PAIR, "prompt": [{"role": "user", "content": content}]})
    assert "must have a role and a content; got role" in why_dropped({**PAIR, "prompt": [{"role": "user"}]})


@pytest.mark.parametrize("more", [5, math.nan, ["Tea?"], {1: "a"}])
def test_alpacas_input_is_a_text(more: Any) -> None:
    """A table of pandas fills a column with NaN."""
    assert "input must be text; got" in why_dropped({**EXAMPLES["alpaca"][0], "input": more})


@pytest.mark.parametrize(
    ("responses", "scores"), [("abc", "123"), ({"a": 1, "b": 2}, [1, 2]), (["a", "b"], {1: 2, 2: 1})]
)
def test_letters_and_names_are_no_responses(responses: Any, scores: Any) -> None:
    row = {"prompt": "Tea?", "all_generated_responses": responses, "scores": scores}
    assert "must be a list; got" in why_dropped(row)


@pytest.mark.parametrize("depth", [200, 3000, 100_000])
def test_values_nested_too_deep(depth: int) -> None:
    for column, value in {
        "tools": [{"a": deep(depth)}],
        "prompt": deep(depth),
        "weight": deep(depth),
        "history": deep(depth),
    }.items():
        assert "row 0" in why_dropped({**PAIR, column: value})
    assert "an image must be an object or a path; got" in why_dropped({**PAIR, "images": [deep(depth)]})
    message = {"role": "user", "content": "Tea?", "more": deep(depth, key="a")}
    assert "nested more than 100 deep" in why_dropped({**PAIR, "prompt": [message]})


def test_numbers_beyond_floats() -> None:
    assert as_score(10**400) is None and as_score("1e999") is None
    assert "weight must be a finite number" in why_dropped({**PAIR, "weight": 10**400})
    with pytest.raises(ValueError, match="beta must be a number that a float can hold"):
        make_objective({"beta": 10**400})
    with pytest.raises(ValueError, match="temperature must be a number that a float can hold"):
        linear_logps(torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1]), temperature=10**400)


def test_names_of_columns() -> None:
    with pytest.raises(TypeError, match="row 1 has 5"):
        list(read_groups([PAIR, {**PAIR, 5: "a"}]))
    with pytest.raises(
        ValueError, match=r"rename must give each column a name of its own; row 0 then has 'chosen' twice"
    ):
        list(read_groups([{**PAIR, "good": "Green."}], rename={"good": "chosen"}))
    assert "the names in a dict must be text; got 5" in why_dropped({**PAIR, "prompt": [{**TEA[0], 5: "a"}]})


def test_rules_that_compare_with_nothing() -> None:
    """With NaN every comparison is False: all responses would be left out."""
    for wrong_rule in (lambda: threshold(math.nan), lambda: threshold(0.0, math.inf), lambda: margin(math.inf)):
        with pytest.raises(ValueError, match="must be finite"):
            wrong_rule()
    listed = EXAMPLES["listed"][0]
    for found in ([(7, True)], [(0, True), (0, False)], [(0, "no")], None, 5, [0]):
        with pytest.raises(ValueError, match="rule must give a list of pairs"):
            list(read_groups(listed, rule=lambda scores, found=found: found))


@pytest.mark.parametrize("arguments", [5, ["Rome"], True])
def test_arguments_of_a_call(arguments: Any) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": arguments}}]}
    said = why_dropped({"prompt": TEA, "chosen": [call, says("Yes.")], "rejected": [says("No.")]})
    assert "the arguments in tool_calls must be a dict, or JSON of one; got" in said


@pytest.mark.parametrize(
    "broken", ["{{ 1 // 0 }}", "{{ messages[0]['content'] + 1 }}", "{% for x in range(10**9) %}{% endfor %}"]
)
def test_whatever_a_template_raises_is_a_bad_row(broken: str) -> None:
    words, report = tokenizer(), Report()
    groups = [*read_groups(EXAMPLES["messages"][0])]
    kept = words.chat_template
    try:
        words.chat_template = broken
        assert not [*tokenize_groups(groups, words, report=report)]
    finally:
        words.chat_template = kept
    assert "the chat template refuses it" in report.first["template"]


def test_a_name_that_an_object_has_twice(tmp_path: Path) -> None:
    """JSON takes the last, and a row would have another chosen response than its writer meant."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"chosen": "Yes.", "chosen": "No."}\n')
    with pytest.raises(ValueError, match=r"line 2, .*each name once; got 'chosen' twice"):
        list(loading.jsonl(tmp_path / "a.jsonl"))
    (tmp_path / "a.json").write_text('{"model": "a", "model": "b"}')
    with pytest.raises(ValueError, match=r"each name once; got 'model' twice"):
        read_settings(tmp_path / "a.json")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_line_is_held_and_not_the_file(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a line that is longer than any row is refused before it is read to its end."""
    monkeypatch.setattr(loading, "LONGEST_LINE", 2**16)
    rows = [{"a": "é" * 1000}] * 1000
    (tmp_path / "many.jsonl").write_text("\r\n".join(map(json.dumps, rows)), encoding=encoding)
    (tmp_path / "long.jsonl").write_text(f'{{"a": "{"x" * 2**23}"}}', encoding=encoding)
    assert list(loading.jsonl(tmp_path / "many.jsonl")) == rows
    tracemalloc.start()
    try:
        for _ in loading.jsonl(tmp_path / "many.jsonl"):
            pass
        with pytest.raises(ValueError, match=r"line 1, must have at most"):
            list(loading.jsonl(tmp_path / "long.jsonl"))
        assert tracemalloc.get_traced_memory()[1] < 2**20  # the files have six and eight million bytes, or more
    finally:
        tracemalloc.stop()


def test_settings_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config .*deep\.json: "):
        read_settings(tmp_path / "deep.json")
    with pytest.raises(TypeError, match="model must be text; got 5"):
        TrainSettings(model=5, data="d", output_dir="o")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"{", b"[1]", b'{"model_type": "llama", "vocab_size": -5}', b"[" * 100_000]
)
def test_a_config_that_makes_no_model(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises((ValueError, TypeError), match=r"config.json"):
        loading.load_model(str(tmp_path / "config.json"), "auto", torch.device("cpu"))


@pytest.mark.parametrize(
    ("owned", "index"),
    [([0, 1, 1, 1], [2**40]), ([0, 2**40, 1, 1], [1]), ([0, 1, 0, 1], [1]), ([-5, 1, 1, 1], [1]), ([0, 1, 1, 1], [-1])],
)
def test_places_that_the_cpp_op_would_have_read(owned: list[int], index: list[int]) -> None:
    """They were read out of bounds, and the process died."""
    assert not extension_why_not()
    op = torch.ops.groupdpo_kernels.add_weighted_rows_cpu
    with pytest.raises(RuntimeError, match=r"owned must not decrease|index must be in"):
        op(torch.zeros(3, 4), torch.zeros(2, 4), torch.tensor(owned), torch.tensor(index), torch.ones(1))


def test_tensors_that_are_not_dense() -> None:
    sparse = torch.randn(4, 3).to_sparse()
    with pytest.raises(TypeError, match=r"weight must be a dense tensor; got one with layout torch.sparse_coo"):
        linear_logps(torch.randn(2, 3), sparse, torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="cu_groups must be a dense tensor"):
        PreferenceGroups(torch.tensor([0, 2]).to_sparse(), torch.tensor([True, False]))
