"""tune: what it plans, that it halves, and that a search that is killed finds the same."""

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import get_args

import pytest
from forking import in_child
from pictures import settings, write_pictures

from lora_engine.__main__ import run_verb
from lora_engine.commands import tune as tune_command
from lora_engine.commands.tune import Variant
from lora_engine.stopping import Diverged
from lora_engine.training import tuning
from lora_engine.training.tuning import Candidate, Rung, candidates_of, plan_rungs, rungs_of


def test_every_variant_can_be_asked_for():
    assert get_args(Variant) == tuple(tuning.VARIANTS)


def test_rungs_divide_by_three_and_the_last_has_one_full_run():
    assert rungs_of(9, 504) == [Rung(9, 56), Rung(3, 168), Rung(1, 504)]
    assert rungs_of(3, 504) == [Rung(3, 56), Rung(1, 504)]
    assert rungs_of(4, 100) == [Rung(4, 34), Rung(1, 100)]
    assert rungs_of(30, 10_000) == [Rung(30, 371), Rung(10, 1112), Rung(4, 3334), Rung(1, 10_000)]
    assert rungs_of(3, 30) == [Rung(3, 30)], "too short to divide"


def test_the_plan_has_as_many_candidates_as_the_time_allows(caplog):
    def total_s(rungs: list[Rung]) -> float:
        return sum(n * (5 + 0.1 * steps) for n, steps in rungs)

    times = {"short_s": 5 + 0.1 * 56, "full_s": 5 + 0.1 * 504}
    for budget_s in (100, 180, 250):
        rungs = plan_rungs(20, 504, budget_s=budget_s, **times)
        more = rungs_of(rungs[0].num_candidates + 1, 504)
        assert total_s(rungs) <= budget_s < total_s(more)
    assert plan_rungs(20, 504, budget_s=1e6, **times) == rungs_of(20, 504)
    assert plan_rungs(5, 30, short_s=10, full_s=10, budget_s=35) == [Rung(3, 30)]
    assert not caplog.records
    assert plan_rungs(20, 504, budget_s=1, **times) == rungs_of(1, 504)
    assert "--minutes is too short" in caplog.text


def test_the_own_settings_come_first_and_alpha_follows_the_rank(blip_folder, tmp_path):
    config = settings(blip_folder, tmp_path, tmp_path, lr=0.1, lora_rank=4, lora_alpha=8.0)
    found = candidates_of(config, [1.0, 0.1], [2, 4], ["dora", "lora"])
    assert len(set(found)) == 8 and found[0] == Candidate(0.1, 4, "lora")
    assert found == candidates_of(config, [1.0, 0.1], [2, 4], ["dora", "lora"])
    changes = Candidate(1.0, 2, "dora").settings(config)
    changed = dataclasses.replace(config, **changes)
    assert changed == dataclasses.replace(config, lr=1, lora_rank=2, lora_alpha=4, use_dora=True)
    assert Candidate.of(changed) == Candidate(1.0, 2, "dora")
    back = Candidate.of(config).settings(changed)
    assert dataclasses.replace(changed, **back) == config
    assert candidates_of(config, [1.0], [4], ["lora"]) == [found[0], Candidate(1.0, 4, "lora")]
    with pytest.raises(ValueError, match="nothing to choose from"):
        candidates_of(config, [0.1], [4], ["lora"])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder, num_images=12)
    write_pictures(folder, num_images=3, name="val.json")
    return folder


def args(model: Path, data: Path, folder: Path, *more: str) -> list[str]:
    return [
        "tune", "--model", str(model), "--train_data_path", str(data / "train.json"),
        "--val_data_path", str(data / "val.json"), "--output_path", str(folder),
        "--cache_dir", str(folder.with_name("cache")), "--batch_size", "4", "--epochs", "3",
        "--lr", "1e-5", "--lrs", "1e-5", "1e-2", "--ranks", "2", "--variants", "eva", "dora",
        "--lora_rank", "2", "--best_by", "loss", *more,
    ]


def found_in(folder: Path) -> list:
    results = json.loads((folder / "tune.json").read_text())["results"]
    keys = ("num_steps", "candidate", "score", "loss", "cider_d")
    return [[result[key] for key in keys] for result in results]


def test_a_search_that_is_killed_and_continued_finds_the_same(
    blip_folder, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tuning, "MIN_STEPS", 3)
    assert run_verb(args(blip_folder, data, tmp_path / "whole")) == 0
    out = capsys.readouterr().out
    results = found_in(tmp_path / "whole")
    assert [result[0] for result in results] == [9, 3, 3, 3, 9]
    own, *others, last = results
    best = max(others, key=lambda result: result[2])
    assert own[1] == [1e-5, 2, "eva"], "the recipe's variant"
    assert last[1] == best[1], "the best of the first rung gets a full run"
    lr, rank, variant = max([own, last], key=lambda result: result[2])[1]
    assert lr == 1e-2
    assert f"best      {variant}-r{rank}-lr{lr:g}: validation loss" in out
    assert f" train --model {blip_folder} " in out and f"--lr {lr:g} --lora_rank {rank}" in out
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "to train" in page and f"{variant}-r{rank}-lr{lr:g}" in page

    def killed() -> None:
        train, calls = tuning.train, []

        def train_or_die(config):
            calls.append(config)
            if len(calls) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return train(config)

        tuning.train = train_or_die
        run_verb(args(blip_folder, data, tmp_path / "killed"))

    assert in_child(killed, tmp_path / "log").status == -signal.SIGKILL
    assert len(found_in(tmp_path / "killed")) == 3
    with pytest.raises(ValueError, match="already holds a search; add --resume"):
        run_verb(args(blip_folder, data, tmp_path / "killed"))
    with pytest.raises(ValueError, match="has another batch_size; give the same"):
        changed = args(blip_folder, data, tmp_path / "killed", "--resume")
        changed[changed.index("--batch_size") + 1] = "3"
        run_verb(changed)
    assert run_verb(args(blip_folder, data, tmp_path / "killed", "--resume")) == 0
    assert found_in(tmp_path / "killed") == results

    more = args(blip_folder, data, tmp_path / "killed", "--resume")
    more[more.index("1e-2")] = "2e-2"
    assert run_verb(more) == 0
    assert found_in(tmp_path / "killed")[:5] == results, "what was found is kept"
    assert [2e-2, 2, "dora"] in [result[1] for result in found_in(tmp_path / "killed")[5:]]


def test_the_settings_as_they_are_get_a_full_run_and_so_does_the_best_of_the_others(
    blip_folder, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(tuning, "MIN_STEPS", 1)

    def result(settings, candidate, num_steps) -> tuning.Result:
        return tuning.Result(candidate, num_steps, "", candidate.lr, 0.0, None, True, seconds=1.0)

    monkeypatch.setattr(tuning, "_run", result)
    config = settings(blip_folder, data, tmp_path, lr=0.1, epochs=3)
    lrs = [0.1 * n for n in range(1, 10)]
    candidates = candidates_of(config, lrs, [config.lora_rank], ["lora"])
    results = tuning.tune(config, candidates, minutes=1, folder=tmp_path / "search")
    (first, *others), *rungs = [
        [round(10 * run.candidate.lr) for run in results if run.num_steps == num_steps]
        for num_steps in sorted({run.num_steps for run in results}, reverse=True)
    ]
    assert (first, others) == (1, [9])
    assert [rungs[0], sorted(rungs[1])] == [[9, 8, 7], [*range(2, 10)]]


def test_a_run_that_diverges_is_the_worst_and_the_search_continues(
    blip_folder, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tuning, "MIN_STEPS", 3)
    train = tuning.train

    def train_or_diverge(config):
        summary = train(config)
        if config.lr == 1e-2:
            raise Diverged("10 steps in a row")
        return summary

    monkeypatch.setattr(tuning, "train", train_or_diverge)
    assert run_verb(args(blip_folder, data, tmp_path / "search")) == 0
    scores = {tuple(result[1]): result[2] for result in found_in(tmp_path / "search")}
    assert scores[1e-2, 2, "dora"] == -float("inf") < scores[1e-5, 2, "dora"]
    assert "best      " in capsys.readouterr().out

    def diverge(config):
        raise Diverged("10 steps in a row")

    monkeypatch.setattr(tuning, "train", diverge)
    monkeypatch.setattr(tune_command, "write_report", lambda *arguments, **keywords: None)
    assert run_verb(args(blip_folder, data, tmp_path / "hopeless")) == 0
    out = capsys.readouterr().out
    assert "All full runs diverged: give a lower --lr" in out and "adapter   " not in out


def test_short_runs_are_compared_by_what_they_have_learnt(
    blip_folder, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tuning, "MIN_STEPS", 3)
    train = tuning.train

    def train_worse(config):
        summary = train(config)
        start = summary.losses[0]
        losses = {step: start + step / 100 + config.lr for step in summary.losses} | {0: start}
        return dataclasses.replace(summary, losses=losses, best_step=0)

    monkeypatch.setattr(tuning, "train", train_worse)
    assert run_verb(args(blip_folder, data, tmp_path / "search")) == 0
    results = found_in(tmp_path / "search")
    assert len({result[2] for result in results}) == 2, "one for each rate, not that of the start"
    assert results[-1][1] == [1e-5, 2, "dora"]
    assert "No full run was better than the captioner before" in capsys.readouterr().out


def test_an_interrupted_search_says_how_it_continues(blip_folder, data, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "read_rows", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        run_verb(args(blip_folder, data, tmp_path / "search"))
    assert caught.value.__notes__ == ["repeat the command with --resume to continue"]


@pytest.mark.parametrize("more, message", [
    (["--minutes", "0"], "--minutes is 0.0; it must be above 0"),
    (["--variants", "lora", "lokr"], "must be one of"),
    (["--learning_rate", "1"], "it is --lr here"),
    (["--init_adapter", "a"], "leave --init_adapter out"),
    (["--push_to_hub", "a/b"], "upload the one you choose"),
    (["--use_dora", "--use_rslora"], "with --variants; leave out --use_rslora, --use_dora"),
    (["--lrs", "0", "1e-3"], "eva-r2-lr0: --lr is 0.0; it must be above 0"),
    (["--resume", "step-00000003"], "give it without a value"),
])
def test_wrong_flags_are_answered(blip_folder, data, tmp_path, more, message):
    given = args(blip_folder, data, tmp_path / "run", *more)
    for flag in {"--variants", "--lrs"} & set(more):
        del given[given.index(flag) : given.index(flag) + 3]
    with pytest.raises(ValueError, match=message):
        run_verb(given)
    assert not (tmp_path / "run").exists()
