"""Rows of published data sets become groups of responses here, and groups become the batch of a training step.

formats.py  rows of any known layout: FORMATS, and what their columns mean
rules.py    rows -> groups: read_groups, merge_prompts, and the rules that turn ratings into sides
images.py   images of a prompt: their places, and the inputs of a model
templates.py  groups -> the texts that are tokenised, by chat templates
batches.py  groups -> token ids -> micro-batches: tokenize_groups, collate
"""

from .batches import (
    MicroBatch,
    PreferenceBatch,
    Prompts,
    TokenGroup,
    collate,
    empty_part,
    tokenize_groups,
)
from .formats import FORMATS, BadRow, Group, Report, Turns, messages_of
from .rules import RULES, best_vs_rest, margin, merge_prompts, ranks, read_groups, threshold, top_k

__all__ = [
    "FORMATS",
    "RULES",
    "BadRow",
    "Group",
    "MicroBatch",
    "PreferenceBatch",
    "Prompts",
    "Report",
    "TokenGroup",
    "Turns",
    "best_vs_rest",
    "collate",
    "empty_part",
    "margin",
    "merge_prompts",
    "messages_of",
    "ranks",
    "read_groups",
    "threshold",
    "tokenize_groups",
    "top_k",
]
