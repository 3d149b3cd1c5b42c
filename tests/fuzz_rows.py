"""Rows of preferences as nobody should write them: valid rows of every format, with one to three places made wrong.

`wrong_rows` draws them; `fault_of` reads one through the whole of `groupdpo_kernels.data` and says what is wrong with
what comes out. Bad rows must be counted or raise a ValueError that names the row. What is accepted must say only what
the row says: every text of a group is a text of its row, roles are words, and weights are finite.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st
from preference_rows import EXAMPLES
from test_turns import ROW as TURNS
from tiny_tokenizers import byte_level_bpe

from groupdpo_kernels.data import (
    BadRow,
    Report,
    Turns,
    collate,
    merge_prompts,
    messages_of,
    read_groups,
    tokenize_groups,
)
from groupdpo_kernels.data.formats import read_responses

ROWS: dict[str, dict[str, Any]] = {name: example[0] for name, example in EXAMPLES.items()}
ROWS |= {"turns": TURNS, "single": {"prompt": "Tea?", "response": "Green."}}
ROWS["weighted"] = {**EXAMPLES["sets"][0], "weight": 2.0, "response_weights": [1.0, 0.5, 3.0]}
ROWS["images"] = {**EXAMPLES["texts"][0], "images": ["a.png"]}


def deep(depth: int, leaf: Any = "x", key: str | None = None) -> Any:
    for _ in range(depth):
        leaf = [leaf] if key is None else {key: leaf}
    return leaf


# Text that looks like other text, or that is none.
LOOKALIKES = ("\u200b", "\u200e", "\u202e", "\u0301", "\ufeff", "\u00ad", " ", "\x00", "\ud800")
TEXTS = (
    "",
    " ",
    "\n",
    "\x00",
    "\ud83d",
    "nan",
    "N/A",
    "1_000",
    "1e400",
    "\u0661",
    "user\u200b",
    "us\u0435r",
    "A\u0301",
    "\u202eabc",
    "<|assistant|>",
    "</s>",
    "{{ 7 * 7 }}",
    "{% raw %}",
    "\n\nHuman: a\n\nAssistant: b",
    "null",
    "x" * 300,
)
NUMBERS = (0, 1, -1, True, False, 2**63, 10**400, -(10**400), 0.5, 1e308, math.nan, math.inf, -math.inf)
OBJECTS = (b"bytes", {1, 2}, object(), range(3), int, lambda: None, complex(1, 2), ("a", "b"), {1: "a"}, {None: None})
DEEP = (deep(50), deep(300), deep(300, key="a"), deep(3000), deep(3000, key="content"), deep(100_000))
junk = st.one_of(
    st.none(),
    st.sampled_from(TEXTS),
    st.sampled_from(NUMBERS),
    st.sampled_from(OBJECTS).map(copy.copy),
    st.sampled_from(DEEP),
    st.sampled_from(
        ([], {}, [None], [[]], [{}], {"role": "user"}, {"content": "x"}, {"from": ["gpt"], "value": "x"})
    ).map(copy.deepcopy),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=6,
    ),
)
COLUMNS = (
    *(
        "prompt",
        "chosen",
        "rejected",
        "positives",
        "negatives",
        "messages",
        "system",
        "system_prompt",
        "history",
        "tools",
    ),
    *("images", "image", "weight", "response_weights", "context", "documents", "instruction", "input", "completions"),
    *(
        "all_rm_scores",
        "scores",
        "response_0",
        "response_0_reward",
        "note",
        "",
        "\u200bprompt",
        "label",
        "conversations",
    ),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value within nested ones, not of what is deep in them."""
    yield path
    if len(path) > 8 or any(value is one for one in DEEP):  # these are shared
        return
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(len(value)):
            yield from places(value[i], (*path, i))


def _swapped_letter(text: str) -> str:
    return text.replace("e", "\u0435", 1).replace("a", "\u0430", 1)


@st.composite
def wrong_rows(draw: st.DrawFn) -> dict[Any, Any]:
    row: Any = copy.deepcopy(ROWS[draw(st.sampled_from([*ROWS]))])
    for _ in range(draw(st.integers(1, 3))):
        paths = [path for path in places(row) if path]
        if not paths:
            break
        *way, last = draw(st.sampled_from(paths))
        parent = functools.reduce(lambda value, key: value[key], way, row)
        kind = draw(st.sampled_from(("junk", "junk", "junk", "delete", "wrap", "text", "extra", "repeat", "lookalike")))
        if kind == "junk":
            parent[last] = draw(junk)
        elif kind == "delete":
            del parent[last]
        elif kind == "wrap":
            parent[last] = draw(
                st.sampled_from(([parent[last]], {"text": parent[last]}, (parent[last],), [[parent[last]]]))
            )
        elif kind == "text" and not isinstance(parent[last], (list, tuple, dict)):
            parent[last] = str(parent[last])
        elif kind == "extra" and isinstance(parent, dict):
            parent[draw(st.sampled_from(COLUMNS) | st.sampled_from((1, None, ("a",), "role", "from", "name")))] = draw(
                junk
            )
        elif kind == "repeat" and isinstance(parent, list):
            parent.append(parent[last])
        elif kind == "lookalike" and isinstance(parent[last], str):
            more = draw(st.sampled_from(LOOKALIKES))
            parent[last] = draw(
                st.sampled_from((parent[last] + more, more + parent[last], _swapped_letter(parent[last])))
            )
    return row


# ------------------------------------------------------------------------------------------------------------- judging


def texts_in(value: Any) -> Iterator[str]:
    """All texts of nested values, and what the lists of parts among them say."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            stack += [*value.values()]
        elif isinstance(value, (list, tuple)):
            stack += value
            if value and all(isinstance(part, dict) for part in value):
                yield "".join(part["text"] for part in value if isinstance(part.get("text"), str))


def said(text: Any, known: set[str], row: dict[Any, Any]) -> bool:
    """Whether the text is one of the row, or the two that alpaca joins, or a turn of a transcript in it."""
    joined = {f"{row.get('instruction')}\n{row.get('input')}"} if isinstance(row.get("input"), str) else set()
    return isinstance(text, str) and (
        text in known | joined or any(text in whole for whole in known if "Human:" in whole or "Assistant:" in whole)
    )


def unsaid(group: Any, row: dict[Any, Any]) -> str:
    """What the group says that its row does not."""
    known = {*texts_in(row), ""}
    prompt = [{"role": "user", "content": group.prompt}] if isinstance(group.prompt, str) else group.prompt
    for message in [*prompt, *(m for text in group.responses for m in messages_of(text))]:
        role, content = message.get("role"), message.get("content", "" if message.get("tool_calls") else None)
        if not isinstance(role, str) or not role.isascii() or not role.replace("_", "").replace("-", "").isalnum():
            return f"a message has the role {role!r}"
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        for part in parts:
            if part.get("type") != "image" and not said(part.get("text"), known, row):
                return f"the row does not say {part.get('text')!r:.80}"
    for text in group.responses:
        if not isinstance(text, Turns) and not said(text, known, row):
            return f"the row has no response {text!r:.80}"
    weights = [group.weight, *(group.response_weights or ())]
    if not all(isinstance(w, float) and 0 <= w < math.inf for w in weights):
        return f"weights are {weights}"
    if len({*group.positive}) != 2 or len(group.positive) != len(group.responses):
        return f"its sides are {group.positive}"
    return ""


@functools.cache
def tokenizer() -> Any:
    return byte_level_bpe()


def fault_of(row: dict[Any, Any]) -> str:
    """What is wrong with how the row is read, or ""."""
    rows = [EXAMPLES["texts"][0], row]
    if not all(isinstance(name, str) for name in row):
        try:
            [*read_groups(rows)]
        except TypeError as error:
            return "" if "row 1" in str(error) else f"TypeError without the row: {error}"
        return "a column whose name is no text is accepted"
    report = Report()
    try:
        groups = [*read_groups(rows, report=report)]
    except ValueError as error:
        return "" if str(error).startswith("row 1: the columns must be") else f"ValueError: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.200}"
    if report.rows != 2 or len(groups) + bool(report.dropped) < 2:
        return "a row is neither read nor counted"
    try:
        strict: Any = [*read_groups(rows, on_bad="error")]
    except ValueError as error:
        strict = None
        if not str(error).startswith("row 1: "):
            return f"on_bad='error': {error}"
    except Exception as error:
        return f"on_bad='error': {type(error).__name__}: {error!s:.200}"
    if strict is not None and strict != groups:
        return "on_bad='error' accepts the row and reads it otherwise"
    for group in groups[1:]:
        if fault := unsaid(group, row):
            return fault
    try:
        merged = [*merge_prompts(groups)]
        tokens = [*tokenize_groups([g for g in merged if g.images is None], tokenizer(), report=report)]
        if tokens:
            collate(tokens)
    except Exception as error:
        return f"after reading: {type(error).__name__}: {error!s:.200}"
    return _fault_of_scoring(row)


def _fault_of_scoring(row: dict[Any, Any]) -> str:
    try:
        prompt, responses, _ = read_responses(row)
    except (ValueError, BadRow):
        return ""
    except Exception as error:
        return f"read_responses: {type(error).__name__}: {error!s:.200}"
    return "" if all(isinstance(text, str) for text in responses) and prompt else "read_responses: no text"
