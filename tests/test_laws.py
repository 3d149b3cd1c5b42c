"""Laws of the house: who may import whom, how long a file may be, what importing the package needs."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import groupdpo_kernels

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "groupdpo_kernels"
KERNELS = ROOT / "kernels" / "triton"
NAME = "groupdpo_kernels"

# What each package or module of ours may import of the others, lowest first. "kernels" and "_C" are loaded by a string
# with their name, when an op first runs one.
MAY_IMPORT: dict[str, set[str]] = {
    **{name: set() for name in ("checks", "installed", "distributed", "files", "reference", "replay", "threads")},
    "lm_head": {"checks", "reference", "replay", "threads", "kernels", "_C"},
    "preference": {"checks", "distributed", "replay", "kernels"},
    "models": {"checks", "distributed", "lm_head", "threads"},
    "data": {"checks", "preference"},
    "memory": {"distributed", "files", "lm_head", "models", "preference"},
    "stepwise": {"distributed", "files", "models", "preference"},
    "trainers": {"checks", "installed", "distributed", "files", "preference", "models", "data", "memory", "stepwise"},
    "integrations": {"installed", "lm_head", "models", "preference", "threads"},
    "testing": {"reference", "kernels"},
    "cli": {
        "checks",
        "files",
        "reference",
        "testing",
        "_C",
        "lm_head",
        "preference",
        "models",
        "data",
        "memory",
        "stepwise",
        "trainers",
    },
    "__init__": {"reference", "lm_head", "preference", "models"},
    "bench": {
        "__init__",
        "files",
        "reference",
        "testing",
        "kernels",
        "lm_head",
        "models",
        "data",
        "memory",
        "stepwise",
        "trainers",
        "integrations",
    },
    "examples": {"__init__", "files", "models", "data", "memory", "stepwise", "trainers", "integrations"},
}
SHARED_KERNEL_MODULES = {"launch", "gemm", "row_limited_gemm", "compaction", "tile", "pair_losses"}
# A launcher that begins with what another does.
CONTINUES = {"sparse_forward": "linear_logps_forward", "sparse_backward": "linear_logps_backward"}
SOURCES = ("*.py", "*.cpp", "*.h", "*.cu", "*.cuh")


def imports(path: Path) -> set[str]:
    """Modules that a file of kernels/triton imports; ours as `.name`."""
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
    return found


def ours(path: Path) -> set[str]:
    """Full paths, below the package, of what a file imports of ours: for typing, in function bodies and by name too."""
    folder = list(path.relative_to(PACKAGE).parts[:-1]) if PACKAGE in path.parents else None
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level and folder is not None:
            base = [*folder[: len(folder) - node.level + 1], *filter(None, (node.module or "").split("."))]
            names = [] if node.module else [alias.name for alias in node.names]
            found |= {".".join([*base, name]) for name in names} if names else {".".join(base)}
        elif isinstance(node, ast.ImportFrom) and node.module == NAME:
            known = {alias.name for alias in node.names}
            found |= {name if name in MAY_IMPORT else "__init__" for name in known}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{NAME}."):
            found.add((node.module or "").removeprefix(f"{NAME}."))
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix(f"{NAME}.") for a in node.names if a.name.startswith(f"{NAME}.")}
        elif isinstance(node, ast.Constant) and re.fullmatch(rf"{NAME}\.[\w.]+", str(node.value)):
            found.add(str(node.value).removeprefix(f"{NAME}."))
    return found


def files_of(part: str) -> list[Path]:
    folder = ROOT / part if part in ("bench", "examples") else PACKAGE / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def test_every_file_has_a_place_in_the_law() -> None:
    parts = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in PACKAGE.rglob("*.py")}
    assert parts | {"bench", "examples"} == set(MAY_IMPORT)


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_import_law(part: str) -> None:
    """Nothing else; and a permit that nobody uses is taken away."""
    used = {name.split(".")[0]: f"{path.name}: {name}" for path in files_of(part) for name in ours(path)}
    beyond = {name: where for name, where in used.items() if name not in MAY_IMPORT[part] | {part, "__version__"}}
    assert not beyond, f"{part} may not import {beyond}"
    assert not (unused := MAY_IMPORT[part] - set(used)), f"nobody in {part} imports {unused}"


@pytest.mark.parametrize("part", [part for part in MAY_IMPORT if len(files_of(part)) > 1])
def test_no_circle_within_a_package(part: str) -> None:
    if part in ("bench", "examples"):
        return
    arrows = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): ours(path)
        for path in files_of(part)
    }
    TopologicalSorter({a: {b for b in to if b in arrows and b != a} for a, to in arrows.items()}).prepare()


def test_the_law_has_no_circle() -> None:
    TopologicalSorter(MAY_IMPORT).prepare()


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


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.stem)
def test_kernels_know_nothing_above_them(path: Path) -> None:
    found = imports(path)
    beside = {module[1:].split(".")[0] for module in found if module.startswith(".")}
    assert beside <= SHARED_KERNEL_MODULES | {CONTINUES.get(path.stem, "")}
    found -= {f"{NAME}.reference"}  # the records of the glossary
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


def test_no_file_holds_both_sides_of_a_merge() -> None:
    folders = ("python", "kernels", "csrc", "bench", "tests", "examples", "docs")
    paths = [path for folder in folders for pattern in (*SOURCES, "*.md") for path in (ROOT / folder).rglob(pattern)]
    assert paths and not [path for path in paths if re.search(r"^(<{7}|>{7}) ", path.read_text(), re.MULTILINE)]


# What would run code that a file or a row holds, each with how it is seen in the text of a call.
UNSAFE = {
    r"(?:eval|exec|compile|__import__)\(": "the built-in function",
    r"(?:pickle|dill|cloudpickle|marshal|shelve|joblib)\.(?:load|loads|open|Unpickler)\(": "unpickles",
    r"torch\.load\((?!.*weights_only=True)": "unpickles anything without weights_only=True",
    r"(?:np|numpy)\.load\(.*allow_pickle=True": "unpickles",
    r"yaml\.(?:load|unsafe_load|full_load)\(": "makes objects; safe_load does not",
    r".*\btrust_remote_code=True": "runs code of the hub",
    r"(?:os\.system|os\.popen)\(|subprocess\..*shell=True": "a shell",
    r"jinja2\.(?:Template|Environment)\(": "a template outside of a sandbox",
}


def unsafe(source: str) -> list[str]:
    calls = [ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call for call in calls for pattern in UNSAFE if re.match(pattern, call, re.DOTALL)]


def test_no_file_or_row_runs_code() -> None:
    folders = ("python", "kernels", "bench", "examples")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert paths and not {str(path.relative_to(ROOT)): found for path in paths if (found := unsafe(path.read_text()))}


def test_the_law_of_code_sees_what_it_forbids() -> None:
    for call in (
        "eval('1')",
        "exec(x)",
        "pickle.load(file)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "f(name, trust_remote_code=True)",
        "subprocess.run(line, shell=True)",
        "os.system(line)",
        "jinja2.Template(text)",
    ):
        assert unsafe(call), call
    for call in (
        "model.eval()",
        "torch.load(path, map_location='cpu', weights_only=True)",
        "yaml.safe_load(text)",
        "re.compile(x)",
        "layer.compile()",
        "torch.compile(f)",
        "f(name, trust_remote_code=False)",
    ):
        assert not unsafe(call), call


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
from groupdpo_kernels.integrations.trl import patch_trl
try:
    patch_trl()
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
