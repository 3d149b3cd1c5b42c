"""The benchmark: it runs, its gate tells wrong from right, its memory figures are true, a killed run keeps its rows."""

import argparse
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import Script, forked, run_script

from bench import (
    entropy,
    first,
    launches,
    memory,
    preference,
    scaling,
    shared_prompt,
    shared_prompt_pictures,
    trl_steps,
)
from bench import run as bench_run
from bench.measure import Differentiated, Gate, draw
from bench.peers import PEERS, Unavailable, load_peer, maker
from bench.report import directory, title
from groupdpo_kernels import seq_logps
from groupdpo_kernels.kernels.launch import TABLE
from groupdpo_kernels.testing import Case

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
CASE = Case("test", 48, 32, 300, "small", softcap=5.0)


def load(path):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def quick(path, *more):
    return [
        "bench/run.py",
        "--quick",
        "--device",
        "cpu",
        "--impl",
        "reference",
        "--json",
        str(path),
        *more,
    ]


@pytest.fixture
def command(monkeypatch, capsys):
    """A script of bench with a command line, in this process, which has imported what it needs; what it prints."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        code = script.main()
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    return run


def test_quick_run(tmp_path):
    path = tmp_path / "run.json"
    done = run_script(*quick(path), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    run = load(path)
    assert (
        run["complete"]
        and run["versions"]["torch"]
        and run["date"]
        and run["command"].startswith("python bench/run.py")
    )
    rows = {(r["mode"], r["implementation"]): r for r in run["rows"]}
    assert rows.keys() == {
        (m, i) for m in ("forward", "trained", "frozen") for i in ("matrix products", "ours/reference", "eager")
    }
    for (mode, name), row in rows.items():
        assert row["status"] == "ok" and row["rounds"] == 3
        assert (
            row["forward_ms"]["median"] > 0
            and row["both_ms"]["q25"] <= row["both_ms"]["median"] <= row["both_ms"]["q75"]
        )
        if name == "matrix products":
            assert row["ratio"]["median"] == 1
        else:
            gated = {"forward": {"token_logps"}, "frozen": {"token_logps", "d_hidden"}}
            assert row["error"].keys() == gated.get(mode, {"token_logps", "d_hidden", "d_weight"})
            assert all(e <= row["error_budget"][k] for k, e in row["error"].items())
    assert "| ours/reference |" in done.stdout


def test_steps_of_trl_beside_ours(tmp_path, command):
    """In processes of their own: one that is forked may hold what a step this small needs before it begins."""
    path = tmp_path / "steps.json"
    size = ["--model", "tiny", "--tokens", "16", "--groups", "1", "--size", "3", "--pairs", "1", "--steps", "3"]
    more = ("--device", "cpu", "--rounds", "1", "--rows", "pairs", "--dtype", "float32", "--json", path)
    printed = command(trl_steps, *more, *size)
    run = load(path)
    trl, accelerated = run["rows"]
    assert run["complete"] and (trl["implementation"], accelerated["implementation"]) == ("trl", "trl, accelerated")
    assert all(len(row["seconds"]) == 3 and row["mib"] > 0 for row in run["rows"])
    assert trl["loss"] == pytest.approx(accelerated["loss"], rel=1e-5)
    assert "| pairs | trl, accelerated |" in printed


def test_a_step_that_fails_is_a_row(monkeypatch):
    monkeypatch.setattr(trl_steps, "subprocess", SimpleNamespace(run=forked))
    setting = trl_steps.Setting("cpu", "no such model", 100, "float32", 16, 1, 2, 1, 3)
    run = trl_steps.measure("pairs", "trl", setting)
    assert run["status"] == "failed" and "no such model" in run["why"]
    rows = [{"row": "pairs", "implementation": "trl"} | run]
    assert f"| pairs | trl | {run['why']} | | |" in trl_steps.table(["pairs"], setting, rows)


def test_quick_run_of_a_shared_prompt(tmp_path, command):
    """Every row but memory; and its pictures."""
    path = tmp_path / "shared.json"
    names = ["long", "short", "trl", "scoring"]
    printed = command(shared_prompt, "--quick", "--rows", *names, "--json", path)
    run = load(path)
    assert run["complete"] and run["commit"] and run["versions"]["transformers"]
    rows = {row["row"]: row for row in run["rows"]}
    assert [*rows] == names
    for name, row in rows.items():
        assert row["status"] == "ok" and row["rounds"] == 2 and row["error"] <= row["error_budget"] == 1e-4
        assert row["ratio"]["median"] > 0 and row["shared"] == (name != "short")
        assert f"| {name}" in printed and row["weights"] == "random weights"
    assert rows["trl"]["sizes"] == {"unshared": 3, "shared": 2}
    assert "not shared, since that saves too little" in printed
    command(shared_prompt_pictures, path, "--out", tmp_path / "pictures", "--theme", "dark")
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == {"shared_prompt.png", "shared_prompt_tokens.png"}


def test_the_gate_of_a_shared_prompt(monkeypatch):
    """No figure where a gradient or a log-probability is wrong, missing or not a number."""
    right = {"values": torch.tensor([-970.0, -971.0]), "weight": torch.randn(3, 4)}
    assert shared_prompt.gap(right, right) == 0
    for name, wrong in right.items():
        assert shared_prompt.gap(right | {name: wrong * (1 + 3e-4)}, right) > shared_prompt.ALLOWED
        assert shared_prompt.gap(right | {name: wrong * torch.nan}, right) == float("inf")
    assert shared_prompt.gap({"values": right["values"]}, right) == float("inf")
    monkeypatch.setattr(shared_prompt, "ALLOWED", 0.0)
    case = shared_prompt.tiny(next(case for case in shared_prompt.CASES if case.name == "long"))
    report = shared_prompt.Report({}, None)
    shared_prompt.measure(case, argparse.Namespace(smollm2=None, rounds=1, threads=1), report)
    (row,) = report.rows
    assert row["status"] == "red" and "ratio" not in row and "differ by" in shared_prompt.table(report.rows)


def test_memory_of_a_shared_prompt():
    """In this process: the figures that a fresh one prints."""
    case = shared_prompt.tiny(next(case for case in shared_prompt.CASES if case.kind == "memory"))
    few, many = (shared_prompt.memory_here(replace(case, P=256, G=G)) for G in (2, 16))
    assert 0 < few["allocator_extra_mib"] <= many["allocator_extra_mib"] < 1.1 * few["allocator_extra_mib"]


def test_an_interrupted_run_prints_its_rows(tmp_path):
    path = tmp_path / "shared.json"
    script = ["bench/shared_prompt.py", "--quick", "--rows", "long", "scoring", "--rounds", "1000000"]
    with Script(*script, "--json", path, cwd=ROOT) as process:
        process.until(lambda: path.exists() and bool(rows := load(path)["rows"]) and rows[0]["status"] == "ok")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130 and "| long | tiny, V = 500 |" in process.stdout.read_text()
    run = load(path)
    assert not run["complete"] and run["rows"][0]["ratio"]["median"] > 0


def test_launch_shapes_are_all_different_and_want_a_gpu(monkeypatch, capsys):
    shapes = [replace(TABLE["sm_90", 2], **change) for change in launches.CHANGES]
    assert len(set(shapes)) == len({launches.name_of(shape) for shape in shapes}) == len(shapes)
    assert all(shape.tma or not shape.persistent for shape in shapes)
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["bench/launches.py"])
        with pytest.raises(SystemExit) as ended:
            launches.main()
        assert ended.value.code == 2 and "timed on a GPU" in capsys.readouterr().err


def test_quick_run_of_the_preference_weights(tmp_path):
    path = tmp_path / "some" / "where.json"
    done = run_script("bench/preference.py", "--quick", "--device", "cpu", "--json", path, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    run = load(path)
    assert run["complete"] and run["command"].startswith("python bench/preference.py")
    rows = {(r["loss"], r["groups"], r["size"], r["implementation"]): r for r in run["rows"]}
    cases = {("sigmoid", 8, 2), ("AdaDPO", 8, 2), ("mpo", 8, 2), ("mpo", 8, 8), ("mpo", 8, 16)}
    assert rows.keys() == {(*case, name) for case in cases for name in ("eager",)}
    for row in rows.values():
        assert row["status"] == "ok" and row["rounds"] == 3 and row["both_ms"]["median"] > 0
        assert row["error"].keys() == {"losses", "rewards", "d_token_logps"}
        assert all(e <= row["error_budget"][k] for k, e in row["error"].items())
    for case in cases:
        eager = rows[(*case, "eager")]
        assert eager["launches"] > 0 and eager["extra_mib"] >= 0
        assert f"| {case[0]} | {case[1]} | {case[2]} | {eager['tokens']:,} |" in done.stdout


def test_quick_run_with_a_tolerance(tmp_path, command):
    """A row with a tolerance has a gate of its own, and says what its rows are like."""
    path = tmp_path / "run.json"
    more = ("--profile", "confident", "--grad-tol", "0.0078125", "--peers", "--modes", "trained", "--dtype", "bfloat16")
    command(bench_run, *quick(path, *more)[1:])
    _, exact, sparse, *_ = load(path)["rows"]
    assert sparse["implementation"] == "ours/reference grad_tol=0.0078125" and sparse["status"] == "ok"
    assert exact.keys() < sparse.keys() and 0 <= sparse["exact_rows"] <= 1 < sparse["candidates"]
    assert abs(sparse["entropy"] - 0.4) < 0.1 and exact["error"]["d_weight"] != sparse["error"]["d_weight"]


def test_the_gate_of_a_tolerance():
    """It lets through what the bound allows, and no gradient that is wrong."""
    inputs = draw(CASE, CPU, profile="confident")
    gate = Gate(CASE, inputs)

    def complaints(function):
        step = Differentiated(function, inputs, "trained")
        out = step.forward()
        return gate.check(out, step.backward(out), 2**-7)[1]

    assert not complaints(maker("ours/reference grad_tol=0.0078125")(CASE, CPU))
    assert complaints(lambda *x: UniformUpstream.apply(maker("ours/reference")(CASE, CPU)(*x)))


def test_scaling(tmp_path):
    point = scaling.measure(CASE, 1)
    assert point.keys() == set(scaling.NAMES) and all(ms > 0 for ms, _ in point.values())
    scaling.draw_picture({"tokens": {64: point, 128: point}, "vocabulary": {9: point}}, "t", tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_the_cost_of_the_entropys_gradient(command):
    printed = command(entropy, "--T", 9, "--D", 16, "--V", 40, "--rounds", 2)
    assert printed.count("ours") == 3 and printed.count("TRL") == 3


def test_killed_run_keeps_its_rows(tmp_path):
    path = tmp_path / "run.json"
    with Script(*quick(path, "--rounds", "1000000"), cwd=ROOT) as process:
        process.until(lambda: path.exists() and load(path)["rows"][-1]["status"] == "ok")
        process.kill()
        assert process.wait() == -signal.SIGKILL
    run = load(path)
    assert not run["complete"]
    assert [r["status"] for r in run["rows"]] == ["ok"] * 3


class UniformUpstream(torch.autograd.Function):
    """A kernel that is right in every test with a uniform upstream gradient."""

    @staticmethod
    def forward(ctx, logps):
        return logps.clone()

    @staticmethod
    def backward(ctx, d_logps):
        return d_logps.mean().expand_as(d_logps)


def verdict(function, mode="trained", case=CASE):
    inputs = draw(case, CPU)
    step = Differentiated(function, inputs, mode)
    out = step.forward()
    return Gate(case, inputs).check(out, step.backward(out))[1]


def test_rows_of_a_profile():
    """Other rows than the random ones; the table says which."""
    random, trained = draw(CASE, CPU), draw(CASE, CPU, profile="trained")
    assert [x.shape for x in vars(random).values()] == [x.shape for x in vars(trained).values()]
    assert not torch.equal(random.weight, trained.weight) and trained.d_token_logps.unique().numel() == CASE.T
    assert title(CASE) + ", trained rows" == title(CASE, "trained")


@pytest.mark.parametrize("mode", ["forward", "trained", "frozen"])
def test_gate_passes_the_right(mode):
    for dtype in (torch.float32, torch.bfloat16):
        case = Case("test", 48, 32, 300, "small", softcap=5.0, dtype=dtype)
        for name in ("ours/reference", "eager"):
            assert not verdict(maker(name)(case, CPU), mode, case)


def test_gate_stops_the_wrong():
    right = maker("eager")(CASE, CPU)
    complaints = verdict(lambda h, w, y: UniformUpstream.apply(right(h, w, y)))
    assert [c.split()[0] for c in complaints] == ["d_hidden", "d_weight"]
    assert verdict(lambda h, w, y: right(h, w, y).bfloat16())
    assert verdict(lambda h, w, y: right(h, w.detach() * 1.001, y), "forward")
    no_cap = maker("eager")(Case("test", 48, 32, 300, "small"), CPU)
    assert verdict(no_cap, "forward")
    nan = verdict(lambda h, w, y: torch.cat([right(h, w, y)[:-1], torch.full((1,), torch.nan)]), "forward")
    assert any("not finite" in c for c in nan)


@pytest.mark.parametrize("loss", list(preference.OBJECTIVES))
def test_gate_of_the_preference_weights(loss):
    inputs, objective = preference.draw(5, 2, CPU), preference.OBJECTIVES[loss]
    gate, right = preference.Gate(inputs, objective), preference.Weights(inputs, objective, "reference").values()
    assert not gate.check(right)[1]
    for name, value in right.items():
        for wrong in (value * 1.001, value.index_fill(0, torch.tensor(3), torch.nan)):
            assert [c.split()[0] for c in gate.check(right | {name: wrong})[1]] == [name]
    unused = preference.Weights(inputs, objective, "reference")
    unused.d_loss.fill_(1.0)  # an upstream gradient that is not used
    assert [c.split()[0] for c in gate.check(unused.values())[1]] == ["d_token_logps"]


def test_drawn_preference_groups():
    """Ragged, each with both sides, within the tokens allowed; the reference is not the policy."""
    small, large = (preference.draw(G, 16, CPU) for G in (8, 10000))
    lengths = small.cu_seqlens.diff()
    assert lengths.min() >= 64 and lengths.max() <= 512 and lengths.unique().numel() > 64
    assert 0.9 * preference.MOST_TOKENS < large.token_logps.shape[0] <= preference.MOST_TOKENS
    positives = large.groups.positive.view(-1, 16).sum(1)
    assert positives.unique().tolist() == list(range(1, 16))
    assert not torch.equal(small.ref_logps, seq_logps(small.token_logps, small.cu_seqlens))


def test_memory_is_what_was_allocated():
    """Eager without a graph holds the logits and their log-softmax: 2 x 64 MiB."""
    figures = memory.on_cpu(Case("test", 1024, 64, 16384, "64 MiB of logits"), "eager", "forward")
    assert abs(figures["allocator_extra_mib"] - 128) < 2
    # Resident memory also has the buffers of the matrix library.
    assert 124 < figures["extra_mib"] < 128 + 48
    assert figures["extra_mib"] == figures["peak_mib"]


def test_memory_excludes_gradients():
    """Bounded memory: gradients of 32 MiB and a smaller workspace."""
    case = Case("test", 64, 512, 16384, "a gradient of 32 MiB", workspace_bytes=2**24)
    figures = memory.on_cpu(case, "ours/reference", "trained")
    assert figures["peak_mib"] - figures["extra_mib"] == pytest.approx(32 + 0.125, abs=0.2)
    assert figures["extra_mib"] < 32


def test_unavailable_peers_say_why():
    with pytest.raises(Unavailable, match="not installed"):
        load_peer("no_such_project.part")
    with pytest.raises(Unavailable, match="needs a GPU"):
        PEERS["cce-exact"](CASE, CPU)
    with pytest.raises(Unavailable, match="no softcap"):
        PEERS["liger-scaled"](CASE, CPU)
    with pytest.raises(Unavailable, match="GiB"):
        PEERS["eager"](Case("test", 2**20, 8, 2**20, "16 TiB of logits"), CPU)
    with pytest.raises(Unavailable, match="hidden"):
        maker("ours/triton")(CASE, CPU)


@pytest.mark.parametrize(
    "name, expected",
    [("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"), ("AMD Instinct MI300X", "instinct-mi300x")],
)
def test_directory_of_a_device(name, expected):
    assert directory(name) == expected


def test_the_first_minutes_on_a_gpu_rehearsed(tmp_path, monkeypatch):
    """Every step runs, interpreted; one that fails is a row, and the next one runs."""

    def broken(_):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(first, "REHEARSAL", replace(first.REHEARSAL, T=4, V=300))
    monkeypatch.setattr(first, "STEPS", (broken, *first.STEPS))
    path = tmp_path / "first.json"
    monkeypatch.setattr(sys, "argv", ["bench/first.py", "--rehearse", "--json", str(path)])
    assert first.main() == 1
    report = load(path)
    failed, *others = report["rows"]
    assert report["complete"] and "no such instruction" in failed["why"] and "broken" in failed["where"]
    assert [row["status"] for row in others] == ["ok"] * (len(first.STEPS) - 1), others
    rows = {row["step"]: row for row in others}
    assert not any("red" in str(found) for found in rows["right"].values())
    for mode, kernel in (("forward", "linear_logps_fwd_kernel"), ("frozen", "frozen_head_fwd_kernel")):
        milliseconds, launched = rows["kernels"][mode][kernel]
        assert 0 < milliseconds < rows["kernels"][mode]["whole"] and launched == 1


def test_a_program_of_the_first_minutes_says_what_it_printed(tmp_path):
    command = [sys.executable, "-c", "import os; print(os.environ['WHO'], '{results}'); raise SystemExit(3)"]
    found = first.program(30, {"WHO": "me"}, command, tmp_path)
    assert found["exit"] == 3 and found["output"] == f"me {tmp_path}\n"
