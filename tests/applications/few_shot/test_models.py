from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.functional import cross_entropy

import bilevel as bl
from applications.few_shot.models import BatchStatNorm, Conv4, FullyConnected, build, inductive
from applications.frame.errors import UserError
from applications.frame.norm import ImageNorm
from bilevel.linalg.curvature import hessian
from bilevel.problem import Problem
from tests.conformance import relative_error
from tests.linalg.test_curvature import check_products


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        # The parameter counts of the papers' networks.
        ({"halve": "stride"}, 113_221),
        ({"halve": "pool"}, 112_261),
        ({"halve": "stride", "ways": 20}, 117_076),
        ({"halve": "pool", "ways": 20}, 113_236),
    ],
)
def test_conv4_is_the_papers(settings, count):
    assert sum(p.numel() for p in Conv4(**settings).parameters()) == count


def test_batch_norm_is_torchs():
    x, ours, theirs = torch.randn(6, 4, 5, 5), BatchStatNorm(4), nn.BatchNorm2d(4, track_running_stats=False)
    torch.testing.assert_close(ours(x), theirs(x))


def test_image_norm_is_torchs_group_norm():
    x, ours, theirs = torch.randn(6, 16, 5, 5), ImageNorm(16), nn.GroupNorm(8, 16)
    torch.testing.assert_close(ours(x), theirs(x))


def test_inductive_queries_do_not_see_each_other():
    torch.manual_seed(0)
    net = Conv4(halve="stride", width=8)
    nn.init.normal_(net.head.weight)
    support, queries = torch.rand(5, 1, 28, 28), torch.rand(7, 1, 28, 28)
    with inductive(5):
        together = net(torch.cat([support, queries]))[5:]
        alone = torch.cat([net(torch.cat([support, query[None]]))[5:] for query in queries])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    outside = net(queries)
    assert (together - outside).abs().max() > 1e-2
    assert not torch.allclose(outside, torch.cat([net(query[None]) for query in queries]), atol=1e-3)


def test_inductive_statistics_are_of_the_support_and_the_query_itself():
    norm, support, query = BatchStatNorm(3), torch.randn(4, 3, 5, 5), torch.randn(1, 3, 5, 5)
    joined = torch.cat([support, query])
    with inductive(4):
        found = norm(joined)
    torch.testing.assert_close(found[4:], nn.BatchNorm2d(3, track_running_stats=False)(joined)[4:])
    torch.testing.assert_close(found[:4], nn.BatchNorm2d(3, track_running_stats=False)(support))


@pytest.mark.parametrize("halve", ["pool", "stride"])
def test_conv4_is_the_network_of_torchs_layers(halve):
    """Pooling before the norm and leaving out biases changes no value and no gradient, whatever the signs."""
    torch.manual_seed(0)
    net = Conv4(2, 28, 5, width=8, halve=halve).double()
    for name, param in net.named_parameters():
        if "norm" in name or "head" in name or "bias" in name:
            nn.init.normal_(param)
    x, y = torch.randn(6, 2, 28, 28, dtype=torch.float64), torch.arange(6) % 5
    out = plain_conv4(net, x, halve)
    torch.testing.assert_close(net(x), out)
    ours = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(F.cross_entropy(out, y), list(net.parameters()))
    for name, a, b in zip(dict(net.named_parameters()), ours, theirs, strict=True):
        assert b.abs().max() < 1e-12 if a is None else (a - b).abs().max() < 1e-12, name


def plain_conv4(net, x, halve):
    for block in net.features[:4]:
        convolution, norm = block.convolution, block.norm
        x = F.conv2d(x, convolution.weight, convolution.bias, stride=2 if halve == "stride" else 1, padding=1)
        x = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True).relu()
        x = F.max_pool2d(x, 2) if halve == "pool" else x
    return F.linear(x.flatten(1), net.head.weight, net.head.bias)


@pytest.mark.parametrize("name", ["conv4", "fc"])
def test_untrained_networks_prefer_no_class(name):
    logits = build(name, 1, 28, 5)(torch.rand(3, 1, 28, 28))
    assert logits.shape == (3, 5)
    assert not logits.any()


def tiny(channels, image_size, ways):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size**2, ways))


def with_running_statistics(channels, image_size, ways):
    return nn.Sequential(nn.BatchNorm2d(channels), tiny(channels, image_size, ways))


def of_the_batch(channels, image_size, ways):
    return nn.Sequential(nn.BatchNorm2d(channels, track_running_stats=False), tiny(channels, image_size, ways))


def with_dropout(channels, image_size, ways):
    return nn.Sequential(nn.Dropout(0.5), tiny(channels, image_size, ways))


class Bug(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1) + None)


def with_a_bug(channels, image_size, ways):
    return Bug(channels * image_size**2, ways)


def not_finite(channels, image_size, ways):
    net = tiny(channels, image_size, ways)
    nn.init.constant_(net[1].bias, math.inf)
    return net


def test_any_module_by_import_path():
    assert build("tests.applications.few_shot.test_models:tiny", 1, 28, 5)(torch.rand(2, 1, 28, 28)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", "neither 'conv4' nor 'fc' nor an import path"),
        ("no.such.module:net", "cannot be imported"),
        ("tests.applications.few_shot.test_models:missing", "cannot be imported"),
        ("tests.applications.few_shot.test_models:with_running_statistics", "Take BatchStatNorm"),
        ("tests.applications.few_shot.test_models:of_the_batch", "would depend on the other queries"),
        ("tests.applications.few_shot.test_models:with_dropout", r"by torch.vmap[\s\S]*no random numbers \(dropout"),
        ("tests.applications.few_shot.test_models:not_finite", "its parameter 1.bias begins with values that are not"),
        ("tests.applications.few_shot.test_models:with_a_bug", r"TypeError: [\s\S]*, at \S*test_models.py:\d+"),
    ],
)
def test_bad_models(name, message):
    with pytest.raises(UserError, match=message):
        build(name, 1, 28, 5)


@pytest.mark.parametrize("mode", ["graph", "func"])
@pytest.mark.parametrize("layer", [lambda: BatchStatNorm(3), lambda: ImageNorm(3, groups=1)], ids=["batch", "image"])
def test_hessian_products_through_the_norms(layer, mode):
    check_products(layer(), mode)


@pytest.mark.parametrize("net", [Conv4(1, 28, 3, width=8), FullyConnected(1, 28, 3)], ids=["conv4", "fc"])
def test_both_modes_agree_on_the_shipped_networks(net):
    torch.manual_seed(0)
    net = net.double()
    x, y = torch.randn(2, 6, 1, 28, 28, dtype=torch.float64), torch.arange(6) % 3

    def loss(params, x):
        return cross_entropy(functional_call(net, params, (x,)), y)

    start = bl.tree.tree_map(lambda p: p + 0.1 * torch.randn(2, *p.shape), dict(net.named_parameters()))
    problem = Problem(torch.vmap(loss), start, (x,))
    at, v = problem.linearize(problem.start.y), torch.randn_like(problem.start.y)
    assert relative_error(hessian(problem, at, "func") @ v, hessian(problem, at, "graph") @ v) <= 1e-10
