"""Rows of every format -> groups: what is read, what is dropped, what a rule prefers."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import datasets
import pytest
from preference_rows import ANSWERS, EXAMPLES, PAIR, TEA, says, user

from groupdpo_kernels import PreferenceGroups
from groupdpo_kernels.data import (
    FORMATS,
    RULES,
    Group,
    Report,
    margin,
    merge_prompts,
    ranks,
    read_groups,
    rules,
    threshold,
    tokenize_groups,
    top_k,
)


@pytest.mark.parametrize("case", EXAMPLES)
@pytest.mark.parametrize("how", ["auto", "forced", "table"])
def test_formats(case: str, how: str) -> None:
    row, name, prompt, positives, negatives = EXAMPLES[case]
    insists = how == "forced" or name.startswith("ultrafeedback_")
    # A table fills the columns of other rows, and the fields of other messages, with None.
    rows = datasets.Dataset.from_list([row, {"another": 1}]).select([0]) if how == "table" else row
    (group,) = read_groups(rows, name if insists else "auto", on_bad="drop")
    assert group.prompt == prompt
    assert [r for r, p in zip(group.responses, group.positive) if p] == positives
    assert [r for r, p in zip(group.responses, group.positive) if not p] == negatives


def test_every_format_has_an_example() -> None:
    assert {name for _, name, *_ in EXAMPLES.values()} == set(FORMATS)


def test_unknown_columns_are_an_error_that_lists_both() -> None:
    with pytest.raises(ValueError, match=r"row 1: .*nectar: prompt, answers;.*got answer, prompt"):
        list(read_groups([ANSWERS, {"prompt": "Tea?", "answer": "Green."}]))
    with pytest.raises(ValueError, match=r"\(sets: prompt, positives, negatives\); got chosen, prompt, rejected"):
        list(read_groups(ANSWERS, "sets"))
    with pytest.raises(TypeError, match="row 0 is a str"):
        list(read_groups(["Tea?"]))  # type: ignore[list-item]
    for wrong in ({"format": "parquet"}, {"rule": "best"}, {"on_bad": "ignore"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be one of"):
            read_groups([ANSWERS], **wrong)  # before anything is read


def test_columns_can_be_renamed() -> None:
    row = {"instruction": "Tea?", "generations": ["Coffee.", "Green."], "ratings": [1, 5]}
    names = {"instruction": "prompt", "generations": "all_generated_responses", "ratings": "scores"}
    (group,) = read_groups([row], rename=names)
    assert group == Group(user("Tea?"), ["Green.", "Coffee."], [True, False], 0)


def test_reading_and_tokenising_are_lazy(bpe: Any) -> None:
    pulled = []

    def rows() -> Any:
        for i in range(10_000):
            pulled.append(i)
            yield ANSWERS

    next(read_groups(rows()))
    assert len(pulled) == 1
    next(tokenize_groups(read_groups(rows()), bpe))
    assert len(pulled) < 1000


def test_importing_needs_torch_alone() -> None:
    for name in ("rules", "formats", "batches"):
        tree = ast.parse(Path(rules.__file__).with_name(f"{name}.py").read_text())
        top = [ast.dump(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not [node for node in top for name in ("transformers", "datasets", "numpy") if name in node]


# ---- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "scores", "expected"),
    [
        (RULES["best_vs_rest"](), [1, 3, 2], "1+ 2- 0-"),
        (RULES["best_vs_rest"](), [1, 3, 3], "1+ 2+ 0-"),  # tied for the best: both
        (RULES["best_vs_rest"](), [2, 2], "0+ 1+"),  # then the group has no negative
        (top_k(2), [4, 1, 3, 2], "0+ 2+ 3- 1-"),
        (top_k(2, bottom=1), [4, 1, 3, 2], "0+ 2+ 1-"),
        (top_k(1), [3, 3, 1], "2-"),  # tied across the cut: neither
        (top_k(2), [4, 3, 3, 1], "0+ 3-"),
        (top_k(1, bottom=1), [4, 2, 2, 2], "0+"),  # which of the three is the worst is not known
        (top_k(3), [2, 1], "0+ 1+"),
        (threshold(), [1, 2, 6], "2+ 1- 0-"),  # mean 3
        (threshold("median"), [1, 2, 6], "2+ 1+ 0-"),  # equal to the threshold: positive
        (threshold(4.0), [4, 3.9, 5], "2+ 0+ 1-"),
        (threshold(4.0, below=2.0), [4, 3, 2, 1.9], "0+ 3-"),  # between: neither
        (margin(2.0), [5, 4, 3, 5, 1], "0+ 3+ 2- 4-"),  # tied for the best: both; lower by exactly 2: negative
        (ranks(), [1, 3, 2], "1+ 2- 0-"),
        (ranks(positives=2), [1, 3, 2], "1+ 2+ 0-"),
        (ranks(), [3, 1, 3, 2, 1], "0+ 3- 1-"),  # tied: the first stays
    ],
)
def test_rules(rule: Any, scores: list[float], expected: str) -> None:
    assert " ".join(f"{i}{'+' if side else '-'}" for i, side in rule(scores)) == expected


def test_ranked_groups_are_best_first_and_positives_first() -> None:
    (group,) = read_groups(EXAMPLES["nectar"][0], rule="ranks")
    assert group.responses == ["Three minutes.", "An hour.", "No idea."]
    assert PreferenceGroups.from_lists([group.positive]).positives_first()


def test_wrong_options_of_rules() -> None:
    for make, options in [
        (top_k, {"k": 0}),
        (top_k, {"bottom": 0}),
        (threshold, {"at": "mode"}),
        (threshold, {"below": 1.0}),
        (margin, {"by": 0.0}),
        (ranks, {"positives": 0}),
    ]:
        with pytest.raises(ValueError, match=next(iter(options))):
            make(**options)


# ---- what is dropped -------------------------------------------------------------------------------------------------

SCORED = {"prompt": "Tea?", "all_generated_responses": ["Green.", "Coffee."], "all_rm_scores": [2.0, 1.0]}
# reason: a row that has it, whether the rest of the row is kept
BAD: dict[str, list[tuple[dict[str, Any], bool]]] = {
    "malformed": [
        (ANSWERS | {"chosen": 3}, False),
        (ANSWERS | {"chosen": None}, False),
        (SCORED | {"all_rm_scores": [1.0]}, False),
        (SCORED | {"all_generated_responses": ["Green.", None]}, False),
        ({"prompt": "Tea?", "answers": [{"answer": "Green."}]}, False),
        ({"instruction": "Tea?", "completions": "Green."}, False),
        ({"chosen": [*TEA, says("A"), *TEA], "rejected": PAIR[1]}, False),  # ends with the user
        ({"chosen": [*TEA, says("A") | {"tool_calls": [1]}], "rejected": PAIR[1]}, False),
        ({"prompt": [*TEA, says("It")], "chosen": [says("is")], "rejected": [says("was")]}, False),
        ({"conversations": [{"from": "function_call", "value": "{}"}], "chosen": "A", "rejected": "B"}, False),
    ],
    "other context": [
        ({"chosen": PAIR[0], "rejected": [*user("Coffee?"), says("No.")]}, False),
        ({"prompt": "Coffee?", "chosen": PAIR[0], "rejected": PAIR[1]}, False),
        ({"prompt": user("Coffee?"), "chosen": PAIR[0], "rejected": PAIR[1]}, False),
    ],
    "no prompt": [
        ({"chosen": "Green.", "rejected": "Coffee."}, False),
        (ANSWERS | {"prompt": ""}, False),
        (SCORED | {"prompt": " "}, False),
        ({"chosen": [says("A")], "rejected": [says("B")]}, False),
    ],
    "empty": [(ANSWERS | {"chosen": ["Green.", " \n"]}, True)],
    "no score": [
        (SCORED | {"all_generated_responses": ["A", "B", "C"], "all_rm_scores": [2.0, None, 1.0]}, True),
        (SCORED | {"all_generated_responses": ["A", "B", "C"], "all_rm_scores": [2.0, float("nan"), 1.0]}, True),
    ],
    "duplicate": [
        (ANSWERS | {"chosen": ["Green.", "Green."]}, True),
        (SCORED | {"all_generated_responses": ["A", "B", "A"], "all_rm_scores": [2.0, 1.0, 2.0]}, True),
    ],
    "on both sides": [(ANSWERS | {"chosen": ["Green.", "Black."], "rejected": ["Coffee.", "Black."]}, True)],
    "no positive": [(ANSWERS | {"chosen": []}, False)],
    "no negative": [(ANSWERS | {"rejected": []}, False), (SCORED | {"all_rm_scores": [1.0, 1.0]}, False)],
}


@pytest.mark.parametrize(("reason", "row", "kept"), [(reason, *case) for reason in BAD for case in BAD[reason]])
def test_bad_rows_are_counted_or_named(reason: str, row: dict[str, Any], kept: bool) -> None:
    report = Report()
    groups = list(read_groups([ANSWERS, row], report=report))
    assert report.dropped == {reason: 1} and report.rows == 2
    assert len(groups) == 1 + kept == report.kept["read"][0]
    assert sum(len(g.responses) for g in groups) == report.kept["read"][1]
    with pytest.raises(ValueError, match=r"^row 1: "):
        list(read_groups([ANSWERS, row], on_bad="error"))


def test_what_a_rule_leaves_out_is_counted_and_no_error() -> None:
    row = SCORED | {"all_generated_responses": ["A", "B", "C"], "all_rm_scores": [3.0, 2.5, 1.0]}
    report = Report()
    (group,) = read_groups(row, rule=margin(1.0), on_bad="error", report=report)
    assert group.responses == ["A", "C"] and report.dropped == {"left out by the rule": 1}


def test_report_reads_well() -> None:
    report = Report()
    rows = [ANSWERS, ANSWERS | {"chosen": []}, ANSWERS | {"rejected": ["", "Cold."]}]
    list(merge_prompts(read_groups(rows, report=report), report=report))
    assert str(report).splitlines() == [
        "3 rows",
        "  read: 2 groups, 4 responses",
        "  merged: 1 group, 3 responses",
        "  1 group merged into an earlier one of the same prompt",
        "  dropped 1 response: empty (first: row 2: a response is empty)",
        "  dropped 1 response: duplicate (first: row 0: the response 'Three minutes.' is repeated)",
        "  dropped 1 group: no positive (first: row 1: its group is left without a positive response)",
    ]


def test_merging_pairs_of_a_prompt() -> None:
    pairs = [("Tea?", "A", "B"), ("Milk?", "E", "F"), ("Tea?", "A", "C"), ("Tea?", "C", "D"), ("Milk?", "F", "E")]
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs]
    report = Report()
    (group,) = merge_prompts(read_groups(rows), report=report)
    assert group == Group("Tea?", ["A", "B", "D"], [True, False, False], 0)  # C is on both sides
    assert report.dropped == {"duplicate": 1, "on both sides": 3, "no positive": 1} and report.merged == 3
    with pytest.raises(ValueError, match="row 0: the response 'A' is repeated"):
        list(merge_prompts(read_groups(rows), on_bad="error"))
    rows = [{"prompt": prompt, "chosen": "A", "rejected": "B"} for prompt in ("Tea?", user("Tea?"))]
    assert len(list(merge_prompts(read_groups(rows)))) == 2  # a text and a conversation are two prompts
