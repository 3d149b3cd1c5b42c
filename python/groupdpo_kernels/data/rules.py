"""Preference rows of every common format become groups of responses here; batches.py makes tokens and batches of them.

    report = Report()
    groups = read_groups(dataset, rule=top_k(2), report=report)            # formats: formats.py
    groups = merge_prompts(groups, report=report)                          # pair rows of one prompt become one group
    tokens = list(tokenize_groups(groups, tokenizer, max_length=2048, report=report))
    print(report)
    step = collate(tokens[:8], "padded", max_tokens=16384)                 # tensors: batches.py
    group_backward(step.micro_batches, forward, step.groups, objective)

Each stage is a generator in the order of the rows. What cannot be used (an empty, repeated, contradictory or over-long
response, a group without a positive or a negative) is dropped and counted in the report; with on_bad="error" it raises
a ValueError that names its row.

The module never imports transformers or datasets, downloads, shuffles or shows progress. Reading and merging cost tens
of microseconds a row; `merge_prompts` holds all texts in memory.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from ..checks import check_count, check_iterable, check_kind, check_number, one_of, shown
from .formats import FORMATS, BadRow, Format, Group, Report, Row, Scored, as_score, read, recognise
from .images import image_key

Rule = Callable[[Sequence[float]], list[tuple[int, bool]]]  # scores -> [(index, positive)], in the order of the group


def read_groups(
    rows: Iterable[Row] | Row,
    format: str = "auto",  # noqa: A002  the option's usual name
    *,
    rule: str | Rule = "best_vs_rest",
    rename: Mapping[str, str] | None = None,
    on_bad: str = "drop",
    report: Report | None = None,
) -> Iterator[Group]:
    """Yields the groups of the rows.

    Args:
        rows: an iterable of dicts, such as a list or a `datasets.Dataset`. A value None counts as no column.
        format: "auto" goes by the columns of each row; a name of `FORMATS` takes this format alone.
        rule: how scores become sides: a name of `RULES`, or a rule such as `top_k(2)`. Formats whose rows say the
            sides themselves do not use it.
        rename: {column of the rows: column of the format}, for instance {"generations": "all_generated_responses"}.
        on_bad: "drop" leaves out what cannot be used; "error" raises ValueError, but not for what a rule leaves out.
        report: a Report, which is filled.

    Raises ValueError for columns of no format, and TypeError for rows that are not dicts, whatever on_bad.
    """
    one_of("on_bad", on_bad, ("drop", "error"))
    one_of("format", format, ["auto", *FORMATS])
    if not callable(rule):
        one_of("rule", rule, RULES)
        rule = RULES[rule]()
    rows = [rows] if isinstance(rows, Mapping) else rows
    check_iterable("rows", rows, "an iterable of dicts")
    check_kind("rename", rename := {} if rename is None else rename, Mapping, "a dict of the names of columns")
    check_kind("report", report := Report() if report is None else report, Report, "a Report")
    return _read_groups(rows, format, rule, rename, on_bad, report)


def _read_groups(
    rows: Iterable[Row], name: str, rule: Rule, rename: Mapping[str, str], on_bad: str, report: Report
) -> Iterator[Group]:
    known: dict[tuple[tuple[str, ...], ...], Format] = {}  # so that a row costs one look-up
    for i, row in enumerate(rows):
        report.rows += 1
        if not isinstance(row, Mapping):
            raise TypeError(f"rows must be dicts; row {i} is a {type(row).__name__}")
        row = _renamed(i, row, rename)
        full = {k: v for k, v in row.items() if v is not None}
        columns = tuple(row), tuple(full)
        try:
            if columns not in known:
                if len(known) == 1000:  # rows that all have columns of their own
                    known.clear()
                known[columns] = _format_of(i, row, full, name)
            found = read(known[columns], full)
        except BadRow as bad:
            report.drop(bad, i, on_bad)
            continue
        if found.weight == 0:
            report.drop(BadRow("group of weight 0", "its weight is 0"), i)
            continue
        if isinstance(found, Scored):
            group = _sides(found, rule, i, on_bad, report)
        else:
            group = Group(**found._asdict(), row=i)
        yield from _sound("read", group, on_bad, report)


def _renamed(i: int, row: Row, rename: Mapping[str, str]) -> Row:
    found: dict[str, Any] = {}
    for name, value in row.items():
        if not isinstance(name, str):
            raise TypeError(f"rows must be dicts whose names are text; row {i} has {shown(name)}")
        if (new := rename.get(name, name)) in found:
            raise ValueError(f"rename must give each column a name of its own; row {i} then has {new!r} twice")
        found[new] = value
    return found


def _format_of(i: int, row: Row, full: Row, name: str) -> Format:
    """The format of the columns that hold something, else of all columns: a row with an empty column of its format is a
    bad row, not one of an unknown format."""
    for columns in (full, row):
        try:
            return recognise(columns, name)
        except ValueError as error:
            unknown = error
    raise ValueError(f"row {i}: {unknown}")


def _sides(found: Scored, rule: Rule, row: int, on_bad: str, report: Report) -> Group:
    """The responses, and the sides that the rule gives them. A response repeated with the same score counts once."""
    weights = found.response_weights
    scores: dict[tuple[str, float], float] = {}  # with the weight of each
    for text, value, weight in zip(found.responses, found.scores, weights or [1.0] * len(found.responses)):
        score = as_score(value)
        if weight == 0:  # as if it were not there: a rule must not pick it
            report.drop(BadRow("response of weight 0", f"the response {shown(text)}"), row)
        elif not text.strip():
            report.drop(BadRow("empty", "a response is empty"), row, on_bad)
        elif score is None:
            report.drop(BadRow("no score", f"a response has the score {shown(value)}"), row, on_bad)
        elif (text, score) in scores:
            report.drop(BadRow("duplicate", f"the response {shown(text)} is repeated"), row, on_bad)
        else:
            scores[text, score] = weight
    candidates = list(scores)
    picked = _picked(rule, [score for _, score in candidates]) if candidates else []
    for i in sorted(set(range(len(candidates))) - {i for i, _ in picked}):
        report.drop(BadRow("left out by the rule", f"a response with the score {candidates[i][1]}"), row)
    texts = [candidates[i][0] for i, _ in picked]
    kept = None if weights is None else [scores[candidates[i]] for i, _ in picked]
    return Group(found.prompt, texts, [side for _, side in picked], row, found.weight, kept, found.tools, found.images)


def _picked(rule: Rule, scores: list[float]) -> list[tuple[int, bool]]:
    """What a rule says, which may be a user's own."""
    found = rule(scores)
    try:
        picked = {int(i): (bool(side), side in (True, False) and 0 <= i < len(scores)) for i, side in found}
        good = len(picked) == len(found) and all(good for _, good in picked.values())
    except (TypeError, ValueError):
        picked, good = {}, False
    if not good:
        wanted = f"pairs of a number below {len(scores)} and True or False, each number once"
        raise ValueError(f"rule must give a list of {wanted}; got {shown(found)}")
    return [(i, side) for i, (side, _) in picked.items()]


def merge_prompts(groups: Iterable[Group], *, on_bad: str = "drop", report: Report | None = None) -> Iterator[Group]:
    """Merges groups of the same prompt, in the order of their first rows; responses keep the order in which they came.

    A response that repeats on one side counts once, with its first weight; one that is on both sides is dropped from
    both. The group has the mean of the weights of its rows. All groups are read before the first is yielded. Do not use
    it for rankings: the order of a merged group means nothing.
    """
    one_of("on_bad", on_bad, ("drop", "error"))
    check_iterable("groups", groups, "an iterable of Groups")
    check_kind("report", report := Report() if report is None else report, Report, "a Report")
    return _merge_prompts(groups, on_bad, report)


def _merge_prompts(groups: Iterable[Group], on_bad: str, report: Report) -> Iterator[Group]:
    by_prompt: dict[tuple[bool, str], list[Group]] = {}
    for group in groups:
        check_kind("groups", group, Group, "Groups, as read_groups yields them")
        text = group.prompt if isinstance(group.prompt, str) else None
        parts = [group.prompt, group.tools, [*map(image_key, group.images or ())]]
        key = text is None, json.dumps(parts, sort_keys=True, default=repr) if text is None else text
        by_prompt.setdefault(key, []).append(group)
    for same in by_prompt.values():
        report.merged += len(same) - 1
        responses = list(chain.from_iterable(g.responses for g in same))
        positive = list(chain.from_iterable(g.positive for g in same))
        weights = None
        if any(g.response_weights is not None for g in same):
            weights = list(chain.from_iterable(g.response_weights or [1.0] * len(g.responses) for g in same))
        weight = statistics.fmean(g.weight for g in same)
        group = same[0]._replace(responses=responses, positive=positive, weight=weight, response_weights=weights)
        yield from _sound("merged", group, on_bad, report)


def _sound(stage: str, group: Group, on_bad: str, report: Report) -> Iterator[Group]:
    """The group without empty, repeated and contradictory responses, or none if it then lacks a side."""
    row, weights = group.row, group.response_weights or [1.0] * len(group.responses)
    sides: dict[str, bool | None] = {}  # None for both sides
    first: dict[str, int] = {}  # the number of each text
    for i, (text, side) in enumerate(zip(group.responses, group.positive)):
        if weights[i] == 0:
            report.drop(BadRow("response of weight 0", f"the response {shown(text)}"), row)
        elif not text.strip():
            report.drop(BadRow("empty", "a response is empty"), row, on_bad)
        elif text not in sides:
            sides[text], first[text] = side, i
        elif sides[text] is side:
            report.drop(BadRow("duplicate", f"the response {shown(text)} is repeated"), row, on_bad)
        elif sides[text] is not None:
            report.drop(BadRow("on both sides", f"the response {shown(text)} is preferred and rejected"), row, on_bad)
            sides[text] = None
    kept = group.only([first[text] for text, side in sides.items() if side is not None])
    if report.has_both_sides(kept.positive, row, on_bad):
        report.keep(stage, len(kept.responses))
        yield kept


# ---- scores to sides: each function makes a rule of its options, and says what it does with ties --------------------


def best_vs_rest() -> Rule:
    """The best response is positive, all others are negative. Those tied for the best are all positive."""

    def rule(scores: Sequence[float]) -> list[tuple[int, bool]]:
        best = max(scores)
        return [(i, scores[i] == best) for i in _best_first(scores)]

    return rule


def top_k(k: int = 1, bottom: int | None = None) -> Rule:
    """The k best are positive; the rest, or the `bottom` worst, are negative. Those tied across a cut are left out."""
    check_count("k", k)
    if bottom is not None:
        check_count("bottom", bottom)

    def rule(scores: Sequence[float]) -> list[tuple[int, bool]]:
        order = _best_first(scores)
        first_negative = max(k, 0 if bottom is None else len(order) - bottom)
        best, worst = order[:k], order[first_negative:]
        if best and k < len(order):
            best = [i for i in best if scores[i] != scores[order[k]]]
        worst = [i for i in worst if scores[i] != scores[order[first_negative - 1]]]
        return [(i, True) for i in best] + [(i, False) for i in worst]

    return rule


def threshold(at: float | str = "mean", below: float | None = None) -> Rule:
    """Scores of at least `at` (a number, "mean", "median") are positive, those under `below` (None takes `at`) are
    negative, and those between are left out."""
    centres: dict[str, Callable[[Sequence[float]], float]] = {"mean": statistics.fmean, "median": statistics.median}
    if isinstance(at, str) and at not in centres:
        raise ValueError(f"at must be a number, 'mean' or 'median'; got {at!r}")
    if not isinstance(at, str):
        _check_finite("at", at)
    if below is not None:
        _check_finite("below", below)
    if below is not None and (isinstance(at, str) or below > at):
        raise ValueError(f"below must be at most at, and at a number; got below={below}, at={at!r}")

    def rule(scores: Sequence[float]) -> list[tuple[int, bool]]:
        high = centres[at](scores) if isinstance(at, str) else at
        low = high if below is None else below
        return [(i, scores[i] >= high) for i in _best_first(scores) if scores[i] >= high or scores[i] < low]

    return rule


def margin(by: float = 1.0) -> Rule:
    """The best and those tied with it are positive, those lower by at least `by` negative; the rest are left out."""
    _check_finite("by", by)
    if not by > 0:
        raise ValueError(f"by must be positive; got {by}")

    def rule(scores: Sequence[float]) -> list[tuple[int, bool]]:
        best = max(scores)
        return [(i, scores[i] == best) for i in _best_first(scores) if scores[i] == best or scores[i] <= best - by]

    return rule


def ranks(positives: int = 1) -> Rule:
    """All responses, best first, as plackett_luce needs them; the first `positives` are positive. Of tied ones only the
    first stays."""
    check_count("positives", positives)

    def rule(scores: Sequence[float]) -> list[tuple[int, bool]]:
        order = _best_first(scores)
        order = [i for n, i in enumerate(order) if n == 0 or scores[i] != scores[order[n - 1]]]
        return [(i, n < positives) for n, i in enumerate(order)]

    return rule


RULES: dict[str, Callable[..., Rule]] = {
    "best_vs_rest": best_vs_rest,
    "top_k": top_k,
    "threshold": threshold,
    "margin": margin,
    "ranks": ranks,
}


def _best_first(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])  # stable: ties keep the order of the row


def _check_finite(name: str, value: Any) -> None:
    """With NaN all comparisons are False: a rule would leave out everything, and with infinity nearly so."""
    check_number(name, value)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite; got {value}")
