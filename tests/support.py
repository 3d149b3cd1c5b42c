"""The table of what is supported, docs/project/support.md, made from what pytest has reported. `make support` runs it.

`make test` and `make test-distributed` with `ARGS=--junitxml=build/junit/NAME.xml` write such reports. A cell counts
the tests that have passed there, and shows those that have failed or were skipped: what no test has run is empty. Which
cell a test belongs to is said by its name and by the words in its brackets (a case, an implementation, a loss, an
engine), so that a new test of an old kind counts by itself.
"""

from __future__ import annotations

import ast
import datetime
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pages
from tiny_models import ARCHITECTURES

from groupdpo_kernels.cli.inspection import units, units_line
from groupdpo_kernels.preference.losses import LOSSES
from groupdpo_kernels.testing import CASES, Case

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "project" / "support.md"
REPORTS = ROOT / "build" / "junit"

Cell = tuple[str, str]  # row, column
REFUSED = "refused"  # before the column of a test that wants an error in words


class Result(NamedTuple):
    file: str  # without tests/ and .py
    name: str
    words: frozenset[str]  # of the brackets, at dashes and spaces
    outcome: str  # passed, failed or skipped

    @property
    def id(self) -> str:
        return f"{self.file}::{self.name}"


def result_of(file: str, name: str, outcome: str = "passed") -> Result:
    inside = re.search(r"\[(.*)\]$", name, re.S)
    return Result(file, name, frozenset(re.split(r"[- ]", inside[1]) if inside else ()), outcome)


def results(reports: Iterable[Path]) -> Iterator[Result]:
    for report in reports:
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            tags = {child.tag for child in case}
            outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
            yield result_of(case.get("classname", "").split(".")[-1], case.get("name", ""), outcome)


# ------------------------------------------------------------------------------------- the op, by implementation

IMPLEMENTATIONS = {
    "reference": "plain PyTorch",
    "cpu": "C++",
    "interpreted": "Triton, interpreted",
    "emulated": "Triton, compiled and emulated",
    "gpu": "on a GPU",
}
# The harness names the kernel's two ways to load; "library" stands for products by a library.
OF_WORD = {"reference": "reference", "cpu": "cpu", "triton": "interpreted"}
OF_WORD |= dict.fromkeys(("descriptors", "pointers", "library"), "interpreted")
OF_FILE = {
    "test_csrc": "cpu",
    "test_logit_cache": "cpu",
    "test_threads": "cpu",
    "test_blocks": "reference",
    "test_sparse_triton": "interpreted",
    "test_emulated_kernels": "emulated",
    "test_gpu": "gpu",
}
CASE = {case.name: case for case in CASES}
OPTIONS: dict[str, Callable[[Case], object]] = {
    "any case": lambda c: True,
    "bias": lambda c: c.bias,
    "low_rank (LoRA on the head)": lambda c: c.R,
    "logit_scale": lambda c: c.logit_scale != 1,
    "softcap": lambda c: c.softcap,
    "temperature": lambda c: c.temperature != 1,
    "entropy with a gradient": lambda c: c.entropy,
    "rows that are ignored": lambda c: c.ignored != "none",
    "leading dimensions or strides": lambda c: c.leading or c.strided,
    "several chunks": lambda c: c.workspace_bytes < 2**20,
    "logits far from zero": lambda c: c.shift or c.column,
    "rows that are sure": lambda c: c.hidden_scale >= 8,
}
OF_THE_OP = re.compile(
    "test_(linear_logps|csrc|blocks|gpu|logit_cache|frozen_head|sparse|replay|sharded|threads|emulated|ops|entropy|offsets|"
    "failures_of_peers|public_reports)"
)
DTYPES = ("float32", "bfloat16", "float16")


def implementation(test: Result) -> str | None:
    if not OF_THE_OP.match(test.file):
        return None
    if test.file in ("test_gpu", "test_emulated_kernels"):
        return IMPLEMENTATIONS[OF_FILE[test.file]]
    found = {OF_WORD[word] for word in test.words & OF_WORD.keys()} or {OF_FILE.get(test.file)}
    (one,) = found if len(found) == 1 else (None,)
    return IMPLEMENTATIONS[one] if one else None


def options(test: Result) -> Iterator[Cell]:
    case, column = next((CASE[word] for word in test.words & CASE.keys()), None), implementation(test)
    if case and column:
        yield from ((f"{name}, {str(case.dtype)[6:]}", column) for name, has in OPTIONS.items() if has(case))


PATHS = {
    "exact: forward, and backward by products again": (
        r"test_(linear_logps|csrc|blocks|gpu)::test_(cases?|values\w*|any_strides|layouts)\b|emulated.* trained\]"
    ),
    "exact, with kept products": "test_logit_cache::",
    "a head that is frozen": r"test_frozen_head::|test_cases_frozen_head|emulated.* frozen\]|threads::test_\w+\[frozen",
    "within a tolerance (`grad_tol`)": r"test_sparse(_triton)?::|test_gpu::test_sparse|emulated.* sparse\]",
    "within a tolerance, the tail sampled": "test_sparse_tail::",
    "a second pass with a known lse": "test_replay::",
    "a vocabulary over several processes": "test_sharded::",
    "rows that are not finite": "not_finite|non_finite",
    "ids that are wrong": "wrong_id",
    "only the gradients that are needed": r"subset_of|only_needed|each_gradient_alone",
    "the same bits twice, or on any number of threads": r"same_bits|test_threads::|bits_repeat",
}
# Files whose tests say no implementation run the one that is chosen for a CPU.
CHOSEN = "the one chosen for a CPU"


def paths(test: Result) -> Iterator[Cell]:
    if not OF_THE_OP.match(test.file):
        return
    yield from ((row, implementation(test) or CHOSEN) for row, pattern in PATHS.items() if re.search(pattern, test.id))


# ----------------------------------------------------------------------------------------------- losses and models

LOSS_COLUMNS = {
    "against a loop over groups": "test_objectives::",
    "against TRL": "test_objectives_trl::",
    "fused kernel": "test_preference_weights::",
    "micro-batches against one graph": "test_backward::",
    "in a trainer": "test_trl_",
    "on a GPU": "test_gpu",
}


def losses(test: Result) -> Iterator[Cell]:
    for loss in test.words & LOSSES.keys():
        yield from ((f"`{loss}`", column) for column, start in LOSS_COLUMNS.items() if test.file.startswith(start[:-2]))


MODEL_COLUMNS = {
    "scored": "test_models::test_architecture|test_models_training::|test_model_layouts::test_each",
    "prompt that runs once": "test_shared_prompt::test_(a_step|shapes|eager|it_rounds|checkpoints)",
    "refused in words": "test_shared_prompt::test_those_that_cannot",
    "layouts": "test_model_layouts::",
    "images in groups": "test_images::",
    "on a GPU": "test_models_training::test_on_a_gpu",
}


def models(test: Result) -> Iterator[Cell]:
    for name in test.words & {*ARCHITECTURES, "qwen2_5_vl", "smolvlm"}:
        yield from ((name, column) for column, pattern in MODEL_COLUMNS.items() if re.search(pattern, test.id))


# -------------------------------------------------------------------------------------- trainers and processes

ENGINES = ("one process", "DDP", "FSDP", "ZeRO 1", "ZeRO 2", "ZeRO 3", "tensor parallel", "groups over ranks")
MATRIX = r"test_distributed::test_ranks_are_one\w*\[{}-"
REST = "test_distributed_rest::test_{}"
TRAINERS: dict[str, dict[str, str]] = {
    "`GroupDPOTrainer`": {
        "one process": "test_trl_(groups|shared_prompt|memory|metrics)::|test_images::test_a_trainer",
        "DDP": rf"{MATRIX.format('ddp')}|test_trl_groups::test_two_ranks|{REST.format('a_rank_that_raises')}.*ddp",
        "FSDP": rf"{MATRIX.format('fsdp2')}|test_trl_engines::test_two.*fsdp2|{REST.format('(saved|a_)')}.*fsdp2",
        "ZeRO 1": rf"{MATRIX.format('zero1')}|test_trl_engines::test_two.*zero 1",
        "ZeRO 2": rf"{MATRIX.format('zero2')}|test_trl_engines::test_two.*zero 2|{REST.format('saved')}.*zero 2",
        "ZeRO 3": rf"{MATRIX.format('zero3')}|test_trl_engines::test_two.*zero 3|{REST.format('(saved|a_)')}.*zero ?3",
        "refused tensor parallel": r"test_ranks::.*\[a_(model_sharded_by_transformers|sharded_model_is_no_trainers)",
    },
    "`DPOTrainer`": {
        "one process": "test_trl_pairs::",
        **dict.fromkeys(("DDP", "FSDP", "ZeRO 1", "ZeRO 2", "ZeRO 3"), REST.format("pairs_in_trl")),
    },
    "`OnlineGroupDPOTrainer`": {"one process": "test_trl_online::", "DDP": "test_trl_online::test_two_ranks"},
    "`StepwiseDPO`": {
        "one process": "test_trl_stepwise::",
        **dict.fromkeys(("DDP", "FSDP"), REST.format("stages$")),
        **dict.fromkeys(("refused ZeRO 1", "refused ZeRO 2", "refused ZeRO 3"), REST.format("stages_are_refused")),
    },
    "TRL's trainers under `patch_trl()`": {"one process": "test_trl_patch::"},
    "`groupdpo-kernels train`": {
        "one process": "test_cli_train::",
        **dict.fromkeys(("DDP", "FSDP", "ZeRO 2", "ZeRO 3"), REST.format("the_command_line")),
    },
    "`group_backward` in a loop of one's own": {
        "one process": "test_(backward|group_prompt|groups)::",
        "DDP": r"test_ranks::.*\[ddp",
        "FSDP": r"test_ranks::.*\[fsdp",
        "ZeRO 1": r"test_ranks::.*\[zero_1",
        "ZeRO 2": r"test_ranks::.*\[zero_2",
        "ZeRO 3": r"test_ranks::.*\[zero_3",
        "tensor parallel": r"test_tensor_parallel::.*\[(shared_prompts|with_fsdp)",
        "groups over ranks": r"test_ranks::.*\[(one_\w+_on_all_ranks|weights_on_all|tokens_on_all|zero_groups_over)",
    },
    "`model_logps`": {
        "one process": "test_models(_heads|_training)?::",
        "DDP": r"test_models_sharded::.*\[ddp",
        "FSDP": r"test_models_sharded::.*\[(fsdp|coll|mixed)",
        "tensor parallel": "test_tensor_parallel::test_a_split",
    },
    "`linear_logps` over a split vocabulary": {"tensor parallel": "test_sharded::"},
}


def trainers(test: Result) -> Iterator[Cell]:
    for row, of in TRAINERS.items():
        yield from ((row, column) for column, pattern in of.items() if re.search(pattern, test.id))


# --------------------------------------------------------------------------------------------------- the page


class Table(NamedTuple):
    title: str
    text: str
    of: Callable[[Result], Iterator[Cell]]
    rows: tuple[str, ...]
    columns: tuple[str, ...]


ON_DEVICES = tuple(IMPLEMENTATIONS.values())
TABLES = (
    Table(
        "The op: options by dtype and implementation",
        "Values and gradients of `linear_logps` and `linear_logp_stats` within the error budget: at most twice the "
        "error of eager PyTorch at the same precision, against float64.",
        options,
        tuple(f"{name}, {dtype}" for name in OPTIONS for dtype in DTYPES),
        ON_DEVICES,
    ),
    Table(
        "The op: paths by implementation",
        "Which path a call takes: [which path runs](../concepts/paths.md).",
        paths,
        tuple(PATHS),
        (*ON_DEVICES, CHOSEN),
    ),
    Table(
        "Losses",
        "Value and gradient of each loss.",
        losses,
        tuple(f"`{name}`" for name in LOSSES),
        tuple(LOSS_COLUMNS),
    ),
    Table(
        "Architectures",
        "Tiny models of transformers, from a configuration, against their own logits.",
        models,
        tuple(sorted({*ARCHITECTURES, "qwen2_5_vl", "smolvlm"})),
        tuple(MODEL_COLUMNS),
    ),
    Table(
        "Trainers by parallelism",
        "Several processes are gloo's, on CPUs, each against one process. Models and data are tiny.",
        trainers,
        tuple(TRAINERS),
        ENGINES,
    ),
)


def words(counts: Counter[str]) -> str:
    skipped = f"({counts['skipped']} not run)" if counts["skipped"] else ""
    failed = f"**{counts['failed']} failed**" if counts["failed"] else ""
    passed = str(counts["passed"]) if counts["passed"] else ""
    return " ".join(filter(None, (passed, failed, skipped)))


def lines_of(table: Table, found: list[Result]) -> Iterator[str]:
    cells: dict[Cell, Counter[str]] = defaultdict(Counter)
    files = set()
    for test in found:
        for cell in set(table.of(test)):
            cells[cell][test.outcome] += 1
            files.add(test.file)
    columns = [column for column in table.columns if any(cell[1].endswith(column) for cell in cells)]

    def cell(row: str, column: str) -> str:
        refused = words(cells[row, f"{REFUSED} {column}"])
        return " ".join(filter(None, (words(cells[row, column]), refused and f"refused: {refused}")))

    yield from (
        f"## {table.title}",
        "",
        table.text,
        "",
        f"| | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    )
    for row in table.rows:
        if any(cell[0] == row for cell in cells):
            yield f"| {row} | {' | '.join(cell(row, column) for column in columns)} |"
    yield from ("", "Tests: " + ", ".join(f"`{file}`" for file in sorted(files)) + ".", "")


def lines_of_files(found: list[Result]) -> Iterator[str]:
    """Each file's count, and the first sentence of its docstring."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for test in found:
        counts[test.file][test.outcome] += 1
    yield from ("## Files", "", "| tests | passed | what is tested, and how |", "|---|---|---|")
    for file in sorted(counts):
        text = ast.get_docstring(ast.parse((ROOT / "tests" / f"{file}.py").read_text())) or ""
        first = re.split(r"(?<=\.)\s", " ".join(text.split()))[0].replace("|", r"\|")
        yield f"| `{file}` | {words(counts[file])} | {first} |"


def page(found: list[Result]) -> str:
    outcomes = Counter(test.outcome for test in found)
    lines = [
        f"{datetime.date.today().isoformat()}, commit {pages.commit()}, on a processor with {units_line(units())}: "
        f"{outcomes['passed']} tests passed, {outcomes['failed']} failed, {outcomes['skipped']} not run.",
        "",
    ]
    for table in TABLES:
        lines += lines_of(table, found)
    lines += lines_of_files(found)
    return "\n".join(lines).rstrip()


def main() -> None:
    reports = sorted(REPORTS.glob("*.xml"))
    if not reports:
        sys.exit(f"no reports of pytest in {REPORTS.relative_to(ROOT)}/; the page {PAGE.name} says how they are made")
    found = list(results(reports))
    for row, column, pattern in ((row, *claim) for row, of in TRAINERS.items() for claim in of.items()):
        if not any(re.search(pattern, test.id) for test in found):
            print(f"no test in these reports: {row}, {column}")
    pages.write(PAGE, "make support", page(found))


if __name__ == "__main__":
    main()
