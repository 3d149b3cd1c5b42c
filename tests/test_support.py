"""The table of what is supported: a report of pytest becomes cells, and no cell is more than a test that has passed."""

from __future__ import annotations

from pathlib import Path

import pytest
import support
from support import TABLES, lines_of, result_of, results

REPORT = """<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite name="pytest">
<testcase classname="tests.test_csrc" name="test_values_and_gradients_within_the_error_budget[bias]" time="0.1"/>
<testcase classname="tests.test_linear_logps" name="test_case[everything_bf16-descriptors]"><failure/></testcase>
<testcase classname="tests.test_gpu" name="test_cases[bias-triton]" time="0.1"><skipped message="no device"/></testcase>
<testcase classname="tests.test_backward" name="test_every_objective[mpo-two_pass]" time="0.1"/>
<testcase classname="tests.test_distributed_rest" name="test_stages_are_refused_under_deepspeed" time="0.1"/>
</testsuite></testsuites>"""


def test_cells_are_counts_of_a_report(tmp_path: Path) -> None:
    (tmp_path / "suite.xml").write_text(REPORT)
    found = list(results([tmp_path / "suite.xml"]))
    assert [test.outcome for test in found] == ["passed", "failed", "skipped", "passed", "passed"]
    text = "\n".join(line for table in TABLES for line in lines_of(table, found))
    assert "| bias, float32 | 1 |  | (1 not run) |" in text
    assert "| softcap, bfloat16 |  | **1 failed** |  |" in text
    assert "| temperature, float32 |" not in text  # no test, no row
    assert "| `mpo` | 1 |" in text
    assert "| `StepwiseDPO` |  | refused: 1 | refused: 1 | refused: 1 |" in text


@pytest.mark.parametrize(
    "file, name, column",
    [
        ("test_emulated_kernels", "test_case[sm_90 everything_bf16 trained]", "Triton, compiled and emulated"),
        ("test_sparse", "test_cases[reference-batched]", "plain PyTorch"),
        ("test_replay", "test_values[triton-plain]", "Triton, interpreted"),
        ("test_gpu", "test_cases[plain-reference]", "on a GPU"),
        ("test_ops", "test_compile_every_option_and_statistic", None),
    ],
)
def test_which_implementation_a_test_is_of(file: str, name: str, column: str | None) -> None:
    assert support.implementation(result_of(file, name)) == column


def test_without_a_report_the_page_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = support.PAGE.read_text()
    monkeypatch.setattr(support, "REPORTS", support.ROOT / "build" / "no such folder")
    with pytest.raises(SystemExit, match="no reports of pytest in build/no such folder/"):
        support.main()
    assert support.PAGE.read_text() == before
