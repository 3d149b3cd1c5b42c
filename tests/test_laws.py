"""Laws of the house: who may import whom, how long a file may be, what importing the package needs."""

from __future__ import annotations

import ast
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
    "cli/check": {"__version__", "extension", "logps", "preference_ops", "selftest"},
    "cli/curves": set(),
    "cli/loading": {"formats", "limits", "store"},
    "cli/logps": {"formats", "loading", "scoring"},
    "cli/profile": {"loading", "planning", "profiling", "report", "workloads"},
    "cli/scoring": {
        *("__version__", "batches", "data", "formats", "layouts", "limits", "models", "store"),
        "loading",  # beside it
    },
    "cli/selftest": {"groups", "logps", "objectives", "ops", "preference_ops", "reference", "testing"},
    "cli/train": {"loading", "logps", "training"},
    "cli/training": {"check", "curves", "formats", "integrations", "loading", "objectives", "store"},
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


def defined(path: Path) -> tuple[dict[str, ast.stmt], dict[str, ast.FunctionDef]]:
    """Names that a module of kernels gives a value at its top, and those of its functions that Triton compiles."""
    values: dict[str, ast.stmt] = {}
    compiled: dict[str, ast.FunctionDef] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
            compiled[node.name] = node
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            values[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            values |= {name.id: node for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and node.level:
            others = defined(path.parent / f"{node.module}.py") if node.module else ({}, {})
            for alias in node.names:
                for found, theirs in zip((values, compiled), others):
                    if alias.name in theirs:
                        found[alias.asname or alias.name] = theirs[alias.name]  # type: ignore[index]
    return values, compiled


def not_constexpr(path: Path) -> dict[str, str]:
    """Names of the module, each with a kernel that reads it, that are neither a kernel nor a tl.constexpr(...)."""
    values, compiled = defined(path)
    wrong = {}
    for function in compiled.values():
        nodes = [node for statement in function.body for node in ast.walk(statement)]
        names = [node for node in nodes if isinstance(node, ast.Name)]
        own = {argument.arg for argument in function.args.args}
        own |= {name.id for name in names if isinstance(name.ctx, ast.Store)}
        for name in {name.id for name in names} & values.keys() - own:
            value = getattr(values[name], "value", None)
            if not (isinstance(value, ast.Call) and ast.unparse(value.func) == "tl.constexpr"):
                wrong[name] = function.name
    return wrong


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.stem)
def test_constants_of_kernels_are_constexpr(path: Path) -> None:
    """A kernel that reads a plain number, tuple or function of its module compiles under some versions of Triton and is
    refused by others, and its cache does not see that the number has changed.
    """
    assert not not_constexpr(path)


def test_the_law_of_constants_sees_what_it_forbids(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("SHARED = 3\nFINE = tl.constexpr(3)\n")
    kernel = "@triton.jit\ndef kernel(x_ptr, SHARED_BLOCK: tl.constexpr):\n    x = {}\n    tl.store(x_ptr, x)\n"
    for constant, name in (("X = 2", "X"), ("X: tl.constexpr = 2", "X"), ("from .other import SHARED", "SHARED")):
        (tmp_path / "one.py").write_text(f"{constant}\n{kernel.format(name)}")
        assert not_constexpr(tmp_path / "one.py") == {name: "kernel"}
    for constant, name in (("X = tl.constexpr(2)", "X"), ("from .other import FINE", "FINE"), ("x = 2", "2")):
        (tmp_path / "one.py").write_text(f"{constant}\n{kernel.format(name)}")
        assert not not_constexpr(tmp_path / "one.py")


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
