"""Builds the Python packages always, and the C++ extension `groupdpo_kernels._C` where it can be built.

What is missing is said in one line and the install goes on as pure Python. GROUPDPO_KERNELS_BUILD=1 makes the extension required (a missing tool or a
compiler error fails the install); GROUPDPO_KERNELS_BUILD=0 leaves it out. CMakeLists.txt owns the list of sources; this file only calls cmake.
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

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
WISH = os.environ.get("GROUPDPO_KERNELS_BUILD", "")
if WISH not in ("", "0", "1"):
    raise SystemExit(f"GROUPDPO_KERNELS_BUILD must be 0 (never build), 1 (must build) or unset; got {WISH!r}")


def say(line: str) -> None:
    print(f"groupdpo_kernels: {line}", flush=True)


def tool(name: str) -> str | None:
    """The executable beside this Python (a pip-installed one) or else on PATH."""
    return shutil.which(name, path=os.path.dirname(sys.executable)) or shutil.which(name)


def missing() -> list[str]:
    """What the extension needs and this machine lacks; empty if it can be built."""
    out = [f"no {name} (pip install {name})" for name in ("cmake", "ninja") if tool(name) is None]
    out += [f"no {name} in this Python (pip install {name})" for name in ("pybind11", "torch") if importlib.util.find_spec(name) is None]
    if out and "torch" in out[-1]:
        out[-1] = "no torch in the build environment (use --no-build-isolation)"
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        out.append("no C++ compiler")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        out.append("no Python.h (the development package of this Python)")
    return out


class CMakeBuild(build_ext):
    """Runs cmake and ninja; the extension's path is the one setuptools wants, in the source tree for an editable install."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if WISH == "1":
                raise
            say(f"without the C++ extension: its build failed ({error}); GROUPDPO_KERNELS_BUILD=1 makes this an error")
            self.extensions = []  # nothing to copy into the tree

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        cmake, ninja = tool("cmake"), tool("ninja")
        assert cmake and ninja  # `missing` has looked
        began = time.perf_counter()
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
            *("-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}"),
            *(f"-DGROUPDPO_KERNELS_VERSION={self.distribution.get_version()}", f"-DGROUPDPO_KERNELS_MODULE={target.name}"),
        ]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build)], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(build / target.name, target)
        say(f"C++ extension built in {time.perf_counter() - began:.1f} s, {target.stat().st_size / 1024:.0f} KiB")


def extensions() -> list[Extension]:
    if WISH == "0":
        say("without the C++ extension: GROUPDPO_KERNELS_BUILD=0")
        return []
    if reasons := missing():
        if WISH == "1":
            raise SystemExit("groupdpo_kernels: GROUPDPO_KERNELS_BUILD=1, but the C++ extension cannot be built: " + "; ".join(reasons))
        say("without the C++ extension: " + "; ".join(reasons))
        return []
    return [Extension("groupdpo_kernels._C", sources=[])]


setup(
    # kernels/triton holds the device code under its own roof; there is no kernels/__init__.py, which would shadow Hugging Face's `kernels` package.
    package_dir={"": "python", "groupdpo_kernels.kernels": "kernels/triton"},
    packages=[*find_packages("python"), "groupdpo_kernels.kernels"],
    ext_modules=extensions(),
    cmdclass={"build_ext": CMakeBuild},
)
