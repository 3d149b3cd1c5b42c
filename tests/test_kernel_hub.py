"""The Triton half in the layout of the kernel hub: assembled, loaded as the hub does, and run in the interpreter."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What kernel-builder writes for a build; {} is what tells builds apart.
OPS = """import torch
_OPS_NAME = "_groupdpo_kernels_cuda_{}"
ops = getattr(torch.ops, _OPS_NAME)
def add_op_namespace_prefix(op_name):
    return f"{{_OPS_NAME}}::{{op_name}}"
"""
# A kernel has a path and a name of the loader's choice. The package itself cannot be imported here.
PROGRAM = """
import importlib.util, sys
import torch
sys.modules["groupdpo_kernels"] = None
def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path + "/__init__.py", submodule_search_locations=[path])
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    importlib.import_module(name + ".testing")
    return module

def step(kernel):
    hidden, weight = (torch.randn(n, 64, generator=torch.Generator().manual_seed(n)) for n in (12, 300))
    hidden.requires_grad_(), weight.requires_grad_()
    targets = torch.arange(12) * 7
    with kernel.testing.triton_on_cpu():
        logps = kernel.linear_logps(hidden, weight, targets, impl="triton")
        groups = kernel.PreferenceGroups.from_lists([[True, False, False]])
        objective = kernel.Objective("mpo", reference_free=True)
        loss = kernel.preference_loss(logps, torch.arange(0, 13, 4), groups, objective, impl="triton").loss
        loss.backward()
    torch.testing.assert_close(logps, torch.log_softmax(hidden @ weight.T, -1)[range(12), targets])
    eager = kernel.preference_loss(logps, torch.arange(0, 13, 4), groups, objective, impl="reference").loss
    torch.testing.assert_close(loss, eager)
    expected = torch.autograd.grad(eager, logps)
    eager_logps = torch.log_softmax(hidden @ weight.T, -1)[range(12), targets]
    for ours, theirs in zip((hidden.grad, weight.grad), torch.autograd.grad(eager_logps, (hidden, weight), expected)):
        torch.testing.assert_close(ours, theirs)
    return logps.detach(), loss.detach(), hidden.grad, weight.grad

kernels = [load(path, f"kernel_{i}") for i, path in enumerate(sys.argv[1:])]
first, second = map(step, kernels)
assert all(map(torch.equal, first, second))
spaces = [kernel.lm_head.ops._LIBRARY.ns for kernel in kernels]
print(*spaces, hasattr(torch.ops.groupdpo_kernels, "linear_logps_forward"))
"""


@pytest.fixture
def hub() -> Any:
    spec: Any = importlib.util.spec_from_file_location("assemble", ROOT / "kernels" / "hub" / "assemble.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_builds_run_side_by_side(hub: Any, tmp_path: Path) -> None:
    """Each in its own namespace of ops, without the package, with the same bits; values and gradients are right."""
    packages = [hub.assemble(tmp_path / build) for build in ("one", "two")]
    for package, build in zip(packages, ("one", "two")):
        (package / "_ops.py").write_text(OPS.format(build))
    command = [sys.executable, "-c", PROGRAM, *map(str, packages)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["_groupdpo_kernels_cuda_one", "_groupdpo_kernels_cuda_two", "False"]


def test_layout(hub: Any, tmp_path: Path) -> None:
    package = hub.assemble(tmp_path / "hub")
    hub.assemble(tmp_path / "hub")  # again, over what is there
    name = re.search(r'^name = "(.*)"$', (tmp_path / "hub" / "build.toml").read_text(), re.M)
    assert name and package == tmp_path / "hub" / "torch-ext" / name[1].replace("-", "_")
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {"build.toml", "flake.nix", "CARD.md", "torch-ext"}
    assert {path.name for path in (package / "kernels").iterdir()} == {
        path.name for path in (ROOT / "kernels" / "triton").glob("*.py")
    }
    for path in package.rglob("*.py"):  # by no form of import, and as no op
        assert not re.search(
            r'(from|import) groupdpo_kernels|torch\.ops\.groupdpo_kernels|"groupdpo_kernels(::|")', path.read_text()
        )


def test_nothing_else_is_overwritten(hub: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="target must be a new folder"):
        hub.assemble(tmp_path)
    assert (tmp_path / "mine").exists()
