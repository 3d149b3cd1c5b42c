"""What rows and templates of strangers may not do: run code, read what they should not, be taken for a template."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from preference_rows import EXAMPLES
from tiny_tokenizers import CHATML, byte_level_bpe

from groupdpo_kernels.data import Report, read_groups, tokenize_groups

ROW = EXAMPLES["messages"][0]


@pytest.fixture
def words() -> Iterator[Any]:
    yield byte_level_bpe()


@pytest.mark.parametrize(
    "inside",
    [
        "''.__class__.__mro__[1].__subclasses__()",
        "messages.__class__.__base__.__subclasses__()",
        "raise_exception.__globals__['os'].system('true')",
        "''.__class__.__init__.__globals__",
        "messages.append({'role': 'user', 'content': 'more'})",
        "cycler.__init__.__globals__.os.popen('id').read()",
    ],
)
def test_a_template_runs_in_a_sandbox(inside: str, words: Any) -> None:
    words.chat_template = f"{{{{ {inside} }}}}" + CHATML
    report = Report()
    assert not [*tokenize_groups(read_groups(ROW), words, report=report)]
    assert "the chat template refuses it" in report.first["template"]


def test_a_row_is_no_template(words: Any) -> None:
    said = "{{ 7 * 7 }}{% for x in range(3) %}{{ ''.__class__ }}{% endfor %}"
    row = {"prompt": [{"role": "user", "content": said}], "chosen": said + " Yes.", "rejected": said + " No."}
    (group,) = tokenize_groups(read_groups(row), words)
    assert words.decode(group.prompt) == f"<|user|>\n{said}</s>\n<|assistant|>\n"
    assert [words.decode(ids) for ids in group.responses] == [f"{said} Yes.</s>", f"{said} No.</s>"]


@pytest.mark.parametrize(
    "image",
    [
        "https://example.org/a.png",
        "file:///etc/passwd",
        ["https://example.org/a.png"],
        {"url": "https://example.org/a.png"},
    ],
)
def test_an_address_of_an_image_is_refused(image: Any) -> None:
    """Also in a list, where a processor would look for it."""
    for columns in ({"images": [image]}, {"image": image}):
        report = Report()
        assert not [*read_groups({**EXAMPLES["texts"][0], **columns}, report=report)]
        assert "an image must be" in report.first["malformed"]
