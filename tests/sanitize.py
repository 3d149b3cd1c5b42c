"""The C++ op under AddressSanitizer with UndefinedBehaviorSanitizer, then under ThreadSanitizer: `make sanitize`.

For both: a build apart from the normal one, in build/sanitize/, whose module a folder of links puts in the place of the
normal one; the tests of TESTS, with the sanitizer's runtime loaded before Python; no report may be written. Then the
same with one fault planted in the source at a time: there must be a report that names the planted line's file.
What a sanitizer cannot see by itself, csrc/cpu/sanitize.h tells it. Wants GCC on Linux.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "groupdpo_kernels"

# The sanitizers' runtimes, and the C++ library, which they look for before Python loads it.
RUNTIME = {"address": ("libasan.so", "libubsan.so", "libstdc++.so.6"), "thread": ("libtsan.so", "libstdc++.so.6")}
OPTIONS = {
    # Python and torch keep what they have until the process ends.
    "address": {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
    # memcpy and the like are watched where our code calls them: torch's threads are joined in a way that is not seen.
    "thread": {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1"},
}
# A file that names lines also names what headers inline; under AddressSanitizer the gaps of scratch come on top of
# what it is bounded by.
BUT = {"address": "not stable_abi and not workspace_is_bounded", "thread": "not stable_abi"}
# The op through its schema, in all CASES; its other forms (sparse, frozen, cached); on 1, 2 and 5 threads.
TESTS = (
    ("tests/test_csrc.py", ""),
    ("tests/test_threads.py", "(many and 3) or test_bfloat16 or (entropy and few)"),
    (
        "tests/test_frozen_head.py tests/test_logit_cache.py tests/test_sparse.py tests/test_sparse_tail.py",
        "not triton and not opcheck and not reference",
    ),
    ("tests/test_numerics.py", "a_slice and head and cpu"),
)


class Planted(NamedTuple):
    what: str
    kind: str
    file: str
    source: str  # once in the file
    fault: str  # in its place
    tests: str
    chosen: str


THREADS = "tests/test_threads.py"
CSRC = "tests/test_csrc.py"
PLANTED = (
    Planted(
        "a thread's sums are everybody's",
        "thread",
        "csrc/cpu/weighted_rows.cpp",
        "    std::vector<float> sums(n);\n",
        "    static std::vector<float> sums(65536);\n",
        THREADS,
        "test_within_a_tolerance and sparse and many-3 and not frozen",
    ),
    Planted(
        "the library's results go to one place of the scratch in all threads",
        "thread",
        "csrc/cpu/frozen_head.cpp",
        "const Slice sums = partial.take(begin, begin + count, std::max(D, R));",
        "const Matrix sums = partial.all(count, std::max(D, R));",
        THREADS,
        "test_within_a_tolerance and frozen and many-3",
    ),
    Planted(
        "threads add to one sum of columns",
        "thread",
        "csrc/cpu/linear_logps_backward.cpp",
        "add_column_sums(column_sums.data() + begin,",
        "add_column_sums(column_sums.data(),",
        THREADS,
        "test_exact and recomputed and many-3",
    ),
    Planted(
        "one entry more than a row has room for",
        "address",
        "csrc/cpu/sparse_forward.cpp",
        "if (state.count == kRoom * most_) {",
        "if (state.count > kRoom * most_) {",
        "tests/test_sparse.py",
        "cpu",
    ),
    Planted(
        "a column more than the block has",
        "address",
        "csrc/cpu/linear_logps_forward.cpp",
        "to_logits(z.row(i - first), blocks.bias, columns, map);",
        "to_logits(z.row(i - first), nullptr, columns + 1, map);",
        CSRC,
        "error_budget and everything",
    ),
    Planted(
        "the library writes a row too many",
        "address",
        "csrc/cpu/block.cpp",
        "const Matrix here = out.take(i, height)",
        "const Matrix here = out.take(i + 1, height)",
        CSRC,
        "statistics_are_empty",
    ),
    Planted(
        "an index past the end of an array",
        "address",
        "csrc/cpu/tail.h",
        "ids[k] = draws_[k].id;",
        "ids[k] = draws_[k + 1].id;",
        "tests/test_sparse_tail.py",
        "cpu",
    ),
    Planted(
        "a number that its type cannot hold",
        "address",
        "csrc/cpu/linear_logps_forward.cpp",
        "is_top1.mutable_data_ptr<bool>()[t0 + i] = top_index == target[t0 + i];",
        "is_top1.mutable_data_ptr<bool>()[t0 + i] = top_index * (INT64_MAX / 2) == target[t0 + i];",
        CSRC,
        "plain",
    ),
)


def write(path: Path, text: str) -> None:
    """Only what changes, so that only that is compiled."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def build(kind: str, fault: Planted | None = None) -> Path:
    """A folder for PYTHONPATH, with the package and the module of this build."""
    folder = ROOT / "build" / "sanitize" / kind
    for path in (ROOT / "CMakeLists.txt", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())):
        text, name = path.read_text(), str(path.relative_to(ROOT))
        if fault and name == fault.file:
            if text.count(fault.source) != 1:
                raise SystemExit(f"{name} must have this once, to plant a fault there: {fault.source!r}")
            text = text.replace(fault.source, fault.fault)
        write(folder / "source" / name, text)
    cmake = shutil.which("cmake", path=os.path.dirname(sys.executable)) or "cmake"
    variables = {
        "Python_EXECUTABLE": sys.executable,
        "GROUPDPO_KERNELS_VERSION": "0.1.0",
        "GROUPDPO_KERNELS_CUDA": "OFF",
        "GROUPDPO_KERNELS_SANITIZE": kind,
    }
    options = [f"-D{name}={value}" for name, value in variables.items()]
    quiet = {"stdout": subprocess.DEVNULL, "check": True}
    subprocess.run([cmake, "-S", folder / "source", "-B", folder / "build", "-G", "Ninja", *options], **quiet)
    subprocess.run([cmake, "--build", folder / "build"], **quiet)
    package = folder / "site" / "groupdpo_kernels"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for path in PACKAGE.iterdir():
        if path.suffix != ".so" and path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    (package / "kernels").symlink_to(ROOT / "kernels" / "triton")
    (package / "_C.so").symlink_to(folder / "build" / "_C.so")
    return folder / "site"


def library(name: str) -> str:
    return subprocess.run(
        ["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def run(kind: str, site: Path, tests: str, chosen: str) -> tuple[int, str]:
    """pytest's exit status, and what the sanitizer has reported."""
    reports = site.parent / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir()
    environment = os.environ | {
        "PYTHONPATH": str(site),
        "LD_PRELOAD": " ".join(map(library, RUNTIME[kind])),
        **{name: f"{options}:log_path={reports}/report" for name, options in OPTIONS[kind].items()},
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", "not gpu"]
    command += ["--capture=sys"]  # not of file descriptors: see below
    fixed = ["setarch", "-R"] if kind == "thread" else []  # its maps of memory want addresses where they are expected
    with (reports.parent / "stderr").open("w+") as stderr:
        done = subprocess.run(
            [*fixed, *command, *tests.split(), "-k", chosen], cwd=ROOT, env=environment, stderr=stderr
        )
        stderr.seek(0)
        # GCC's runtime for undefined behaviour takes no log_path beside that for addresses.
        found = [line for line in stderr if "runtime error:" in line]
    return done.returncode, "".join([*found, *(path.read_text() for path in sorted(reports.iterdir()))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(RUNTIME), metavar="address | thread")
    parser.add_argument("--planted", action="store_true", help="the planted faults alone")
    arguments = parser.parse_args()
    failed = []
    for kind in arguments.kinds:
        if not arguments.planted:
            site = build(kind)
            for tests, chosen in TESTS:
                began = time.perf_counter()
                both = f"({chosen}) and {BUT[kind]}" if chosen else BUT[kind]
                status, found = run(kind, site, tests, both)
                print(
                    f"{kind}: {tests}: {time.perf_counter() - began:.0f} s, {len(found)} bytes of reports", flush=True
                )
                if status or found:
                    print(found)
                    failed.append(f"{kind}: {tests}")
        for fault in (fault for fault in PLANTED if fault.kind == kind):
            _, found = run(kind, build(kind, fault), fault.tests, fault.chosen)
            seen = Path(fault.file).name in found
            print(f"{kind}: planted, {fault.what}: {'found' if seen else 'NOT FOUND'}", flush=True)
            if not seen:
                print(found)
                failed.append(f"{kind}: {fault.what}")
    if failed:
        raise SystemExit("\n".join(["failed:", *failed]))


if __name__ == "__main__":
    main()
