"""What `make sanitize` rests on, without its builds: faults can be planted, and the normal build has nothing of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from sanitize import PLANTED, ROOT, Planted

from groupdpo_kernels import _C


@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.what)
def test_a_fault_can_be_planted(fault: Planted) -> None:
    assert (ROOT / fault.file).read_text().count(fault.source) == 1 and fault.source != fault.fault
    assert all((ROOT / path).exists() for path in fault.tests.split())


def test_the_normal_build_knows_no_sanitizer() -> None:
    module = Path(_C.__file__).read_bytes()
    assert not [name for name in (b"__asan_", b"__tsan_", b"__ubsan_") if name in module]
