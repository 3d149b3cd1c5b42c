"""Rows as people publish them, with what is right for each: nothing of a conversation is left out in silence, and what
a template makes of an answer is looked at."""

from __future__ import annotations

import codecs
import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from groupdpo_kernels.data import Group, Report, read_groups, tokenize_groups
from groupdpo_kernels.data.formats import read_responses

SYSTEM = {"role": "system", "content": "Speak as a pirate."}
QUESTION = {"role": "user", "content": "Boats?"}
PAIR = {"prompt": "Boats?", "chosen": "Four", "rejected": "Six"}

# One row of every format, without a context of its own.
ROWS: dict[str, dict[str, Any]] = {
    "pairs": PAIR,
    "pairs of messages": {
        "chosen": [QUESTION, {"role": "assistant", "content": "Four"}],
        "rejected": [QUESTION, {"role": "assistant", "content": "Six"}],
    },
    "sets": {"prompt": "Boats?", "positives": ["Four"], "negatives": ["Six"]},
    "alpaca": {"instruction": "Boats?", "chosen": "Four", "rejected": "Six"},
    "sharegpt": {"conversations": [{"from": "human", "value": "Boats?"}], "chosen": "Four", "rejected": "Six"},
    "ms_swift": {"messages": [QUESTION, {"role": "assistant", "content": "Four"}], "rejected_response": "Six"},
    "listed": {"prompt": "Boats?", "all_generated_responses": ["Four", "Six"], "scores": [2.0, 1.0]},
    "numbered": {"prompt": "Boats?", "response_0": "Four", "response_0_reward": 2, "response_1": "Six",
                 "response_1_reward": 1},
    "nectar": {"prompt": "Boats?", "answers": [{"answer": "Four", "rank": 1}, {"answer": "Six", "rank": 2}]},
    "ultrafeedback": {"instruction": "Boats?", "completions": [
        {"response": "Four", "overall_score": 2}, {"response": "Six", "overall_score": 1}]},
}  # fmt: skip


def only_group(row: dict[str, Any], **options: Any) -> Group:
    (group,) = read_groups([row], on_bad="error", **options)
    return group


def refused(row: dict[str, Any]) -> str:
    report = Report()
    assert not list(read_groups([row], report=report))
    return str(report)


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize("name", ROWS)
def test_a_system_prompt_in_a_column_is_read_by_every_format(name: str, column: str) -> None:
    assert only_group({**ROWS[name], column: SYSTEM["content"]}).prompt == [SYSTEM, QUESTION]


@pytest.mark.parametrize("name", ROWS)
def test_history_in_a_column_is_read_by_every_format(name: str) -> None:
    before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    for history in ([["Hi", "Hello"]], before):
        row = {**ROWS[name], "system": SYSTEM["content"], "history": history}
        assert only_group(row).prompt == [SYSTEM, *before, QUESTION]
    assert "history must be pairs" in refused({**ROWS[name], "history": ["Hi"]})


@pytest.mark.parametrize("column", ["functions", "videos", "audio", "documents", "context", "chat_template_kwargs"])
@pytest.mark.parametrize("name", ROWS)
def test_what_cannot_be_read_of_a_prompt_is_named(name: str, column: str) -> None:
    assert f"the column '{column}' belongs to the prompt" in refused({**ROWS[name], column: ["something"]})
    for nothing in (None, [], "", 0, False):
        assert only_group({**ROWS[name], column: nothing, "id": 3, "source": "a forum"}).responses == ["Four", "Six"]


def test_single_responses_have_their_context_too() -> None:
    row = {"system": SYSTEM["content"], "prompt": "Boats?", "response": "Four", "tools": '[{"name": "f"}]'}
    assert read_responses(row) == ([SYSTEM, QUESTION], ["Four"], [{"name": "f"}])


def test_a_system_prompt_twice() -> None:
    row = {**PAIR, "prompt": [SYSTEM, QUESTION]}
    assert only_group({**row, "system": SYSTEM["content"]}).prompt == [SYSTEM, QUESTION]
    assert "is not that of its messages" in refused({**row, "system": "Speak plainly."})


def test_content_in_parts() -> None:
    parts = [{"type": "text", "text": "Bo"}, {"type": "text", "text": "ats?"}]
    assert only_group({**PAIR, "prompt": [{"role": "user", "content": parts}]}).prompt == [QUESTION]
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "Four"}]}]
    assert only_group({**PAIR, "prompt": [QUESTION], "chosen": answer}).responses == ["Four", "Six"]
    picture = [{"role": "user", "content": [*parts, {"type": "image"}]}]
    assert "it has 1 for 0" in refused({**PAIR, "prompt": picture})
    assert "a part of type 'video'" in refused({**PAIR, "prompt": [{"role": "user", "content": [{"type": "video"}]}]})


@pytest.mark.parametrize("key", ["name", "tool_calls", "refusal"])
def test_a_key_of_an_answer_that_is_not_read_is_named(key: str) -> None:
    answer = [{"role": "assistant", "content": "Four", key: "something"}]
    assert key in refused({**PAIR, "prompt": [QUESTION], "chosen": answer})


def test_keys_of_a_sharegpt_message_are_not_lost() -> None:
    answer = {"from": "gpt", "value": "Four", "refusal": "no", "reasoning_content": "r"}
    assert "alone; got refusal" in refused({**ROWS["sharegpt"], "chosen": answer})
    turn = {"from": "human", "value": [{"type": "text", "text": "Boats?"}]}
    assert only_group({**ROWS["sharegpt"], "conversations": [turn]}).prompt == [QUESTION]


def test_a_blank_prompt_is_none() -> None:
    for more in ({}, {"system": "S"}, {"history": [["Hi", "Hello"]]}):
        assert "no prompt" in refused({**PAIR, "prompt": "  ", **more})


def test_half_a_surrogate_pair() -> None:
    report = Report()
    rows = [{**PAIR, "chosen": "Four \ud83d"}, PAIR]
    assert [g.row for g in read_groups(rows, report=report)] == [1]
    assert "row 0: a text has half of a surrogate pair at character 5, after 'Four '" in str(report)


def test_causes_come_before_what_follows_from_them(bpe: Any) -> None:
    report = Report()
    assert not list(tokenize_groups(read_groups([PAIR]), bpe, max_length=4, report=report))
    text = str(report)
    assert text.count("too long") == text.count("no positive") == 1
    assert text.index("too long") < text.index("no positive")


CUTS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1].strip() }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_template_that_cuts_thoughts_out_of_answers(bpe: Any) -> None:
    words = copy.deepcopy(bpe)
    words.chat_template = CUTS
    alike = {**PAIR, "chosen": "<think>a</think>Four", "rejected": "<think>b</think>Four"}
    other = {**PAIR, "chosen": "<think>a</think>Four", "rejected": "Six"}
    report = Report()
    groups = list(read_groups([alike, other, PAIR]))
    found = list(tokenize_groups(groups, words, chat=True, report=report))
    assert [g.row for g in found] == [2]
    assert report.dropped["identical after the template"] == 2
    assert report.dropped["answer changed by the template"] == 1


REASONS = (  # as those of Qwen3 and of gpt-oss
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_reasoning_is_read_where_the_template_reads_it(bpe: Any) -> None:
    """Two answers that differ in it alone stay apart; a template that leaves it out trains another answer."""

    def says(reasoning: Any, content: str = "Four") -> list[dict[str, Any]]:
        return [{"role": "assistant", "reasoning_content": reasoning, "content": content}]

    row = {"prompt": [QUESTION], "chosen": says("Two twos."), "rejected": says("A guess.")}
    group = only_group(row)
    assert group.responses[0] != group.responses[1] and group.responses[0] != "Four"
    assert pickle.loads(pickle.dumps(group)) == copy.deepcopy(group) == group
    words = copy.deepcopy(bpe)
    words.chat_template = REASONS
    (tokens,) = tokenize_groups([group], words)
    texts = [words.decode(ids) for ids in tokens.responses]
    assert texts == ["<think>Two twos.</think>Four\n", "<think>A guess.</think>Four\n"]
    assert only_group({**row, "rejected": says("", "Six")}).responses == [group.responses[0], "Six"]
    words.chat_template = CUTS
    for rejected, reason in ((says("A guess."), "identical after"), (says("A guess.", "Six"), "leaves out reasoning")):
        report = Report()
        assert not [*tokenize_groups([only_group({**row, "rejected": rejected})], words, report=report)]
        assert report.dropped and re.search(reason, str(report))
    report = Report()
    assert not [*tokenize_groups([group], bpe, chat=False, report=report)]
    assert "a chat template alone can place" in str(report)
    assert "reasoning_content must be text; got list" in refused({**row, "chosen": says(["Two"])})
    assert "surrogate" in refused({**row, "chosen": says("\ud83d")})
    assert "on both sides" in refused({**row, "rejected": row["chosen"]})


@pytest.mark.parametrize("form", ["texts", "messages", "conversations", "no prompt of its own", "a transcript"])
def test_what_two_answers_begin_with_alike_is_theirs(form: str, bpe: Any) -> None:
    """Where a prompt is given, nothing is taken from the answers, as a search for a common beginning would do. Where it
    is not, it ends with the last turn of the user."""
    answers = ["<think>a</think>Four", "<think>b</think>Four"]
    turns = [[{"role": "assistant", "content": text}] for text in answers]
    prompt: Any = [QUESTION]
    if form == "texts":
        prompt, (chosen, rejected) = "Boats?", answers  # type: ignore[assignment]
    elif form == "messages":
        chosen, rejected = turns  # type: ignore[assignment]
    elif form == "a transcript":
        chosen, rejected = (f"\n\nHuman: Boats?\n\nAssistant: {text}" for text in answers)  # type: ignore[assignment]
    else:
        chosen, rejected = ([QUESTION, *turn] for turn in turns)  # type: ignore[assignment]
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if form in ("no prompt of its own", "a transcript"):
        del row["prompt"]
    group = only_group(row)
    assert group.responses == answers
    (tokens,) = tokenize_groups([group], bpe)
    assert [bpe.decode(ids) for ids in tokens.responses] == [f"{text}</s>" for text in answers]


THINKS = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "<think>\n{{ parts[0].split('<think>')[-1].strip() if parts | length > 1 else '' }}\n</think>\n\n"
    "{{ parts[-1].strip() }}{% else %}{{ m.content }}{% endif %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}"
)


def test_a_template_whose_prompt_ends_with_the_beginning_of_a_thought(bpe: Any) -> None:
    """Models that always think have such templates. The `<think>` of the answer then stands in the prompt, and nothing
    of the answer is lost. An answer that stands in the prompt alone is lost.
    """
    words = copy.deepcopy(bpe)
    words.chat_template, report = THINKS, Report()
    pair = {**PAIR, "chosen": "<think>a</think>Four", "rejected": "<think>\nb\n</think>\n\nFour"}
    (tokens,) = tokenize_groups(read_groups([pair]), words, chat=True, report=report)
    assert words.decode(tokens.prompt) == "<|user|>\nBoats?</s>\n<|assistant|>\n<think>\n"
    assert [words.decode(ids) for ids in tokens.responses] == ["a\n</think>\n\nFour</s>", "b\n</think>\n\nFour</s>"]
    words.chat_template, said = CUTS, "<think>a</think>Four"
    group = Group(said, [said, "Six", "Seven"], [True, True, False], 0)
    (tokens,) = tokenize_groups([group], words, chat=True, report=report)
    assert len(tokens.responses) == 2 and report.dropped == {"answer changed by the template": 1}


def test_white_space_is_the_templates(bpe: Any) -> None:
    words = copy.deepcopy(bpe)
    words.chat_template = CUTS
    (found,) = tokenize_groups([Group("Boats?", ["  Four\n", "Six"], [True, False], 0)], words, chat=True)
    assert len(found.responses) == 2


def test_bytes_of_a_file(tmp_path: Path) -> None:
    from groupdpo_kernels.cli.loading import jsonl

    path, row = tmp_path / "rows.jsonl", {"prompt": "Käse?", "response": "é"}
    text = json.dumps(row, ensure_ascii=False) + "\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text(text * 2, encoding=encoding)
        assert list(jsonl(path)) == [row, row]
    path.write_bytes(codecs.BOM_UTF8 + text.encode() + text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2, must be UTF-8; got byte 0xe4 at place 14"):
        list(jsonl(path))
    path.write_bytes(codecs.BOM_UTF16_LE + text.encode("utf-16-le")[:-1])
    with pytest.raises(ValueError, match=r"rows\.jsonl begins as UTF-16"):
        list(jsonl(path))
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="line 1, must be a JSON object"):
        list(jsonl(path))


def test_a_template_that_prints_the_date_is_another_one_tomorrow(bpe: Any) -> None:
    from groupdpo_kernels.cli.loading import tokenizer_digest

    words = copy.deepcopy(bpe)
    words.chat_template = "{{ today }}" + CUTS
    day = ["Monday"]
    render = words.apply_chat_template
    words.apply_chat_template = lambda *a, **k: render(*a, **{**k, "today": day[0]})
    first, again = tokenizer_digest(words), tokenizer_digest(words)
    day[0] = "Tuesday"
    assert first == again != tokenizer_digest(words)
