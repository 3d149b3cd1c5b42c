"""What an install gives: the packages where they belong, typed, with torch as the one requirement, and without a C++
extension, said in one line, where it cannot be built. Wheels are built from a copy of the tree, offline."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

import groupdpo_kernels
from groupdpo_kernels.checks import NO_TRITON

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    "python",
    "kernels",
    "csrc",
    "CMakeLists.txt",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "pyproject.toml",
    "setup.py",
)


def python(code: str, cwd: Path, path: tuple[Path, ...] = (), *flags: str) -> str:
    """The output of `code` in a fresh interpreter started in `cwd`, with `path` in front of what is installed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wheel(tmp_path: Path, **variables: str) -> tuple[subprocess.CompletedProcess[str], Path | None]:
    """`pip wheel` over a copy of the sources; its log, and the wheel if there is one."""
    tree = tmp_path / "tree"
    skip = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=skip)
        else:
            tree.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    options = ("-v", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(tmp_path))
    environment = {name: value for name, value in os.environ.items() if name != "GROUPDPO_KERNELS_BUILD"} | variables
    command = [sys.executable, "-m", "pip", "wheel", *options, str(tree)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done, next(tmp_path.glob("*.whl"), None)


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What setup.py says about the extension, once for each time that pip runs it."""
    return re.findall(r"groupdpo_kernels: (.*)", done.stdout)


@pytest.mark.parametrize("cwd", [Path("/"), ROOT], ids=["elsewhere", "repository root"])
def test_imports_from_anywhere(cwd: Path) -> None:
    code = "import groupdpo_kernels as g, groupdpo_kernels.kernels as k; print(g.__file__, k.__file__)"
    package, kernels = python(code, cwd).split()
    assert Path(package).parent.name == "groupdpo_kernels"
    assert Path(kernels).is_file()


def test_the_kernels_folder_shadows_nobody(tmp_path: Path) -> None:
    """From the repository root `import kernels` must reach Hugging Face's package of that name, which transformers and
    TRL import, and `import triton` must reach Triton."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("origin = 'installed'\n")
    assert python("import kernels; print(kernels.origin)", ROOT, (ROOT, tmp_path)) == "installed"
    assert ROOT / "kernels" not in Path(python("import triton; print(triton.__file__)", ROOT, (ROOT,))).parents
    assert python("from transformers import LlamaConfig; print(LlamaConfig().model_type)", ROOT, (ROOT,)) == "llama"


def test_torch_is_the_one_requirement() -> None:
    requirements = importlib.metadata.requires("groupdpo-kernels") or []
    assert [r for r in requirements if "extra ==" not in r] == ["torch>=2.11"]
    assert importlib.metadata.version("groupdpo-kernels") == groupdpo_kernels.__version__
    build_system = re.search(
        r"\[build-system\].*?^requires = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S | re.M
    )
    assert build_system is not None and "torch" not in build_system[1]  # an isolated build would download it again


def test_versions_agree() -> None:
    """The citation and the newest heading of the changelog are of the version that is built."""
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    changelog = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert citation and changelog and citation[1] == changelog[1] == groupdpo_kernels.__version__


def test_a_commit_is_checked_as_make_lint_does() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    called = [hook["entry"].removeprefix(".venv/bin/python ").replace(" --force-exclude", "") for hook in hooks]
    dry = subprocess.run(["make", "--dry-run", "lint"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    linted = re.findall(r"^\.venv/bin/python (-m (?:ruff|mypy).*?)(?: \.)?$", dry, re.M)
    assert called == linted


def test_workflows_call_what_is_there() -> None:
    """Targets of the Makefile, files of this repository; each job has a limit."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    paths = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert {path.stem for path in paths} == {"ci", "docs", "release", "wheels"}
    for path in paths:
        assert set(re.findall(r"run: make ([\w-]+)", path.read_text())) <= targets
        for used in re.findall(r"uses: \./(\S+)", path.read_text()):
            assert (ROOT / used).is_file() or (ROOT / used / "action.yml").is_file()
        for name, job in yaml.safe_load(path.read_text())["jobs"].items():
            assert "uses" in job or job["timeout-minutes"] <= 60, name


def test_the_command_line_is_an_extra() -> None:
    """`pip install 'groupdpo-kernels[cli]'` brings all that the commands import, and the script that runs them."""
    distribution = importlib.metadata.distribution("groupdpo-kernels")
    (script,) = distribution.entry_points.select(group="console_scripts")
    assert (script.name, script.value) == ("groupdpo-kernels", "groupdpo_kernels.cli:main")
    assert callable(script.load()) and "cli" in distribution.metadata.get_all("Provides-Extra", [])
    wanted = {r.split(";")[0].strip() for r in distribution.requires or [] if 'extra == "cli"' in r}
    assert wanted == {"groupdpo-kernels[hf]", "accelerate", "matplotlib", "rich", "tomli", "tqdm", "typer"}
    tomli = next(r for r in distribution.requires or [] if r.startswith("tomli"))
    assert 'python_version < "3.11"' in tomli  # later ones have tomllib
    imported = {
        name
        for path in (ROOT / "python" / "groupdpo_kernels" / "cli").glob("*.py")
        for name in re.findall(r"^\s*(?:from|import) ([a-z]\w*)", path.read_text(), re.M)
    }
    assert imported - set(sys.stdlib_module_names) == {"matplotlib", "peft", "rich", "torch", "transformers", "typer"}


def test_the_range_of_triton_is_said_as_it_is() -> None:
    (asked,) = re.findall(r'^triton = \["(.*)"\]$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert f"`pip install '{asked}'`" in NO_TRITON


def test_cmake_lists_every_source() -> None:
    listed = set(re.findall(r"^\s+(csrc/\S+\.(?:cpp|cu))$", (ROOT / "CMakeLists.txt").read_text(), re.M))
    present = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu")}
    assert listed == present


def test_pure_python_wheel(tmp_path: Path) -> None:
    """No compiler: the install goes on, says why, and what it installs works."""
    nowhere = tmp_path / "bin"
    nowhere.mkdir()
    done, found = wheel(tmp_path, PATH=str(nowhere), CXX="")
    assert done.returncode == 0 and found is not None, done.stdout
    assert said(done) and all("without the C++ extension: no C++ compiler" in line for line in said(done))

    with zipfile.ZipFile(found) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {
        "groupdpo_kernels/py.typed",
        "groupdpo_kernels/__init__.py",
        "groupdpo_kernels/kernels/__init__.py",
    } <= names
    assert any(name.endswith("dist-info/entry_points.txt") for name in names)
    for source in (*(ROOT / "python" / "groupdpo_kernels").rglob("*.py"), *(ROOT / "kernels" / "triton").rglob("*.py")):
        folder = ROOT / "python" if ROOT / "python" in source.parents else ROOT / "kernels" / "triton"
        prefix = "" if folder.name == "python" else "groupdpo_kernels/kernels/"
        assert prefix + source.relative_to(folder).as_posix() in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.endswith(".so") or name.startswith(("kernels/", "triton/", "tests/"))]

    code = """if True:
        import torch, groupdpo_kernels as g, groupdpo_kernels.kernels
        hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
        targets = torch.tensor([0, 4, 2])
        assert g.explain(hidden, weight, targets).impl == "reference"
        expected = torch.log_softmax(hidden @ weight.T, -1)[range(3), targets]
        torch.testing.assert_close(g.linear_logps(hidden, weight, targets), expected)
        print(g.__file__)
    """
    # -S: the .pth file of an editable install would lead to the extension in the source tree.
    path = (tmp_path / "site", Path(torch.__file__).parents[1])
    assert tmp_path / "site" in Path(python(code, Path("/"), path, "-S")).parents


def test_required_extension_fails_the_install(tmp_path: Path) -> None:
    done, found = wheel(tmp_path, PATH=str(tmp_path), CXX="", GROUPDPO_KERNELS_BUILD="1")
    assert done.returncode != 0 and found is None
    assert "GROUPDPO_KERNELS_BUILD=1, but there is no C++ compiler" in done.stdout


def test_a_failing_compiler_fails_only_a_required_extension(tmp_path: Path) -> None:
    done, found = wheel(tmp_path, CXX="false")
    assert done.returncode == 0 and found is not None, done.stdout
    assert "without the C++ extension: its build failed" in said(done)[-1]
    with zipfile.ZipFile(found) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
    (tmp_path / "required").mkdir()
    done, found = wheel(tmp_path / "required", CXX="false", GROUPDPO_KERNELS_BUILD="1")
    assert done.returncode != 0 and found is None


def test_a_wheel_holds_one_module_and_leaves_the_checkouts_own(tmp_path: Path) -> None:
    """Of two modules Python would take that of its own version, and not the one of the limited API."""
    tree, tools = tmp_path / "tree", tmp_path / "bin"
    tools.mkdir()
    fake = (
        "#!/bin/sh\n"  # configures, then builds an empty module of the name that it is told
        'if [ "$1" = --build ]; then touch "$2/$(cat "$2/name")"; exit; fi\n'
        'mkdir -p "$4"; for x; do case "$x" in *_MODULE=*) echo "${x#*=}" > "$4/name";; esac; done\n'
    )
    for name in ("cmake", "ninja"):
        (tools / name).write_text(fake)
        (tools / name).chmod(0o755)
    skip = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("python", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=skip)
    for name in ("README.md", "LICENSE", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tree / name)
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "GROUPDPO_KERNELS_BUILD": "1"}
    environment.pop("GROUPDPO_KERNELS_LIMITED_API", None)

    def setup(command: str, *options: str, **variables: str) -> None:
        # setup.py would take tools beside this Python first.
        argv = f"sys.executable, sys.argv = {str(tools / 'python')!r}, {['setup.py', '-q', command, *options]}"
        line = [sys.executable, "-c", f"import runpy, sys; {argv}; runpy.run_path('setup.py', run_name='__main__')"]
        done = subprocess.run(line, cwd=tree, env=environment | variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def modules() -> list[Path]:
        return sorted((tree / "python" / "groupdpo_kernels").glob("_C.*"))

    setup("build_ext", "--inplace")
    (own,) = modules()
    setup("bdist_wheel", "-d", str(tmp_path / "one"))
    setup("bdist_wheel", "-d", str(tmp_path / "limited"), GROUPDPO_KERNELS_LIMITED_API="1")
    for folder, name in (("one", own.name), ("limited", "_C.abi3.so")):
        (made,) = (tmp_path / folder).glob("*.whl")
        with zipfile.ZipFile(made) as archive:
            assert [Path(x).name for x in archive.namelist() if x.endswith(".so")] == [name]
    assert modules() == [own]
    setup("build_ext", "--inplace", GROUPDPO_KERNELS_LIMITED_API="1")
    assert [path.name for path in modules()] == ["_C.abi3.so"]


def test_device_target_needs_no_environment_of_ours() -> None:
    """`make device` runs on a GPU machine with the Python that is there: no .venv, no download, figures after tests."""
    dry = ["make", "--dry-run", "device", "PYTHON=/usr/bin/some-python"]
    lines = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ".venv" not in lines
    assert "--no-deps" in lines
    assert lines.index("pip install") < lines.index("pytest -m gpu") < lines.index("bench/run.py --results")


def test_figures_are_measured_whatever_the_tests_say(tmp_path: Path) -> None:
    """Every command of every device target writes under RESULTS; a red test is the exit status, not the end."""
    called = tmp_path / "called"
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {called}\ncase "$*" in *"-m pytest"*) exit 3;; *"pip install"*)'
                    ' echo "groupdpo_kernels: built";; esac\n')  # fmt: skip
    for tool in ("ncu", "compute-sanitizer"):
        (tmp_path / tool).write_text(f'#!/bin/sh\necho {tool} "$@" >> {called}\n')
        (tmp_path / tool).chmod(0o755)
    fake.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    tree = tmp_path / "tree"
    tree.mkdir()
    shutil.copy(ROOT / "Makefile", tree)
    results = tmp_path / "elsewhere" / "here"
    figures = {"device": 1, "device-losses": 2, "device-memory": 1, "device-steps": 1, "device-counters": 3}
    for target, count in figures.items():
        called.write_text("")
        command = ["make", target, f"PYTHON={fake}", f"RESULTS={results}"]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        tested = target in ("device", "device-memory")
        assert (done.returncode != 0) == tested, done.stderr
        lines = called.read_text().splitlines()
        assert sum("-m pytest" in line for line in lines) == (tested or target == "device-counters")
        measured = [line for line in lines if "bench/" in line or "cli profile" in line]
        assert len(measured) == count and all(str(results) in line for line in measured), lines
        assert results.is_dir()


def test_extras_that_name_each_other_exist() -> None:
    extras = set(importlib.metadata.metadata("groupdpo-kernels").get_all("Provides-Extra") or ())
    text = (ROOT / "pyproject.toml").read_text()
    named = {name for group in re.findall(r"groupdpo-kernels\[([\w,-]+)\]", text) for name in group.split(",")}
    assert named and named <= extras | {"dev"}


def test_an_old_setuptools_is_refused_in_one_line(tmp_path: Path) -> None:
    package = tmp_path / "setuptools"
    (package / "command").mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '65.5.0'\nExtension = find_packages = setup = print\n")
    (package / "command" / "__init__.py").touch()
    (package / "command" / "build_ext.py").write_text("build_ext = object\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    expected = "groupdpo_kernels: setuptools must be 77 or later; got 65.5.0: pip install 'setuptools>=77'\n"
    assert done.stderr == expected


def test_a_missing_build_package_is_an_error_of_one_line() -> None:
    """pip hides what a build prints unless it fails: a pure-Python install would come without a word."""
    hidden = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n: None if n == 'pybind11' else f(n)"
    program = f"import runpy, sys; {hidden}; sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py')"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GROUPDPO_KERNELS")}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "needs pybind11: pip install pybind11; or install without it" in done.stderr
    done = subprocess.run(
        command, cwd=ROOT, env=environment | {"GROUPDPO_KERNELS_BUILD": "0"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_first_slow_call_says_what_is_missing() -> None:
    """Once, on a CPU, where nothing but the C++ extension is missing; the numbers are right all the same."""
    program = """
import sys, warnings
sys.modules["groupdpo_kernels._C"] = None  # as if it had not been built
import torch
from groupdpo_kernels import linear_logps
def call(dtype):
    hidden, weight = torch.randn(3, 4, dtype=dtype), torch.randn(5, 4, dtype=dtype)
    return linear_logps(hidden, weight, torch.tensor([0, 4, 1]))
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    call(torch.float64)
    print(len(seen))
    assert call(torch.float32).isfinite().all()
    call(torch.float32)
    print(len(seen), seen[0].category.__name__, "several times slower" in str(seen[0].message))
"""
    assert python(program, ROOT).split() == ["0", "1", "RuntimeWarning", "True"]
