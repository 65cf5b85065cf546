"""What the library relies on that PyTorch keeps to itself: a test for each name says what breaks if it goes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

import bilevel
from bilevel import _torch

ROOT = Path(bilevel.__file__).parent


NAMED = ("_sequence_nr", "_current_level", "kineto_results", "_torchdynamo_disable")


def private_names(path):
    """Private modules and attributes of `torch` that a file names."""
    tree = ast.parse(path.read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    of_torch = {alias.name for node in imports if node.module.split(".")[0] == "torch" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            yield from (part for part in parts if part.startswith("_"))
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
            yield from [node.attr] if node.attr.startswith("_") and not node.attr.startswith("__") else []
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in of_torch:
            yield from [node.attr] if node.attr.startswith("_") and not node.attr.startswith("__") else []
        if isinstance(node, ast.Attribute) and node.attr in NAMED:
            yield node.attr
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"torch(\.\w+)*\._\w+", node.value)
        ):
            yield node.value


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_stand_in_one_module(path):
    found = set(private_names(path))
    assert found if path.name == "_torch.py" else not found


def test_pytree():
    """Trees of params, `Solution` as a tree, `map_tasks`: everything that is not one tensor."""
    tree = {"a": [1, (2, 3)], "b": None}
    flat, spec = _torch.pytree.tree_flatten(tree)
    assert _torch.pytree.tree_unflatten(flat, spec) == tree
    assert _torch.pytree.tree_leaves(tree) == flat
    assert _torch.pytree.tree_map_only(int, lambda n: n + 1, tree)["a"] == [2, (3, 4)]
    assert _torch.pytree.tree_structure(tree) == spec
    assert callable(_torch.pytree.register_pytree_node)


def test_dispatch_modes_see_each_operation():
    """`Unroll` asks whether the objective draws random numbers, and whether it may be recorded."""
    seen = []

    class Seen(_torch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(torch.Tag.nondeterministic_seeded in func.tags)
            return func(*args, **(kwargs or {}))

    with Seen():
        torch.dropout(torch.ones(3) + 1, 0.5, train=True)
    assert not seen[0]
    assert any(seen)


def test_levels_of_transforms():
    """Closure conversion: which tensors belong to a transform inside the objective, and which to one around it."""
    assert _torch.maybe_current_level() is None
    seen = []

    def look(x):
        seen.append((_torch.maybe_current_level(), _torch.maybe_get_level(x), _torch.is_functorch_wrapped_tensor(x)))
        return x.sum()

    torch.func.grad(look)(torch.ones(2))
    assert seen == [(1, 1, True)]
    assert not _torch.is_functorch_wrapped_tensor(torch.ones(2))


def test_wrappers_are_opened_and_made_again():
    """`Substitute` puts another tensor under the wrapper of a transform: hypergradients inside of vmap and grad."""

    def batched(x):
        inside = _torch.get_unwrapped(x)
        assert _torch.is_batchedtensor(x)
        assert inside.shape == (3, 2)
        again = _torch._add_batch_dim(2 * inside, _torch.maybe_get_bdim(x), _torch.maybe_get_level(x))
        return again + x

    x = torch.arange(6.0).view(3, 2)
    torch.testing.assert_close(torch.vmap(batched)(x), 3 * x)

    five = torch.full((2,), 5.0)

    def wrapped(x):
        return (_torch._wrap_for_grad(five, _torch.maybe_get_level(x)) * x).sum()

    torch.testing.assert_close(torch.func.grad(wrapped)(torch.ones(2)), torch.full((2,), 5.0))


def test_wrappers_of_a_transform_that_is_left_are_told():
    """A tensor that escaped from a transform is passed on as it is; looking into it would fail."""
    kept = []
    torch.func.grad(lambda x: kept.append(x) or x.sum())(torch.ones(2))
    assert _torch.is_dead_tensor_wrapper(kept[0])


def test_a_tangent_is_seen_outside_of_transforms_alone():
    """A captured dual number: without the block the solve would not know of it, and its tangent would be zero."""
    seen = []

    def look(y, dual):
        seen.append(torch.autograd.forward_ad.unpack_dual(dual).tangent)
        with _torch.outside_transforms():
            seen.append(torch.autograd.forward_ad.unpack_dual(dual).tangent)
        return y.sum()

    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones(2), torch.full((2,), 3.0))
        torch.func.grad(look)(torch.ones(2), dual)
    assert seen[0] is None
    assert seen[1].tolist() == [3.0, 3.0]


def test_the_stack_of_transforms():
    """Forward mode over forward mode through a custom function, which PyTorch gets silently wrong, is refused."""
    seen = []

    def look(x):
        seen.append([interpreter.key() for interpreter in _torch.get_interpreter_stack()])
        return x.sum()

    torch.func.jvp(look, (torch.ones(2),), (torch.ones(2),))
    assert seen == [[_torch.TransformType.Jvp]]


def test_the_old_vmap_is_told():
    """A backward pass with is_grads_batched=True would mix the problems: it is refused."""
    x = torch.ones(2, requires_grad=True)
    seen = []
    y = 2 * x
    y.register_hook(lambda grad: seen.append(_torch.is_legacy_batchedtensor(grad)))
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True)
    assert seen == [True]
    assert not _torch.is_legacy_batchedtensor(x)


def test_number_of_function_modes():
    """Nested solves resolve captured tensors through an outer `Substitute`; tasks stay in the thread of their modes."""
    assert _torch.num_function_modes() == 0
    with TorchFunctionMode():
        assert _torch.num_function_modes() == 1


def test_dual_levels():
    """A Hessian product inside of a forward-mode pass has to go by reverse mode, since forward mode does not nest."""
    assert not _torch.in_dual_level()
    with forward_ad.dual_level():
        assert _torch.in_dual_level()


def test_sequence_numbers():
    """What is older than a trace was captured by the objective; what is younger was made inside of it."""
    x = torch.ones(2, requires_grad=True)
    first, second = x + 1, x + 2
    assert _torch.sequence_number(first.grad_fn) < _torch.sequence_number(second.grad_fn)
    counted = []
    thread = threading.Thread(target=lambda: counted.append(_torch.sequence_number((x + 3).grad_fn)))
    thread.start()
    thread.join()
    assert isinstance(counted[0], int)


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="PyTorch without oneDNN")
def test_the_packed_product():
    """Thin products on a CPU in `bilevel.nn`; without it they are slower, not wrong."""
    a, b = torch.randn(3, 5), torch.randn(4, 5)
    torch.testing.assert_close(_torch.packed_product(a, b), a @ b.mT)


def test_events_of_a_profile():
    """The peak memory that `compare_methods` reports on a CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.empty(1000)
    sizes = [event.nbytes() for event in _torch.profiled_events(profile) if event.name() == "[memory]"]
    assert max(sizes) >= 4000


def test_a_shared_module_gets_its_own_tensors_back():
    """Objectives that call a network with a module at two places: it would be left with the tensors of the call."""
    shared = torch.nn.Linear(2, 2)
    net = torch.nn.Sequential(shared, shared)
    own, given = dict(net.named_parameters(remove_duplicate=False)), torch.zeros(2, 2)
    with _torch.swapped_last_in_first_out():
        torch.func.functional_call(net, {"0.weight": given, "1.weight": given}, (torch.ones(1, 2),), tie_weights=False)
    assert shared.weight is own["0.weight"]


def test_the_compiler_is_not_loaded_before_anything_is_compiled():
    """`import bilevel` and a solve would take seconds more."""
    program = "import bilevel, bilevel._torch as t; print(t.compiler_is_loaded()); import torch._dynamo; "
    done = subprocess.run(
        [sys.executable, "-c", f"{program}print(t.compiler_is_loaded())"], capture_output=True, text=True
    )
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_a_compiled_caller_breaks_its_graph():
    """A solve inside of a compiled training step: the compiler would follow its data-dependent loops."""

    def solve(x):
        return x * 2 if bool(x.sum() > 0) else x

    _torch.break_graph(solve)
    one = torch.ones(2)
    torch.testing.assert_close(torch.compile(lambda x: solve(x) + 1, backend="eager")(one), 3 * one)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda x: solve(x) + 1, backend="eager", fullgraph=True)(one)


def test_forward_mode_inside_of_a_jvp():
    """Forward mode over forward mode of `bl.nn`: the second derivative would be zero without a word."""
    seen = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_forward(*inputs)

        @staticmethod
        def jvp(ctx, tangent):
            seen.append(torch._C._is_fwd_grad_enabled())
            with _torch.forward_grad_enabled():
                seen.append(torch._C._is_fwd_grad_enabled())
            return 2 * ctx.saved_tensors[0] * tangent

    with forward_ad.dual_level():
        Square.apply(forward_ad.make_dual(torch.ones(2), torch.ones(2)))
    assert seen == [False, True]


def test_passes_without_the_checks_of_autograd():
    """Gradients and products of small problems; the first one of a process does not load SymPy."""
    x, unused = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True), torch.zeros(2, requires_grad=True)
    loss = (x**3).sum()
    slope, none = _torch.pull([loss], [x, unused], [torch.ones_like(loss)], create_graph=True)
    assert none is None
    torch.testing.assert_close(slope, 3 * x**2)
    along = torch.tensor([1.0, -1.0], dtype=torch.float64)
    for _ in range(2):
        (product,) = _torch.pull([slope], [x], [along], retain_graph=True)
        torch.testing.assert_close(product, torch.tensor([12.0, -18.0], dtype=torch.float64))
        assert not product.requires_grad
    assert x.grad is None  # nothing is accumulated
    _torch.pull([slope], [x], [along])
    with pytest.raises(RuntimeError, match="second time"):
        _torch.pull([slope], [x], [along])


def test_passes_are_seen_by_modes():
    seen = []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.ones(2, requires_grad=True)
    loss = x.square().sum()
    with Seen():
        (slope,) = _torch.pull([loss], [x], [torch.ones(())])
    assert torch.autograd.grad in seen
    assert slope.tolist() == [2, 2]
