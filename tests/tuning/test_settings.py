from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import bilevel as bl
from bilevel.tuning import expression, from_json, load, save, to_json

SETTINGS = [
    bl.CG(max_steps=5, preconditioner=bl.Jacobi(num_probes=3)),
    bl.CG(rtol=1e-6),
    bl.Nystrom(7, damping=0.5),
    bl.Identity(0.25),
    bl.Implicit(bl.MINRES(max_steps=9), damping=1e-3),
    bl.Implicit(),
    bl.Implicit(bl.CG(preconditioner=bl.NystromPreconditioner(4)), operator="func"),
    bl.GradientDescent(0.3, max_steps=16, momentum=0.9, safeguard=True),
    bl.GradientDescent((0.3, 0.1), max_steps=2),
    bl.Steps(bl.AdamW(1e-3, betas=(0.5, 0.9)), max_steps=4),
    bl.Steps(bl.SGD(torch.tensor(0.5)), max_steps=4),
    bl.TorchOptim(torch.optim.SGD, max_steps=3, lr=0.1, momentum=0.9),
    bl.TorchOptim(torch.optim.Adam, max_steps=3, betas=(0.9, 0.99)),
    bl.LBFGS(),
    bl.NewtonCG(gtol=1e-4),
    bl.Unroll(checkpoint=True),
    bl.Unroll(checkpoint="tree", mode="mixed"),
    bl.ForwardGradient(4, "orthogonal"),
    bl.Truncated(3),
    bl.SAMA(bl.Adam(1e-2)),
    bl.Anderson(),
    bl.GMRES(),
    bl.Penalty(10.0),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=repr)
def test_json_and_python_make_equal_objects(setting):
    plain = json.loads(json.dumps(to_json(setting)))
    again = from_json(plain)
    pasted = eval(expression(setting), {"bl": bl, "torch": torch})
    assert to_json(again) == to_json(pasted) == to_json(setting)
    assert again == pasted
    assert again == setting


def test_expressions_are_what_one_would_write():
    assert expression(bl.Implicit(bl.CG(max_steps=5))) == "bl.Implicit(bl.CG(max_steps=5))"
    assert expression(bl.GradientDescent(0.3, max_steps=16)) == "bl.GradientDescent(lr=0.3, max_steps=16)"
    assert expression(bl.TorchOptim(torch.optim.Adam, max_steps=3, lr=0.1)) == (
        "bl.TorchOptim(torch.optim.Adam, max_steps=3, lr=0.1)"
    )
    assert expression(bl.Steps(bl.Adam(0.5), max_steps=5)) == "bl.Steps(bl.Adam(lr=0.5), max_steps=5)"


def test_a_file_goes_back_into_a_solve(tmp_path):
    best = {"solver": bl.NewtonCG(gtol=1e-9), "hypergrad": bl.Implicit(bl.CG(rtol=1e-10))}
    save(tmp_path / "best.json", best)
    assert load(tmp_path / "best.json") == best
    problem = bl.problems.Ridge()
    x = problem.hparams.clone().requires_grad_()
    fit = bl.argmin(problem.inner, problem.init, x, **load(tmp_path / "best.json"))
    (found,) = torch.autograd.grad(problem.outer(fit.value, x), x)
    torch.testing.assert_close(found, problem.hypergradient(x.detach()), rtol=1e-7, atol=0)


def test_infinite_numbers_survive_json():
    assert from_json(json.loads(json.dumps(to_json(math.inf)))) == math.inf


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (bl.Implicit(operator=bl.EmpiricalFisher(lambda y, x: y)), "cannot be written"),
        (bl.Steps(bl.SGD(torch.tensor(0.1, requires_grad=True)), max_steps=2), "learned"),
        (bl.External(lambda loss, start: start), "cannot be written"),
        (bl.TorchOptim(lambda params: torch.optim.SGD(params), max_steps=1), "not of torch.optim"),
    ],
)
def test_what_a_file_cannot_hold(setting, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        save(tmp_path / "best.json", {"solver": setting})
    assert not list(tmp_path.iterdir())


def torch_optim(optimizer, max_steps, settings):
    given = f'"optimizer": "{optimizer}", "max_steps": {max_steps}, "settings": {settings}'
    return f'{{"solver": {{"type": "TorchOptim", {given}}}}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no file of solver settings"),
        ('{"type": "CG"}', "names such as 'solver'"),
        ('{"solver": {"type": "System"}}', "'System' is no type of setting"),
        ('{"solver": {"type": "CG", "max_steps": -1}}', "CG cannot be made"),
        ('{"solver": {"type": "CG", "steps": 1}}', "CG cannot be made"),
        ('{"solver": {"type": "TorchOptim", "optimizer": "Nothing", "settings": {}}}', "TorchOptim cannot be made"),
        ("[]", "names such as 'solver'"),
        ("null", "names such as 'solver'"),
        ('{"solver": 3}', "'solver' is 3"),
        ('{"solver": null}', "'solver' is None"),
        ('{"solver": {"type": "CG"}}', "'solver' is CG"),
        ('{"hypergrad": {"type": "GradientDescent"}}', "'hypergrad' is GradientDescent"),
        ('{"solver": {"type": ["CG"]}}', "is no type of setting"),
        ('{"solver": {"type": "float", "value": 3}}', "is no number"),
        ('{"solver": {"type": "float"}}', "is no number"),
        ('{"solver": {"type": "GradientDescent", "max_steps": "many"}}', "max_steps is 'many'"),
        ('{"solver": {"type": "GradientDescent", "max_steps": 1.5}}', "max_steps is 1.5"),
        ('{"solver": {"type": "GradientDescent", "max_steps": true}}', "max_steps is True"),
        ('{"solver": {"type": "GradientDescent", "lr": null}}', "lr is None"),
        ('{"solver": {"type": "GradientDescent", "lr": [0.1, "x"]}}', "lr is"),
        ('{"solver": {"type": "GradientDescent", "safeguard": 1}}', "safeguard is 1"),
        ('{"solver": {"type": "Steps", "rule": {"type": "CG"}}}', "rule is CG"),
        ('{"hypergrad": {"type": "Implicit", "linear_solver": {"type": "SGD"}}}', "linear_solver is SGD"),
        ('{"hypergrad": {"type": "Implicit", "linear_solver": "CG"}}', "linear_solver is 'CG'"),
        ('{"hypergrad": {"type": "Implicit", "operator": "os:system"}}', "operator is 'os:system'"),
        ('{"hypergrad": {"type": "Implicit", "damping": "1"}}', "damping is '1'"),
        (
            '{"solver": {"type": "TorchOptim", "optimizer": "lr_scheduler", "max_steps": 1, "settings": {}}}',
            "no optimizer",
        ),
        (
            '{"solver": {"type": "TorchOptim", "optimizer": "Optimizer", "max_steps": 1, "settings": {}}}',
            "no optimizer",
        ),
        (
            '{"solver": {"type": "TorchOptim", "optimizer": "SGD", "max_steps": "1", "settings": {}}}',
            "max_steps is '1'",
        ),
        (
            '{"solver": {"type": "TorchOptim", "optimizer": "SGD", "max_steps": 1, "settings": {"lr": "x"}}}',
            "SGD|TorchOptim",
        ),
        (torch_optim("SGD", "1", "3"), "TorchOptim cannot"),
        ('{"solver": ' * 3000 + "1" + "}" * 3000, "is no file of solver settings|recursion"),
    ],
    ids=range(32),
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "best.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "best.json")


def test_a_setting_without_a_name_is_told(tmp_path):
    with pytest.raises(TypeError, match=r"settings is LBFGS: give names .*save\('best.json'"):
        save(tmp_path / "best.json", bl.LBFGS())


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.0, None), (None, 2)])
def test_bounds_survive_a_file(bounds, tmp_path):
    for solver in (bl.LBFGS(bounds=bounds), bl.ScipyMinimize(bounds=bounds)):
        save(tmp_path / "b.json", {"solver": solver})
        assert load(tmp_path / "b.json") == {"solver": solver}
        assert eval(expression(solver), {"bl": bl}) == solver


def test_expressions_of_numpy_numbers_and_lists_can_be_run():
    assert expression(bl.CG(rtol=np.float64(1e-3))) == "bl.CG(rtol=0.001)"
    assert eval(expression([bl.CG(), 1.5]), {"bl": bl}) == [bl.CG(), 1.5]


def test_whole_numbers_of_numpy_survive_a_file(tmp_path):
    settings = [
        bl.Implicit(bl.CG(max_steps=np.int64(3), rtol=np.float32(0.5))),
        bl.TorchOptim(torch.optim.SGD, max_steps=np.int64(3), gtol=np.float64(0.5), lr=np.float32(0.5)),
    ]
    for setting in settings:
        save(tmp_path / "best.json", {"setting": setting})
        assert load(tmp_path / "best.json") == {"setting": setting}
        assert "np." not in expression(setting)
        assert eval(expression(setting), {"bl": bl, "torch": torch}) == setting
