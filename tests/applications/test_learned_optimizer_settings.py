"""Learned optimizer settings: right hypergradients, honest comparisons, exact resuming, the number to expect."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal

import numpy as np
import pytest
import torch

import bilevel as bl
from applications.frame.command import main
from applications.frame.run_folder import RunFolder
from applications.learned_optimizer_settings import baselines, compare, learn, plots
from applications.learned_optimizer_settings.__main__ import Config, history, story
from applications.learned_optimizer_settings.learn import EXACT, Learning, end_of_run
from applications.learned_optimizer_settings.networks import Data, Networks, losses, train
from applications.learned_optimizer_settings.settings import Settings
from applications.learned_optimizer_settings.tuning import tunable
from tests.applications.refusals import NO_DATA, refusals
from tests.applications.runs import comparable

STEPS = 8
TINY = ["--data", "iris", "--steps", "6", "--hidden", "4", "--outer-steps", "6", "--networks", "2", "--points", "3"]
TINY += ["--windows", "2", "--fresh", "3"]


@functools.cache
def digits(dtype: torch.dtype) -> Data:
    return Data.read("digits", dtype=dtype)


def networks(batch: int = 8, dtype: torch.dtype = torch.float64) -> Networks:
    return Networks(digits(dtype), count=2, hidden=5, batch=batch)


def settings(points: int = 3) -> Settings:
    found = Settings.constant(0.2, 0.8, points, torch.float64)
    with torch.no_grad():
        found.log_lr.add_(torch.linspace(-0.5, 0.5, points, dtype=torch.float64))
    return found


def gradient(method: learn.Method, batch: int, stop: int = STEPS) -> torch.Tensor:
    at = settings()
    loss = end_of_run(networks(batch), at, STEPS, stop, method, seed=1).mean()
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, at.tensors)])


def difference_quotients(method: learn.Method, batch: int) -> torch.Tensor:
    """Central ones, towards the control points and the momentum."""
    step, slopes = 1e-6, []
    for tensor in range(2):
        for entry in range(settings().tensors[tensor].numel()):
            values = []
            for sign in (1, -1):
                at = settings()
                with torch.no_grad():
                    at.tensors[tensor].view(-1)[entry].add_(sign * step)
                values.append(end_of_run(networks(batch), at, STEPS, STEPS, method, seed=1).mean().item())
            slopes.append((values[0] - values[1]) / (2 * step))
    return torch.tensor(slopes, dtype=torch.float64)


@pytest.mark.parametrize(("name", "batch"), [("unroll", 0), ("unroll", 8), ("checkpoint", 8)])
def test_the_hypergradient_is_the_slope_of_the_loss(name, batch):
    """1e-6: a step of 1e-6 in float64 leaves about nine digits to the quotients. Forward mode is compared below."""
    found = gradient(EXACT[name], batch)
    torch.testing.assert_close(found, difference_quotients(EXACT[name], batch), rtol=1e-6, atol=1e-8)


def test_forward_and_reverse_mode_agree():
    full = {name: gradient(method, 0) for name, method in EXACT.items()}
    torch.testing.assert_close(full["forward"], full["unroll"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(full["checkpoint"], full["unroll"], rtol=1e-10, atol=1e-12)
    # On mini-batches the two that replay the run draw the same ones.
    torch.testing.assert_close(gradient(EXACT["forward"], 8), gradient(EXACT["checkpoint"], 8), rtol=1e-10, atol=1e-12)


def test_learning_by_forward_mode_is_learning_by_reverse_mode():
    learned = []
    for name in ("forward", "checkpoint"):
        learned.append(settings())
        list(Learning(networks(), learned[-1], STEPS, 3, 0.2, seed=0, hypergrad=EXACT[name]).rows())
    torch.testing.assert_close(learned[0].log_lr, learned[1].log_lr, rtol=1e-8, atol=0)
    torch.testing.assert_close(learned[0].logit, learned[1].logit, rtol=1e-8, atol=0)
    assert (learned[0].log_lr - settings().log_lr).abs().min() > 0.1


def test_a_window_sees_its_own_steps_only():
    truncated = gradient(bl.Truncated(last=2), 0)
    assert truncated[0] == 0  # the first control point rules steps 1 to 4 of 8
    assert truncated[2] != 0
    torch.testing.assert_close(gradient(bl.Truncated(last=STEPS), 0), gradient(bl.Unroll(), 0), rtol=1e-10, atol=0)


def test_the_schedule():
    at = Settings(torch.tensor([0.1, 1.0, 0.01]).log(), torch.tensor(0.0))
    lr, momentum = at.numbers(5)
    assert lr == pytest.approx([0.1, 0.1**0.5, 1.0, 0.1, 0.01], rel=1e-6)
    assert momentum == 0.5
    assert Settings.constant(0.3, 0.9, 1).numbers(4)[0] == pytest.approx([0.3] * 4)
    assert Settings.constant(0.3, 0.9, 4).numbers(4)[1] == pytest.approx(0.9)
    assert baselines.cosine(0.4, 4) == pytest.approx([0.4, 0.3414213562, 0.2, 0.0585786438])


@pytest.mark.parametrize("batch", [0, 8])
def test_the_learned_settings_mean_the_same_to_torch(batch):
    """The run that was differentiated is the run of `torch.optim.SGD`, mini-batches included."""
    at, nets = settings(), networks(batch)
    found = train(nets, *at.numbers(STEPS), seed=1)
    with torch.no_grad():
        ours = end_of_run(nets, at, STEPS, STEPS, bl.Unroll(), seed=1)
    # SGD asks for one mini-batch a step, and so does unrolling.
    torch.testing.assert_close(nets.validation_loss(found), ours, rtol=1e-10, atol=0)


def test_networks_side_by_side_are_networks_alone():
    nets = networks(batch=0)
    together = train(nets, [0.3] * 4, 0.9, seed=2)
    start = nets.start(2)
    alone = torch.nn.Sequential(torch.nn.Linear(64, 5), torch.nn.ReLU(), torch.nn.Linear(5, 10)).double()
    with torch.no_grad():
        for layer, number in ((alone[0], 1), (alone[2], 2)):
            layer.weight.copy_(start[f"w{number}"][1].T)
            layer.bias.copy_(start[f"b{number}"][1, 0])
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.3, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(alone(nets.data.train[0]), nets.data.train[1]).backward()
        optimizer.step()
    torch.testing.assert_close(together["w2"][1].T, alone[2].weight.detach(), rtol=1e-9, atol=1e-12)
    features, classes = nets.data.test
    loss = torch.nn.functional.cross_entropy(alone(features), classes)
    torch.testing.assert_close(losses(together, features, classes)[1], loss.detach())


def test_parts_of_the_data_are_disjoint_and_scaled():
    data = Data.read("wine", seed=3)
    assert [len(part[1]) for part in (data.train, data.validation, data.test)] == [89, 44, 45]
    torch.testing.assert_close(data.train[0].mean(0), torch.zeros(13), atol=1e-5, rtol=0)
    rows = torch.cat([part[0] for part in (data.train, data.validation, data.test)])
    assert len(rows.unique(dim=0)) == 178


def test_mnist_keeps_its_test_images(mnist_root):
    data = Data.read("mnist", mnist_root)
    assert len(data.test[1]) == 10_000
    assert len(data.train[1]) == 4 * len(data.validation[1]) >= 20_000
    assert data.test[1][:5].tolist() == [7, 2, 1, 0, 4]  # as everywhere


def test_learning_rates_that_diverge_are_halved():
    at = Settings.constant(1e20, 0.9, 2)
    learning = Learning(networks(dtype=torch.float32), at, STEPS, 2, 0.1, seed=0)
    first = next(learning.rows())
    assert first["diverged"]
    assert "loss" not in first
    assert at.log_lr.exp().tolist() == pytest.approx([5e19, 5e19], rel=1e-4)
    lr = history([first], Settings.constant(1e20, 0.9, 2), STEPS)[-1]["lr"]
    assert lr == pytest.approx([5e19] * STEPS, rel=1e-4)
    assert baselines.loss_of(networks(), [1e200] * 3, 0.9, seed=0) == baselines.DIVERGED


def test_windows_end_at_points_of_the_whole_run():
    learning = Learning(networks(), settings(), 100, 5, 0.1, seed=0, hypergrad=bl.Truncated(3))
    seen = []
    for learning.step in range(200):
        seen += learning.stops()
    assert min(seen) <= 3
    assert max(seen) >= 98
    assert np.mean(seen) == pytest.approx(50, abs=3)  # two stops: as many steps as one whole run


def test_grids_and_tpe_return_what_they_found_best():
    nets = networks(dtype=torch.float32)
    for found in (
        baselines.grid(nets, "cosine", STEPS, 8, seed=1),
        baselines.grid(nets, "constant", STEPS, 3, seed=1),
        baselines.tpe(nets, 3, STEPS, 8, seed=1),
    ):
        again = baselines.loss_of(nets, found["lr"], found["momentum"], seed=1)
        assert again == pytest.approx(min(found["losses"]), rel=1e-4)
        assert len(found["losses"]) in (3, 8)


def test_every_setting_meets_the_same_fresh_networks():
    nets = networks()
    one, other = (compare.on_fresh_networks(nets, [0.1] * 3, 0.9, count=4, seed=s) for s in (0, 0))
    assert one == other
    assert len(one["test_loss"]) == 4
    assert one["curve"][-1] == (3, pytest.approx(np.mean(one["validation_loss"])))


def command(*arguments: str) -> int:
    return main("learned_optimizer_settings", list(arguments), Config, story, tunable)


def test_interrupted_and_resumed_is_bit_for_bit_the_whole_run(tmp_path, monkeypatch):
    assert command(*TINY, "--out", str(tmp_path / "whole")) == 0
    plain = Learning.gradient

    def interrupting(self):
        loss = plain(self)
        if self.step == 3 and self.window is None:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(Learning, "gradient", interrupting)
    assert command(*TINY, "--out", str(tmp_path / "halves")) == 128 + signal.SIGTERM
    assert len(RunFolder(tmp_path / "halves").metrics()) == 6 + 4
    monkeypatch.setattr(Learning, "gradient", plain)
    assert command("--resume", str(tmp_path / "halves")) == 0
    assert comparable(tmp_path / "halves") == comparable(tmp_path / "whole")
    tables = [json.loads((tmp_path / name / "results.json").read_text())["tables"] for name in ("halves", "whole")]
    title = "iris: settings on 3 fresh networks"
    timeless = [[{k: v for k, v in row.items() if "seconds" not in k} for row in table[title]] for table in tables]
    assert timeless[0] == timeless[1]
    for picture in ("schedules", "search", "training"):
        assert (tmp_path / "whole" / f"{picture}.png").stat().st_size > 10_000


def test_a_short_horizon_is_judged_by_whole_runs():
    """Each trial of a study: the score of settings is that of the same settings, however they were found."""
    study = tunable(Config(data="iris", steps=STEPS, hidden=4, outer_steps=3, networks=2, points=3, fresh=3))
    for choice in ({"hypergrad": "truncated", "hypergrad.last": 2}, {"hypergrad": "forward"}):
        settings = study.settings({**choice, "outer_lr": 0.3})
        records = list(study.train(settings, 5))
        assert [step for step, _, _ in records] == [1, 2, 3]
        nets = Networks(Data.read("iris", seed=5), 2, 4)
        at = Settings.constant(0.05, 0.9, 3)
        list(Learning(nets, at, STEPS, 3, 0.3, 5, settings["hypergrad"]).rows())
        fresh = dataclasses.replace(nets, count=3)
        assert records[-1][1]() == baselines.loss_of(fresh, *at.numbers(STEPS), 5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"outer_lr": -1.0}', "'outer_lr' is -1.0, and a positive number"),
        ('{"hypergrad": {"type": "OneStep"}}', "Unroll, Truncated or ForwardMode"),
        ('{"solver": 1}', "'solver' is 1"),
    ],
)
def test_bad_solver_settings_end_with_2(content, message, tmp_path, refused):
    (tmp_path / "bad.json").write_text(content)
    assert message in refused(command, *TINY, "--solver", tmp_path / "bad.json")


@refusals(
    *("--steps 1", "--batch 0", "--start-lr nan", "--start-momentum 1", "--fresh 1"),
    (["--points", "7", "--steps", "6"], "--points is 7"),
    (["--windows", "5", "200"], "--windows has 200"),
    (["--windows", "5", "5"], "twice"),
    *NO_DATA,
)
def test_bad_settings_end_with_2_and_write_nothing(arguments, message, refused):
    assert message in refused(command, *arguments)


def test_bad_files_end_with_2_and_write_nothing(bad_file, refused):
    refused(command, "--data", bad_file)


def test_every_knob_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        command("--help")
    text = capsys.readouterr().out
    assert all(f"--{field.name.replace('_', '-')}" in text for field in dataclasses.fields(Config))


@pytest.mark.applications
def test_the_number_of_the_readme(readme_run):
    folder, tables, _ = readme_run("learned_optimizer_settings")
    (title,) = (title for title in tables if title.startswith("digits"))
    rows = {row["settings"]: row for row in tables[title]}
    loss = {name: row["test loss"] for name, row in rows.items()}
    ours, cosine = loss["learned through whole runs"], loss["cosine, best of a grid"]
    assert ours < 0.14
    assert ours < 0.8 * loss["constant, best of a grid"]
    assert ours < 1.05 * cosine
    assert ours < 0.8 * loss["learned through windows of 20"]
    assert rows["learned through whole runs"]["test accuracy (%)"] > 95.5
    costs = next(table for title, table in tables.items() if title.startswith("One hypergradient"))
    difference = {row["hypergradient"]: row["difference from forward mode"] for row in costs}
    assert max(difference["unroll"], difference["checkpoint"]) < 1e-5 < 0.1 < difference["truncated, last 20"]
    for picture in ("schedules", "search", "training"):
        assert (folder / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_a_learning_that_diverges_is_drawn_and_told(tmp_path):
    """Its momentum becomes 1 to the bit, so that there is no effective rate."""
    assert plots.effective_rates({"lr": [0.5, 2.0], "momentum": 1.0}) == [np.inf, np.inf]
    assert plots.least([np.inf, np.nan, -1.0]) == 1.0
    assert command(*TINY, "--outer-lr", "1e20", "--out", str(tmp_path / "run")) == 0
    assert (tmp_path / "run" / "schedules.png").exists()
