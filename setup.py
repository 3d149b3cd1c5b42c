"""Builds the Python packages always, and the C++ extension `groupdpo_kernels._C` where it can be built.

A missing build package (cmake, ninja, pybind11) beside an installed torch is an error of one line. Without a compiler,
or without torch in an isolated build, the install goes on as pure Python, which warns at its first call on a CPU.
GROUPDPO_KERNELS_BUILD=1 makes the extension required (whatever is missing, or a compiler error, fails the install);
GROUPDPO_KERNELS_BUILD=0 leaves it out. GROUPDPO_KERNELS_CUDA says the same of the extension's device code, which is
built where a CUDA compiler is found: 1 makes it, and with it the extension, required; 0 leaves it out.
GROUPDPO_KERNELS_LIMITED_API=1 makes the extension one file for Python 3.10 and later, as wheels have it, in place of
one for this Python. CMakeLists.txt owns the list of sources; this file only calls cmake.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# Before setuptools reads pyproject.toml: an older one refuses its license field, in sixty lines.
if int(setuptools.__version__.split(".")[0]) < 77:
    found = setuptools.__version__
    raise SystemExit(f"groupdpo_kernels: setuptools must be 77 or later; got {found}: pip install 'setuptools>=77'")


def wish(name: str) -> str:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} must be 0 (no), 1 (yes, or the install fails) or unset; got {value!r}")
    return value


CUDA_WISH = wish("GROUPDPO_KERNELS_CUDA")
WISH = wish("GROUPDPO_KERNELS_BUILD")
LIMITED = wish("GROUPDPO_KERNELS_LIMITED_API") == "1"
if CUDA_WISH == "1":
    if WISH == "0":
        raise SystemExit("GROUPDPO_KERNELS_CUDA=1 wants the extension that GROUPDPO_KERNELS_BUILD=0 leaves out")
    WISH = "1"


def say(line: str) -> None:
    print(f"groupdpo_kernels: {line}", flush=True)


def tool(name: str) -> str | None:
    """The executable beside this Python (a pip-installed one) or else on PATH."""
    return shutil.which(name, path=os.path.dirname(sys.executable)) or shutil.which(name)


def missing_tools() -> list[str]:
    """Packages that build the extension and are not installed."""
    out = [name for name in ("cmake", "ninja") if tool(name) is None]
    return out if LIMITED or importlib.util.find_spec("pybind11") else [*out, "pybind11"]


def missing() -> list[str]:
    """What the extension needs and this machine lacks; empty if it can be built."""
    out = [f"no {name} (pip install {name})" for name in missing_tools()]
    if importlib.util.find_spec("torch") is None:
        out.append("no torch in the build environment (install it first, then use --no-build-isolation)")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        out.append("no C++ compiler")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        out.append("no Python.h (the development package of this Python)")
    if LIMITED and sysconfig.get_config_var("Py_GIL_DISABLED"):
        out.append("no limited API in this Python (it is built without the global interpreter lock)")
    return out


def remove_other_form(folder: Path) -> None:
    """Removes what an earlier build of the other form has left: of the two, Python would take this Python's own."""
    for stale in folder.glob("_C.cpython-*.so" if LIMITED else "_C.abi3.so"):
        stale.unlink()


class CMakeBuild(build_ext):
    """Runs cmake and ninja; the file goes where setuptools wants it: into the source tree for an editable install."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if WISH == "1":
                raise
            say(f"without the C++ extension: its build failed ({error}); GROUPDPO_KERNELS_BUILD=1 makes this an error")
            self.extensions = []  # nothing to copy into the tree

    def copy_extensions_to_source(self) -> None:
        remove_other_form(ROOT / "python" / "groupdpo_kernels")
        super().copy_extensions_to_source()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        cmake, ninja = tool("cmake"), tool("ninja")
        assert cmake and ninja  # `missing` has looked
        began = time.perf_counter()
        variables = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "Python_EXECUTABLE": sys.executable,
            "GROUPDPO_KERNELS_VERSION": self.distribution.get_version(),
            "GROUPDPO_KERNELS_MODULE": target.name,
            "GROUPDPO_KERNELS_LIMITED_API": "ON" if LIMITED else "OFF",
            "GROUPDPO_KERNELS_CUDA": {"": "AUTO", "0": "OFF", "1": "ON"}[CUDA_WISH],
        }
        options = [f"-D{name}={value}" for name, value in variables.items()]
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options], check=True)
        subprocess.run([cmake, "--build", str(build)], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_other_form(target.parent)
        # By rename: overwritten in place, the file would change under a process that has it mapped.
        shutil.copyfile(build / target.name, target.with_suffix(".new"))
        target.with_suffix(".new").replace(target)
        say(f"C++ extension built in {time.perf_counter() - began:.1f} s, {target.stat().st_size / 1024:.0f} KiB")


def extensions() -> list[Extension]:
    if WISH == "0":
        say("without the C++ extension: GROUPDPO_KERNELS_BUILD=0")
        return []
    # Beside torch, so in the user's own environment: pip hides what a build says unless it fails.
    if WISH == "" and importlib.util.find_spec("torch") and (tools := missing_tools()):
        raise SystemExit(
            f"groupdpo_kernels: the C++ extension needs {', '.join(tools)}: pip install {' '.join(tools)};"
            " or install without it, slower on a CPU, by GROUPDPO_KERNELS_BUILD=0"
        )
    if reasons := missing():
        if WISH == "1":
            raise SystemExit(f"groupdpo_kernels: GROUPDPO_KERNELS_BUILD=1, but there is {'; '.join(reasons)}")
        say("without the C++ extension: " + "; ".join(reasons))
        return []
    return [Extension("groupdpo_kernels._C", sources=[], py_limited_api=LIMITED)]


setup(
    # There is no kernels/__init__.py: it would shadow Hugging Face's `kernels` package from the repository root.
    package_dir={"": "python", "groupdpo_kernels.kernels": "kernels/triton"},
    packages=[*find_packages("python"), "groupdpo_kernels.kernels"],
    ext_modules=extensions(),
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED else {},
    cmdclass={"build_ext": CMakeBuild},
)
