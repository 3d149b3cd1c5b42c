"""What every test file may ask for."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from poisoned import poisoned

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench, which is no installed package

# torch.compile would start processes that import torch, to compile kernels of which these tests have few.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# Workers side by side take one thread each, and so do their children: more threads than cores wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# The same examples every run, and nothing written: a red test is red for everybody.
settings.register_profile(
    "derandomized",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("derandomized")


def pytest_report_header() -> str | None:
    """Which units of the processor the tests run with: a red test elsewhere may be about them."""
    try:
        from groupdpo_kernels.cli.inspection import units, units_line
    except ImportError:  # the tests of a GPU run without the command line's packages
        return None
    return f"processor: {units_line(units())}, {torch.get_num_threads()} threads"


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """What has been imported is kept out of garbage collection: each trainer collects, a third of a second a time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor holds NaN: an output that is never written shows."""
    with poisoned():
        yield


@pytest.fixture(scope="module")
def bpe() -> Any:
    import tiny_tokenizers  # here, because the tests of a GPU run without the tokenizers library

    return tiny_tokenizers.byte_level_bpe()


@pytest.fixture(scope="module")
def sentencepiece_like() -> Any:
    import tiny_tokenizers

    return tiny_tokenizers.sentencepiece_like()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is no GPU; else only what compiles device code, where nvcc is not."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
