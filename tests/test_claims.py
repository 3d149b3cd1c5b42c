"""bench/claims.py, hardly trained: both of its models go to the end and on, and the cheap way is the plain one."""

import copy
import json
import random
import sys
from dataclasses import replace

import pytest
import torch

from bench import claims, claims_tasks
from groupdpo_kernels import seq_logps

MODELS = [*claims.PLANS]


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """The script with its options, in this process; what it prints, and what its results file holds."""

    def run(model, *options):
        path = tmp_path / f"{model}.json"
        arguments = ["--model", model, "--json", str(path), *options]
        monkeypatch.setattr(sys, "argv", ["bench/claims.py", *arguments])
        assert claims.main() == 0
        return capsys.readouterr().out, json.loads(path.read_text())

    return run


@pytest.fixture(scope="module")
def additions():
    """Of a tiny random model, whose even answers are right."""
    return claims_tasks.Additions.make(0, 8, True, None)


@pytest.mark.parametrize("model", MODELS)
def test_all_claims_to_the_end(model, command):
    """One claim first; the same file then goes on with the others and another seed, and only its tables are printed."""
    quick = ["--quick", "--seeds", "0"]
    printed, first = command(model, *quick, "--claims", "sdpo")
    assert [*first["runs"]] == ["sdpo"] and "2 stages, easy to hard" in printed and "adadpo, seeds" not in printed
    printed, content = command(model, *quick, "1")
    assert content["commit"] and content["versions"]["transformers"] and content["model"] == model
    assert content["runs"]["sdpo"]["DPO on all"]["0"] == first["runs"]["sdpo"]["DPO on all"]["0"]
    assert "sdpo, seed 0" not in printed and "sdpo, seeds [0, 1]" in printed and "| G = 2 | " in printed
    assert [*content["starts"]] == ["0", "1"]
    for claim, arms in content["runs"].items():
        assert len(arms) == min(4, len(claims.PLANS[model].arms(claim)))
        for found in (found for seeds in arms.values() for found in seeds.values()):
            assert 0 <= found["right"] <= 1 and 0 <= found["accuracy"] <= 1 and found["right_logp"] < 0
            assert ("gap" in found and "norms" in found) == (claim == "adadpo")
    assert command(model, "--tables")[0].strip() == printed[printed.index("\ngroups, seeds") :].strip()
    with pytest.raises(ValueError, match="results of the settings"):
        command(model, *quick, "--steps", "3")


def test_what_the_command_line_refuses(command, capsys):
    for options, message in ((["--quick"], "--json"), (["--model", "smollm2"], "--path")):
        sys.argv[1:] = options
        with pytest.raises(SystemExit):
            claims.parse()
        assert f"needs {message}" in capsys.readouterr().err


def test_trees_score_as_the_whole_model_does(additions):
    """Adapted upper layers on kept states, a prompt once for its answers, beside the whole model on each answer."""
    trees, model = additions.trees, copy.deepcopy(additions.model)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    whole, task = claims_tasks.start(None)
    adapted = model.get_base_model()
    layers = whole.model.layers
    whole.model.layers = torch.nn.ModuleList(
        [*layers[: len(layers) - len(adapted.model.layers)], *adapted.model.layers]
    )
    chosen, columns = torch.tensor([2, 0]), torch.tensor([[1, 4, 6], [7, 0, 3]])
    found = seq_logps(*trees.logps(model, chosen, columns))
    torch.manual_seed(0)
    asked, _ = claims_tasks.drawn(claims_tasks.start(None)[0], task, task.rows(0, 8)[0], len(trees.answers))
    prompts = claims_tasks.tokens_of(task, asked)
    for at, (prompt, column) in enumerate((p, c) for p, of_row in zip(chosen, columns) for c in of_row):
        answer = trees.answers[prompt, column]
        answer = answer[answer >= 0]
        ids = torch.cat([prompts[prompt], answer])[None]
        logps = whole(ids, use_cache=False).logits.double().log_softmax(-1)[0, -len(answer) - 1 : -1]
        expected = logps.gather(1, answer[:, None]).sum()
        assert float((found[at] - expected).detach()) == pytest.approx(0, abs=1e-5)
    assert not torch.allclose(seq_logps(*trees.logps(additions.model, chosen, columns)), found, atol=1e-3)


def test_kept_answers_give_the_same_start(monkeypatch, tmp_path):
    tiny = claims_tasks.start
    monkeypatch.setattr(claims_tasks, "start", lambda path: tiny(None))
    drawn, kept = (claims_tasks.Additions.make(3, 8, True, tmp_path) for _ in range(2))
    assert len([*tmp_path.iterdir()]) == 1 and torch.equal(drawn.ref_logps, kept.ref_logps)
    states = (start.model.state_dict() for start in (drawn, kept))
    assert all(torch.equal(x, y) for x, y in zip(*(state.values() for state in states)))


def test_samples_are_sorted_by_the_rule():
    _, task = claims_tasks.start(None)
    end, few = task.tokenizer.eos_token_id, claims_tasks.FEW
    right, wrong = (task.tokenizer(text).input_ids for text in (" 4", " 5"))
    answers = [[*right, end, 7], [*wrong, 7, end]] * few
    assert claims_tasks.two_sides(task, 2, answers) == [[*right, end]] * few + [[*wrong, 7, end]] * few
    assert claims_tasks.two_sides(task, 2, answers[1:]) == []
    right, wrong = claims_tasks.pair(task, 98, random.Random(0))
    assert len(right) == len(wrong) and int(task.tokenizer.decode(wrong).replace(" ", "")) % 2 == 1


def test_training_learns_what_the_loss_says(additions):
    """The likelihood of right answers rises by their own loss; the start stays as it is."""
    plan, few = replace(claims.PLANS["smollm2"], group_rate=1e-2), claims_tasks.FEW
    learner, gaps = claims.train(additions, plan.group("mpo", 8, 1.0), 12, 0)
    gained = additions.sums(learner) - additions.ref_logps
    assert gained[:, :few].mean() > 0.1 and gained[:, few:].mean() < -0.1 and not gaps
    assert torch.equal(additions.sums(additions.model), additions.ref_logps)


def test_greedy_answers_are_right_as_far_as_the_number_goes(additions):
    """It ends where no digit follows."""
    ids = additions.task.tokenizer.convert_tokens_to_ids([" ", "5", "6", "7", "="])
    target = torch.tensor([*ids[:3], -100])
    for best, right in (("0123", False), ("0124", True), ("0144", False), ("0222", False)):
        tokens = torch.tensor([ids[int(i)] for i in (*best, 4)])
        assert additions.is_right(tokens, target, 3) is right
