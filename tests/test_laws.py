"""Laws of the house: who may import whom, how long a file may be, what importing the package needs."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import groupdpo_kernels

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "groupdpo_kernels"
KERNELS = ROOT / "kernels" / "triton"

# What each module may import of ours, lowest first; a function body counts too, but for the kernels, which ops load by
# name when they first run one.
MAY_IMPORT: dict[str, set[str]] = {
    "reference": set(),
    "extension": set(),
    "adapters": set(),
    "limits": set(),
    "store": {"adapters"},
    "blocks": {"reference"},
    "sparse": {"blocks", "reference"},
    "host": {"blocks", "reference", "sparse"},
    "ops": {"extension", "host", "reference", "sparse"},
    "kept": {"host", "ops", "reference"},
    "preference_ops": {"extension"},
    "replay": set(),
    "functions": {"kept", "ops", "preference_ops", "reference", "replay", "sparse"},
    "sharded": {"functions", "ops", "reference"},
    "logps": {"functions", "kept", "ops", "reference", "replay", "sharded"},
    "losses": {"logps", "groups", "objectives"},  # the last two for typing only
    "objectives": {"functions", "groups", "logps", "losses", "ops", "preference_ops"},  # groups for typing only
    "groups": {"objectives", "ops"},
    "ranks": set(),
    "backward": {"groups", "objectives", "losses", "logps", "ranks", "replay"},
    "heads": {"logps"},
    "probe": {"heads"},
    "layouts": {"heads", "limits", "probe", "ranks"},
    "models": {"adapters", "heads", "layouts", "limits", "logps", "probe", "ranks"},
    "formats": {"groups"},
    "batches": {"formats", "groups"},
    "data": {"batches", "formats", "groups"},
    "stepwise": {"backward", "groups", "logps", "models", "objectives", "store"},
    "testing": {"reference", "kernels"},
    "profiles": set(),
    "cli/__init__": {"app"},
    "cli/__main__": {"main"},  # of cli/__init__
    "cli/app": {"__version__", "check", "logps", "profile", "train"},  # beside it: one module for each command
    "cli/check": {"inspection"},
    "cli/console": set(),
    "cli/curves": set(),
    "cli/inspection": {"__version__", "extension", "logps", "preference_ops", "selftest"},
    "cli/loading": {"formats", "limits", "store"},
    "cli/logps": {"console", "formats", "loading", "scoring"},
    "cli/profile": {"console", "planning", "profiling", "report", "workloads"},
    "cli/scoring": {
        *("__version__", "batches", "data", "formats", "layouts", "limits", "models", "store"),
        "loading",  # beside it
    },
    "cli/selftest": {"groups", "logps", "objectives", "ops", "preference_ops", "reference", "testing"},
    "cli/train": {"console", "training"},
    "cli/training": {"inspection", "curves", "formats", "integrations", "loading", "objectives", "store"},
    "machine": set(),
    "resident": set(),
    "tracking": set(),
    "workloads": {"backward", "groups", "models", "objectives"},
    "planning": {"heads", "kept", "models", "tracking", "workloads"},
    "measuring": {"planning", "resident", "tracking", "workloads"},
    "profiling": {"machine", "report", "workloads"},
    "pictures": set(),
    "report": {"pictures", "profiling", "workloads"},
    "integrations/__init__": set(),
    "integrations/replacement": set(),
    "integrations/one_column": {"models"},
    "integrations/axolotl": {"one_column", "replacement", "trl"},
    "integrations/llama_factory": {"models", "replacement"},
    "integrations/ms_swift": {"one_column", "replacement"},
    "integrations/open_instruct": {"logps", "models", "replacement"},
    "integrations/openrlhf": {"models", "replacement"},
    "integrations/trl/__init__": {"accelerate", "groups", "pairs", "stepwise"},
    "integrations/trl/accelerate": {"logps", "replacement"},
    "integrations/trl/groups": {
        *("adapters", "backward", "batches", "data", "limits", "logps"),
        *("measuring", "models", "objectives", "stepwise"),
        *("memory", "metrics", "misplaced", "reference", "rows"),  # beside it
    },
    "integrations/trl/memory": {"data", "planning"},
    "integrations/trl/metrics": {"groups", "logps", "losses", "objectives"},
    "integrations/trl/pairs": {
        *("adapters", "batches", "groups", "losses", "models", "objectives", "one_column"),
        *("accelerate", "metrics", "misplaced", "reference", "rows"),  # beside it
    },
    "integrations/trl/reference": {"adapters", "ranks"},
    "integrations/trl/stepwise": {
        *("adapters", "data", "limits", "logps", "models", "objectives", "stepwise"),
        *("groups", "pairs", "reference", "rows"),  # beside it
    },
    "integrations/trl/misplaced": {"objectives"},
    "integrations/trl/rows": {"backward", "data", "formats", "layouts", "losses", "misplaced", "objectives"},
}
SHARED_KERNEL_MODULES = {"launch", "library", "live_products", "rows", "tile", "pair_losses"}
# A launcher that begins with what another does.
CONTINUES = {"linear_logps_candidates": "linear_logps_forward", "sparse_backward": "linear_logps_backward"}
SOURCES = ("*.py", "*.cpp", "*.h", "*.cu", "*.cuh")


def imports(path: Path) -> set[str]:
    """Modules that a file imports; ours as `.name`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level and not base:
                found |= {"." + alias.name for alias in node.names}
            else:
                found.add("." * bool(node.level) + base)
    return {name.replace("groupdpo_kernels.", ".", 1) for name in found}


MODULES = {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")} - {"__init__"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_import_law(name: str) -> None:
    assert name in MAY_IMPORT, f"{name}.py has no place in the import law"
    found = imports(PACKAGE / f"{name}.py")
    ours = {module[1:].split(".")[0] for module in found if module.startswith(".")}
    assert ours <= MAY_IMPORT[name]


def test_public_names_are_those_that_a_type_checker_sees() -> None:
    """They are imported when first asked for; each is what its module calls by that name."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert {f"{n.module}.{a.name}" for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names} == {
        f"{home}.{name}" for name, home in groupdpo_kernels._HOME_OF.items()
    }
    for name in groupdpo_kernels.__all__:
        home = importlib.import_module(f"groupdpo_kernels.{groupdpo_kernels._HOME_OF[name]}")
        assert getattr(groupdpo_kernels, name) is getattr(home, name) and name in dir(groupdpo_kernels)
    with pytest.raises(AttributeError, match="module 'groupdpo_kernels' has no attribute 'linear_logprobs'"):
        groupdpo_kernels.linear_logprobs  # noqa: B018


def test_losses_know_groups_for_typing_only() -> None:
    for name in ("losses", "objectives"):
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        top = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert "groups" not in top


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.stem)
def test_kernels_know_nothing_above_them(path: Path) -> None:
    found = imports(path)
    ours = {module[1:].split(".")[0] for module in found if module.startswith(".")}
    assert ours <= SHARED_KERNEL_MODULES | {CONTINUES.get(path.stem, "")}
    outside = {module.split(".")[0] for module in found if not module.startswith(".")} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "triton"}


def test_no_package_named_kernels_at_the_root() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_file_grows_without_bound() -> None:
    """About 400 lines is where to look for a second idea; twice that is where there surely is one."""
    folders = ("python", "kernels", "csrc", "bench", "tests", "examples")
    paths = [path for folder in folders for pattern in SOURCES for path in (ROOT / folder).rglob(pattern)]
    long = {str(path.relative_to(ROOT)): n for path in paths if (n := len(path.read_text().splitlines())) > 800}
    assert paths and not long


def test_importing_needs_torch_alone() -> None:
    """With triton, transformers, peft and numpy out of reach, the package imports and computes."""
    program = """
import sys
HIDDEN = ("triton", "transformers", "peft", "numpy", "datasets", "trl")
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, *rest)
sys.meta_path[:] = map(Hiding, sys.meta_path)
import torch
from groupdpo_kernels import explain, linear_logps
arguments = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 4, -100])
print(linear_logps(*arguments).tolist()[2], "triton does not import" in str(explain(*arguments)))
from groupdpo_kernels.integrations.trl import accelerate
try:
    accelerate()
except ImportError as error:
    print("groupdpo-kernels[trl]" in str(error))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, cwd="/")
    assert done.stdout.split() == ["0.0", "True", "True"], done.stderr


def test_public_names_are_documented_and_typed() -> None:
    assert (PACKAGE / "py.typed").exists()
    for name in groupdpo_kernels.__all__:
        thing = getattr(groupdpo_kernels, name)
        assert inspect.getdoc(thing), name
        if inspect.isfunction(thing):
            parameters = inspect.signature(thing).parameters.values()
            assert all(p.annotation is not p.empty for p in parameters), name


def test_signature_of_linear_logps() -> None:
    parameters = list(inspect.signature(groupdpo_kernels.linear_logps).parameters)
    head = ["hidden", "weight", "targets", "bias", "logit_scale", "softcap", "temperature", "ignore_index", "grad_tol"]
    assert parameters == [*head, "workspace_bytes", "process_group", "impl", "low_rank", "grad_tail"]
