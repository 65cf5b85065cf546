"""The application as its users meet it: commands, exit codes, files."""

from __future__ import annotations

import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import bilevel as bl
from applications.few_shot import evaluate, train
from applications.few_shot.__main__ import main
from applications.few_shot.config import PRESETS, Config
from applications.few_shot.train import Session, create_learner, meta_train
from applications.frame.errors import UserError
from applications.frame.run import CLOCKS
from applications.frame.run_folder import RunFolder
from tests.applications.few_shot.conftest import QUICK
from tests.applications.runs import comparable

ROOT = Path(__file__).parents[3]
CHECKPOINT = "checkpoint.pt"


@pytest.fixture(scope="session")
def finished(short_run):
    """The folder of a short, uninterrupted run of 8 steps."""
    return short_run(8)


SAVE_OFTEN = [
    "-c",
    "import sys; from applications.frame import run; from applications.few_shot.__main__ import main; "
    "run.CHECKPOINT_SECONDS = 0.0; sys.exit(main(sys.argv[1:]))",
]


def command(*arguments, program=("-m", "applications.few_shot")):
    return [sys.executable, *program, *map(str, arguments)]


def start(*arguments, program=("-m", "applications.few_shot"), **kwargs):
    return subprocess.Popen(
        command(*arguments, program=program),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )


def wait_for_steps(folder, count, process, limit=90):
    deadline = time.monotonic() + limit
    while len(RunFolder(folder).metrics()) < count:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.02)


def assert_same_run(folder, other):
    assert comparable(folder) == comparable(other)
    one, two = (torch.load(path / CHECKPOINT, weights_only=True)["training"] for path in (folder, other))
    for name, tensor in one["meta"].items():
        assert torch.equal(tensor, two["meta"][name]), name
    for index, state in one["optimizer"]["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, two["optimizer"]["state"][index][name])


class TestRun:
    def test_folder(self, finished):
        names = {path.name for path in finished.iterdir()}
        assert names - {"checkpoint.previous.pt"} == {  # which a run of more than a few seconds has too
            "config.json",
            "metrics.jsonl",
            CHECKPOINT,
            "learning_curve.png",
            "test_episode.png",
            "evaluation.json",
            "results.json",
            "report.md",
        }
        config = Config.from_json(json.loads((finished / "config.json").read_text()))
        assert (config.width, config.steps, config.data) == (8, 8, "glyphs")
        records = RunFolder(finished).metrics()
        assert [record["step"] for record in records if "loss" in record] == list(range(1, 9))
        assert [record["step"] for record in records if "validation_accuracy" in record] == [3, 6]
        assert all(math.isfinite(record["meta_gradient_norm"]) for record in records if "loss" in record)
        for picture in ("learning_curve.png", "test_episode.png"):
            assert (finished / picture).read_bytes().startswith(b"\x89PNG")

    def test_evaluation_names_its_settings_and_baselines(self, finished, tmp_path, capsys):
        folder = tmp_path / "copy"
        shutil.copytree(finished, folder)
        assert main(["evaluate", str(folder), "--eval-tasks", "60", "--baselines"]) == 0
        printed = capsys.readouterr().out
        assert "Accuracy on 60 held-out tasks, implicit MAML, glyphs 5-way 1-shot" in printed
        for line in (
            "implicit MAML, transductive: batch statistics of all queries",
            "implicit MAML, not transductive: each query by itself",
            "the same before training",
            "linear classifier on pixels",
            "nearest neighbour on pixels",
        ):
            assert line in printed
        found = json.loads((folder / "evaluation-step-8-5way-1shot-test.json").read_text())["accuracy"]
        assert {row["num_tasks"] for row in found.values()} == {60}
        assert 40 < found["nearest neighbour on pixels"]["mean"] < 75

    def test_evaluation_goes_where_it_is_told_and_takes_other_solver_settings(self, finished, tmp_path):
        settings = {"solver": bl.GradientDescent(0.1, 1), "strength": 0.5}
        bl.tuning.save(tmp_path / "solver.json", settings)
        arguments = ["--solver", str(tmp_path / "solver.json"), "--eval-steps", "1", "--out", str(tmp_path / "one")]
        assert main(["evaluate", str(finished), *arguments]) == 0
        assert {path.name for path in (tmp_path / "one").iterdir()} >= {"evaluation.json", "solver.json"}
        before = json.loads((finished / "evaluation.json").read_text())
        assert before != json.loads((tmp_path / "one" / "evaluation.json").read_text())

    @pytest.mark.parametrize("arguments", [[], ["--eval-tasks", "1"], ["nowhere"]])
    def test_evaluate_needs_a_run(self, arguments, capsys):
        assert main(["evaluate", *arguments]) == 2
        assert "the folder of a run" in capsys.readouterr().err

    def test_evaluate_has_help_and_no_preset(self, finished, capsys):
        with pytest.raises(SystemExit) as caught:
            main(["evaluate", "--help"])
        assert caught.value.code == 0
        assert "(default: 600)" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            main(["evaluate", str(finished), "--help"])
        own = Config.from_json(json.loads((finished / "config.json").read_text())).eval_tasks
        assert own != 600
        assert f"(default: {own})" in capsys.readouterr().out
        assert main(["evaluate", str(finished), "--preset", "paper-omniglot-5way-1shot"]) == 2
        assert "no --preset" in capsys.readouterr().err

    def test_an_existing_run_is_never_overwritten(self, finished, capsys):
        before = (finished / CHECKPOINT).read_bytes()
        assert main([*QUICK, "--out", str(finished)]) == 2
        assert f"Go on with it by --resume {finished}" in capsys.readouterr().err
        assert (finished / CHECKPOINT).read_bytes() == before

    @pytest.mark.parametrize("method", ["imaml-hf", "maml", "fomaml", "reptile"])
    def test_every_method_trains(self, method, toy_splits):
        config = Config(method=method, width=8, tasks=4, steps=30, lr=1e-2, inner_steps=2)
        learner = create_learner(config, toy_splits.train, torch.device("cpu"))
        optimizer = torch.optim.Adam(learner.parameters(), config.lr)
        session = Session(config, toy_splits, torch.device("cpu"), learner, optimizer)
        records = list(meta_train(session))
        early, late = (np.mean([r["loss"] for r in part]) for part in (records[:5], records[-5:]))
        assert late < 0.8 * early


class TestClock:
    def test_minutes_of_the_processor(self, toy_splits, monkeypatch):
        """Each step takes half a minute of it, and none by the clock on the wall."""
        config = Config(width=8, tasks=2, inner_steps=1, steps=1000, minutes=2.0, clock="cpu")
        ticks = itertools.count(step=30.0)
        monkeypatch.setitem(CLOCKS, "cpu", lambda: next(ticks))
        learner = create_learner(config, toy_splits.train, torch.device("cpu"))
        optimizer = torch.optim.Adam(learner.parameters(), config.lr)
        session = Session(config, toy_splits, torch.device("cpu"), learner, optimizer)
        rows = list(meta_train(session))
        assert len(rows) == 4
        assert rows[2]["lr"] == pytest.approx(config.lr / 2)  # the schedule follows it

    def test_a_gpu_is_not_measured_by_it(self, monkeypatch):
        monkeypatch.setattr(train, "select_device", lambda name: torch.device("cuda"))
        with pytest.raises(UserError, match="--clock cpu counts the time of the CPU, but cuda does the work"):
            train.set_up_device(Config(clock="cpu"))


class TestResume:
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    @pytest.mark.slow
    def test_interrupted_and_resumed_is_uninterrupted(self, number, code, finished, glyph_root, tmp_path):
        folder = tmp_path / "run"
        process = start(*QUICK, "--steps", 8, "--data-root", glyph_root, "--out", folder)
        wait_for_steps(folder, 3, process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == code, output
        assert "Traceback" not in output
        stopped = RunFolder(folder).load_checkpoint(torch.device("cpu"), CHECKPOINT)["step"]
        assert 2 <= stopped < 8
        assert f"Interrupted; what was done is saved. Go on with: --resume {folder}" in output
        assert main(["train", "--resume", str(folder)]) == 0
        assert_same_run(folder, finished)

    @pytest.mark.slow
    def test_killed_and_resumed_is_uninterrupted(self, finished, glyph_root, tmp_path):
        folder = tmp_path / "run"
        arguments = [*QUICK, "--steps", 8, "--data-root", glyph_root, "--out", folder]
        process = start(*arguments, program=SAVE_OFTEN)
        wait_for_steps(folder, 5, process)
        process.kill()
        process.wait()
        assert (folder / CHECKPOINT).exists()
        assert main(["train", "--resume", str(folder)]) == 0
        assert_same_run(folder, finished)

    @pytest.mark.parametrize(
        ("option", "value", "kept"),
        [("--steps", "7", "8"), ("--width", "16", "8"), ("--preset", "paper-omniglot-5way-1shot", "default")],
    )
    def test_other_settings_are_refused(self, option, value, kept, finished, capsys):
        before = comparable(finished)
        assert main(["train", "--resume", str(finished), option, value]) == 2
        assert f"{option} is {value}, but the run to resume has {kept}" in capsys.readouterr().err
        assert comparable(finished) == before

    def test_a_finished_run_is_shown_again_and_is_not_evaluated_again(self, finished, capsys, monkeypatch):
        monkeypatch.setattr(train, "evaluation", None)
        results = (finished / "results.json").read_bytes()
        assert main(["--resume", str(finished)]) == 0
        assert "Accuracy on 4 held-out tasks" in capsys.readouterr().out
        assert (finished / "results.json").read_bytes() == results

    def test_a_preset_is_where_the_options_start_and_what_a_run_resumes_with(self, glyph_root, tmp_path):
        folder = tmp_path / "run"
        arguments = ["--preset", "paper-omniglot-5way-5shot", "--data", "glyphs", *QUICK, "--steps", "1"]
        assert main([*arguments, "--data-root", str(glyph_root), "--out", str(folder)]) == 0
        config = Config.from_json(json.loads((folder / "config.json").read_text()))
        assert (config.shots, config.strength, config.data, config.steps) == (5, 2.0, "glyphs", 1)
        assert main(["--resume", str(folder)]) == 0

    @pytest.mark.slow
    def test_every_kill_leaves_a_loadable_checkpoint(self, tmp_path):
        """SIGKILL at random moments of a process that does nothing but save."""
        script = (
            "import sys, torch, pathlib\n"
            "from applications.frame.run_folder import RunFolder\n"
            "folder = RunFolder(pathlib.Path(sys.argv[1]))\n"
            "for step in range(10**6):\n"
            "    folder.save_checkpoint({'step': step, 'w': torch.full((20000,), float(step))}, 'state.pt')\n"
            "    print(step, flush=True)\n"
        )
        generator = np.random.default_rng(0)
        process = None
        for _ in range(8):
            process = subprocess.Popen(
                [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
            )
            process.stdout.readline()
            time.sleep(generator.uniform(0, 0.05))
            process.kill()
            printed = process.stdout.read().split()
            state = RunFolder(tmp_path).load_checkpoint(torch.device("cpu"), "state.pt")
            assert (state["w"] == state["step"]).all()
            assert not printed or state["step"] >= int(printed[-1])


class TestBadInput:
    @pytest.fixture
    def refused(self, capsys):
        def run(*arguments):
            code = main([str(argument) for argument in arguments])
            captured = capsys.readouterr()
            assert code == 2, captured
            assert captured.err.startswith("error: ")
            assert "Traceback" not in captured.err
            return captured.err

        return run

    def test_more_ways_than_classes(self, refused, glyph_root, tmp_path):
        message = refused(*QUICK, "--ways", 5000, "--data-root", glyph_root, "--out", tmp_path / "run")
        assert "the train set has only 639 classes" in message

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("--tasks", 0, "--tasks is 0"),
            ("--eval-tasks", 0, "--eval-tasks is 0"),
            ("--steps", 0, "--steps is 0"),
            ("--threads", 0, "--threads is 0"),
            ("--chunk-size", 0, "--chunk-size is 0"),
            ("--eval-steps", 0, "--eval-steps is 0"),
            ("--inner-lr", -1.0, "--inner-lr is -1.0"),
            ("--strength", 0.0, "--strength is 0.0"),
            ("--inner-momentum", 1.0, "--inner-momentum is 1.0"),
            ("--shots", 20, "--shots 20 and 5 queries"),
            ("--eval-queries", 20, "--shots 1 and 20 queries"),
            ("--minutes", -1, "--minutes is -1"),
            ("--model", "nonsense", "neither 'conv4' nor 'fc'"),
            ("--preset", "paper", "There is no preset 'paper'"),
            ("--resume", "nowhere", "not the folder of a run"),
            ("--data", "imagenet", f"There is no data set 'imagenet', and no folder {Path('imagenet').absolute()}"),
            ("--clip", 0.5, "--clip is 0.5"),
            ("--ways", 1, "--ways is 1: there must be two classes or more"),
            ("--average", 0, "--average is 0"),
        ],
    )
    def test_values(self, option, value, message, refused, glyph_root, tmp_path):
        assert message in refused(option, value, "--data-root", glyph_root, "--out", tmp_path / "run")
        assert not (tmp_path / "run").exists()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
    def test_no_gpu(self, refused, glyph_root, tmp_path):
        message = refused("--device", "cuda", "--data-root", glyph_root, "--out", tmp_path / "run")
        assert "PyTorch finds no GPU here" in message

    def test_wrong_data_root(self, refused, tmp_path):
        (tmp_path / "file").write_text("")
        assert "file" in refused("--data", "omniglot", "--data-root", tmp_path / "file", "--out", tmp_path / "run")

    def test_missing_folder_of_a_set_that_is_not_downloaded(self, refused, tmp_path):
        assert "mini-imagenet" in refused("--data", "mini-imagenet", "--data-root", tmp_path, "--out", tmp_path / "run")

    def test_corrupt_npz(self, refused, tmp_path):
        (tmp_path / "omniglot").mkdir()
        (tmp_path / "omniglot" / "omniglot28.npz").write_bytes(b"PK\x03\x04 not an archive")
        assert "omniglot28.npz" in refused("--data", "omniglot", "--data-root", tmp_path, "--out", tmp_path / "run")

    def test_learned_strength_without_a_proximal_term(self, refused, tmp_path):
        message = refused("--method", "maml", "--learn-strength", "layer", "--out", tmp_path / "run")
        assert "maml has no proximal term" in message

    @pytest.mark.parametrize("arguments", [["--no-such-option", "1"], ["--ways", "many"], ["--split", "letters"]])
    def test_options_that_do_not_parse(self, arguments):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2

    def test_malicious_checkpoint_is_not_executed(self, refused, finished, tmp_path):
        class Malicious:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "executed"),)

        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "config.json").write_bytes((finished / "config.json").read_bytes())
        torch.save({"training": Malicious()}, folder / CHECKPOINT)
        assert "is cut short, or holds more than tensors" in refused("evaluate", folder)
        assert not (tmp_path / "executed").exists()

    def test_truncated_checkpoint(self, refused, finished, tmp_path):
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "config.json").write_bytes((finished / "config.json").read_bytes())
        (folder / CHECKPOINT).write_bytes((finished / CHECKPOINT).read_bytes()[:1000])
        assert "is damaged" in refused("train", "--resume", folder)

    def test_full_disk_leaves_the_earlier_checkpoint(self, glyph_root, tmp_path):
        """The system refuses to write more than 20 kB into a file: the metrics fit, a checkpoint does not."""
        folder = tmp_path / "run"
        process = start(*QUICK, "--steps", 1000, "--data-root", glyph_root, "--out", folder)
        wait_for_steps(folder, 2, process)
        process.terminate()
        process.communicate(timeout=60)
        before = (folder / CHECKPOINT).read_bytes()
        assert len(before) > 40_000
        process = start(
            "--resume",
            folder,
            program=SAVE_OFTEN,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        )
        output, _ = process.communicate(timeout=90)
        assert process.returncode == 2, output
        assert f"{CHECKPOINT} could not be written; its earlier version is untouched: File too large" in output
        assert "Traceback" not in output
        assert (folder / CHECKPOINT).read_bytes() == before
        assert not list(folder.glob("*.partial"))

    def test_divergence_ends_with_advice(self, toy_splits):
        config = Config(width=8, tasks=2, steps=100, inner_lr=1e9, safeguard=False, strength=1e9)
        learner = create_learner(config, toy_splits.train, torch.device("cpu"))
        optimizer = torch.optim.Adam(learner.parameters(), config.lr)
        session = Session(config, toy_splits, torch.device("cpu"), learner, optimizer)
        before = {name: param.detach().clone() for name, param in learner.meta.items()}
        with pytest.raises(UserError, match="No finite meta-gradient in 20 steps"):
            list(meta_train(session))
        assert all(torch.equal(param, before[name]) for name, param in learner.meta.items())


class TestConfig:
    def test_help_names_every_knob(self, capsys):
        with pytest.raises(SystemExit) as caught:
            main(["train", "--help"])
        assert caught.value.code == 0
        printed = " ".join(capsys.readouterr().out.split())
        for field in fields(Config):
            assert f"--{field.name.replace('_', '-')}" in printed
        assert "lambda, the strength of the proximal term" in printed

    def test_overview(self, capsys):
        with pytest.raises(SystemExit) as caught:
            main(["--help"])
        assert caught.value.code == 0
        printed = capsys.readouterr().out
        assert all(name in printed for name in (*PRESETS, "evaluate", "benchmark", "tune", "--resume"))

    @pytest.mark.parametrize(
        ("name", "ways", "shots", "inner_steps"),
        [
            ("paper-omniglot-5way-1shot", 5, 1, 16),
            ("paper-omniglot-5way-5shot", 5, 5, 16),
            ("paper-omniglot-20way-1shot", 20, 1, 25),
            ("paper-omniglot-20way-5shot", 20, 5, 25),
        ],
    )
    def test_presets_have_the_settings_of_the_paper(self, name, ways, shots, inner_steps):
        config = PRESETS[name]
        assert (config.ways, config.shots, config.inner_steps) == (ways, shots, inner_steps)
        assert (config.strength, config.cg_steps, config.tasks, config.lr, config.width) == (2.0, 5, 32, 1e-3, 64)
        assert (config.inner_lr, config.steps, config.method) == (0.1, 20_000, "imaml")

    def test_miniimagenet_preset(self):
        config = PRESETS["paper-miniimagenet-5way-1shot"]
        assert (config.strength, config.inner_steps, config.cg_steps, config.width) == (0.5, 10, 5, 32)

    @pytest.mark.parametrize("name", PRESETS)
    def test_round_trip_through_json(self, name):
        config = replace(PRESETS[name], data_root=Path("somewhere"), minutes=1.5)
        assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_interval_is_the_papers_formula():
    per_task = torch.rand(600, generator=torch.Generator().manual_seed(0))
    accuracy = evaluate.Accuracy.over(per_task)
    percent = 100 * per_task.double().numpy()
    assert accuracy.mean == pytest.approx(percent.mean(), rel=1e-12)
    assert accuracy.interval == pytest.approx(1.96 * percent.std(ddof=1) / math.sqrt(600), rel=1e-12)


def test_baselines_are_what_they_say(toy_splits):
    """Against scikit-learn, task by task."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    from applications.few_shot.episodes import Sampler

    episodes = Sampler(toy_splits.test, "test", 5, 3, 6, 0, torch.device("cpu")).episodes(4, 0)
    nearest, linear = evaluate.nearest_neighbour(episodes), evaluate.linear_on_pixels(episodes)
    for task in range(4):
        x, q = (getattr(episodes, name)[task].flatten(1).numpy() for name in ("support_x", "query_x"))
        y = episodes.support_y[task].numpy()
        assert (KNeighborsClassifier(1).fit(x, y).predict(q) == nearest[task].numpy()).all()
        expected = LogisticRegression(tol=1e-6, max_iter=1000).fit(x, y).predict(q)
        assert (expected == linear[task].numpy()).mean() > 0.95


@pytest.mark.slow
def test_a_quarter_of_a_minute_of_training_beats_the_pixels(glyph_root, tmp_path):
    """The main job in miniature, in its own process; the whole of it is in docs/few_shot.md."""
    folder = tmp_path / "run"
    arguments = ["--minutes", "0.25", "--eval-tasks", "100", "--data-root", glyph_root, "--out", folder]
    subprocess.run(command(*arguments), cwd=ROOT, check=True, timeout=200)
    found = {name: row["mean"] for name, row in json.loads((folder / "evaluation.json").read_text()).items()}
    trained = next(mean for name, mean in found.items() if name.startswith("implicit MAML, transductive"))
    for baseline in evaluate.BASELINES:
        assert trained > found[baseline] + 10, found


class TestHead:
    """Networks of one's own, by import path, with and without a layer called head."""

    def train(self, model, glyph_root, folder):
        small = [*own(model), "--tasks", "2", "--inner-steps", "2"]
        rest = ["--steps", "2", "--eval-tasks", "2", "--data-root", str(glyph_root), "--out", str(folder)]
        assert main([*small, *rest]) == 0

    def test_a_network_without_one_is_told(self, glyph_root, tmp_path, capsys):
        self.train("headless", glyph_root, tmp_path / "run")
        assert "has no layer called head, so --head zero keeps nothing at zero" in capsys.readouterr().out
        assert main(["evaluate", str(tmp_path / "run"), *own("headless"), "--ways", "3"]) == 2
        assert "with a last layer that is learned" in capsys.readouterr().err

    def test_one_that_starts_elsewhere_is_set_to_zero(self, glyph_root, tmp_path, capsys):
        self.train("headed", glyph_root, tmp_path / "run")
        assert "no layer called head" not in capsys.readouterr().out
        state = RunFolder(tmp_path / "run").load_checkpoint(torch.device("cpu"), CHECKPOINT)["training"]
        assert not state["meta"]["head.weight"].any()
        assert main(["evaluate", str(tmp_path / "run"), *own("headed"), "--ways", "3", "--eval-tasks", "2"]) == 0

    @pytest.mark.parametrize("model", ["deep_head", "first_head"])
    def test_one_that_is_no_linear_layer_of_the_outputs(self, model, glyph_root, tmp_path, capsys):
        """All zeros, it would pass on nothing, and every network would stay at chance."""
        assert main([*own(model), "--data-root", str(glyph_root), "--out", str(tmp_path / "run")]) == 2
        assert "is not one linear layer of 5 outputs" in capsys.readouterr().err
        learned = [*own(model), "--head", "learned", "--tasks", "2", "--inner-steps", "2", "--steps", "2"]
        rest = ["--eval-tasks", "2", "--data-root", str(glyph_root), "--out", str(tmp_path / "run")]
        assert main([*learned, *rest]) == 0

    def test_nothing_but_a_head(self, glyph_root, tmp_path, capsys):
        model = ["--model", "tests.applications.few_shot.test_train:nothing_but_a_head", "--data-root", str(glyph_root)]
        assert main([*model, "--out", str(tmp_path / "run")]) == 2
        assert "nothing is left to learn" in capsys.readouterr().err

    def test_an_evaluation_at_the_end_is_not_overwritten(self, glyph_root, tmp_path):
        folder = tmp_path / "run"
        self.train("headed", glyph_root, folder)
        before = (folder / "evaluation.json").read_bytes()
        assert main(["train", "--resume", str(folder), *own("headed")]) == 0
        assert main(["evaluate", str(folder), *own("headed"), "--eval-tasks", "3"]) == 0
        assert (folder / "evaluation.json").read_bytes() == before
        assert len(list(folder.glob("evaluation-step-2-*.json"))) == 1


def own(model):
    """The option of a network of one's own, which a run that has one needs again."""
    return ["--model", f"tests.applications.few_shot.test_train:{model}"]


def headless(channels, size, ways):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * size**2, ways))


def headed(channels, size, ways):
    layers = {
        "flat": torch.nn.Flatten(),
        "body": torch.nn.Linear(channels * size**2, 8),
        "head": torch.nn.Linear(8, ways),
    }
    return torch.nn.Sequential(OrderedDict(layers))


def deep_head(channels, size, ways):
    head = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, ways))
    body = torch.nn.Linear(channels * size**2, 8)
    return torch.nn.Sequential(OrderedDict(flat=torch.nn.Flatten(), body=body, head=head))


def first_head(channels, size, ways):
    layers = {
        "head": torch.nn.Conv2d(channels, 5, 3, stride=size - 3),
        "flat": torch.nn.Flatten(),
        "last": torch.nn.Linear(20, ways),
    }
    return torch.nn.Sequential(OrderedDict(layers))


def nothing_but_a_head(channels, size, ways):
    return torch.nn.Sequential(OrderedDict(flat=torch.nn.Flatten(), head=torch.nn.Linear(channels * size**2, ways)))
