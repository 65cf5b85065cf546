"""The two functions that carry every derivative, of any order, in both modes, and under `torch.func`.

The solution y*(x), and the solution u of the linear system J(y*, x)^T u = g: the derivative of each is made of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._torch import (
    FunctionContext,
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_dead_tensor_wrapper,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
    without_saved_tensors_hooks,
)
from ..closure import in_transform
from ..context import uncompiled
from ..problem import Problem
from ..ranks import SAME_GRADIENT
from ..solution import Solution
from ..tree import filled, is_continuous
from .base import Pulled
from .call import Call, inspect, measured
from .implicit import Implicit
from .one_step import OneStep
from .seen import Seen


def solution(call: Call, start: list[Tensor], hparams: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Leaves of the solution, differentiable, and the stats of the solve."""
    out = _Solution.apply(call, *start, *hparams)
    stats = dict(zip(call.findings.names, out[call.num_leaves :], strict=True))
    if call.findings.later is not None and not in_transform():
        call.findings.later.codes = stats["result"]
    return list(out[: call.num_leaves]), stats


class _Solution(torch.autograd.Function):
    """``y*(x)``. Backward: ``u = J^{-T} g``, then ``-(d_x r)^T u``. Forward mode: ``-J^{-1} d_x r t``."""

    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        start, hparams = call.split(tensors)
        findings = call.findings

        def measure(found: Solution) -> Solution:
            params = [leaf.clone() for leaf in problem.raveler.unravel(found.value.detach())]
            findings.found, findings.seen, findings.ranks = found, None, problem.ranks
            findings.point = point = call.point(params, [tensor.detach() for tensor in hparams])
            at = point.linearization()
            residual = point.raveler.ravel([r.detach() for r in at.residual])
            findings.seen = point.seen = Seen.of(problem, at.loss, residual)
            if isinstance(problem, Problem) and "loss" not in found.stats and call.may_be_random(problem):
                found = found.with_stats(loss=problem.losses(found.value))
            return measured(found, residual, None if at.loss is None else at.loss.detach())

        with without_saved_tensors_hooks():  # a checkpoint counts, and a solve is not as long the second time
            problem = call.problem or call.statement.problem(start, hparams, call.batch_dims)
            found = call.search(problem, measure, partial(setattr, findings, "later"), call.place)
        assert findings.point is not None
        findings.point.meet_hooks()
        findings.found, findings.names = found, sorted(found.stats)
        inspect(findings, findings.point.linearization(), second=isinstance(call.hypergrad, Implicit | OneStep))
        value = [leaf.clone() for leaf in findings.point.params]
        return (*value, *[found.stats[name].clone() for name in findings.names])

    @staticmethod
    def setup_context(ctx: FunctionContext, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *tensors = inputs
        ctx.call = call
        _, hparams = call.split(tensors)
        kept = (*output[: call.num_leaves], *hparams)
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)
        ctx.mark_non_differentiable(*output[call.num_leaves :])

    @staticmethod
    @uncompiled
    def backward(ctx: FunctionContext, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        params, hparams = call.split(_saved(ctx))
        cotangents = filled(grads[: call.num_leaves], params)
        _refuse_legacy_vmap(cotangents)
        # The pull of a torch.func.vjp may be called when its transform is left, and without grad.
        wrapped = any(is_functorch_wrapped_tensor(tensor) for tensor in (*params, *hparams, *cotangents))
        if torch.is_grad_enabled() or in_transform() or wrapped:
            pulled = _differentiable_pull(call, params, hparams, cotangents, ctx.needs_input_grad[-len(hparams) :])
        else:
            pulled = _plain_pull(call, params, hparams, cotangents)
        none: list[Tensor | None] = [None] * call.num_leaves
        return (None, *(pulled.start or none), *pulled.hparams)

    @staticmethod
    def jvp(ctx: FunctionContext, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        _implicit(call, "a forward-mode derivative")
        _refuse_nested_forward_mode()
        _refuse_legacy_vmap([tangent for tangent in tangents if tangent is not None])
        params, hparams = call.split(_saved(ctx))
        moved = call.split(tangents)[1]
        right = _push(lambda tensors: call.statement.residual(params, tensors), hparams, moved)
        tangent = _Adjoint.apply(call, False, *[-r for r in right], *params, *hparams)
        return (*tangent, *[None] * len(call.findings.names))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: Call, *tensors: Tensor) -> tuple[Any, Any]:
        dims = in_dims[1:]
        start_dims, hparam_dims = call.split(dims)
        start, hparams = call.split(tensors)
        batched = [_to_front(leaf, dim, info.batch_size) for leaf, dim in zip(start, start_dims, strict=True)]
        out = _Solution.apply(call.vmapped(hparam_dims), *batched, *hparams)
        return out, (0,) * len(out)


class _Adjoint(torch.autograd.Function):
    """``u`` of ``J^T u = g`` (transpose) or ``J u = g``, as a function of g, y and x."""

    @staticmethod
    def forward(call: Call, transpose: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        right, params, hparams = call.split(tensors, 2)
        point = call.point([leaf.detach() for leaf in params], [tensor.detach() for tensor in hparams])
        point.state = None
        implicit = _implicit(call, "a linear solve")
        raveler = point.raveler
        solved = implicit.solve_at(point, raveler.ravel([r.detach() for r in right]), transpose=transpose)
        call.keep(solved, point)
        return tuple(leaf.clone() for leaf in raveler.unravel(solved.value))

    @staticmethod
    def setup_context(ctx: FunctionContext, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, ctx.transpose, *tensors = inputs
        _, params, hparams = ctx.call.split(tensors, 2)
        kept = (*output, *params, *hparams)
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    @uncompiled
    def backward(ctx: FunctionContext, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        _refuse_layer_norm(call)
        u, params, hparams = call.split(_saved(ctx), 2)
        cotangents = filled(grads, u)
        w = list(_Adjoint.apply(call, not ctx.transpose, *cotangents, *params, *hparams))
        left, right = (u, w) if ctx.transpose else (w, u)
        chosen = _floating(hparams)

        def bilinear(point: list[Tensor], tensors: list[Tensor]) -> Tensor:
            """``<J^T left, right>``"""
            full = _replaced(hparams, chosen, tensors)
            _, pull = _vjp(lambda leaves: call.statement.residual(leaves, full), point)
            (pulled,) = pull(left)
            return torch.stack([(a * b).sum() for a, b in zip(pulled, right, strict=True)]).sum()

        by_params, by_chosen = torch.func.grad(bilinear, argnums=(0, 1))(params, [hparams[i] for i in chosen])
        by_hparams: list[Tensor | None] = [None] * len(hparams)
        for index, grad in zip(chosen, by_chosen, strict=True):
            by_hparams[index] = -grad
        return (None, None, *w, *[-grad for grad in by_params], *by_hparams)

    @staticmethod
    def jvp(ctx: FunctionContext, _: None, __: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        call: Call = ctx.call
        _refuse_layer_norm(call)
        _refuse_nested_forward_mode()
        u, params, hparams = call.split(_saved(ctx), 2)
        by_right, by_params, by_hparams = call.split(tangents, 2)

        def product(tensors: list[Tensor]) -> list[Tensor]:
            """``J^T u`` or ``J u`` at these params and hparams."""
            point, full = tensors[: call.num_leaves], tensors[call.num_leaves :]
            if ctx.transpose:
                _, pull = _vjp(lambda leaves: call.statement.residual(leaves, full), point)
                return pull(u)[0]
            return _push(lambda leaves: call.statement.residual(leaves, full), point, u)

        moved = _push(product, [*params, *hparams], [*by_params, *by_hparams])
        right = [m if r is None else r - m for r, m in zip(filled(by_right, u), moved, strict=True)]
        turned: tuple[Tensor, ...] = _Adjoint.apply(call, ctx.transpose, *right, *params, *hparams)
        return turned

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: Call, transpose: bool, *tensors: Tensor) -> tuple[Any, Any]:
        right, params, hparams = call.split(tensors, 2)
        right_dims, params_dims, hparam_dims = call.split(in_dims[2:], 2)
        both = zip([*right, *params], [*right_dims, *params_dims], strict=True)
        batched = [_to_front(tensor, dim, info.batch_size) for tensor, dim in both]
        out = _Adjoint.apply(call.vmapped(hparam_dims), transpose, *batched, *hparams)
        return out, (0,) * len(out)


class _Pull(torch.autograd.Function):
    """The backward pass of a method that has no derivative of its own."""

    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        cotangents, params, hparams = call.split(tensors, 2)
        pulled = _plain_pull(call, params, hparams, cotangents)
        grads = [torch.zeros_like(h) if g is None else g for g, h in zip(pulled.hparams, hparams, strict=True)]
        return (*(pulled.start or [torch.zeros_like(leaf) for leaf in params]), *grads)

    @staticmethod
    def setup_context(ctx: FunctionContext, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call = inputs[0]

    @staticmethod
    @uncompiled
    def backward(ctx: FunctionContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise _first_only(ctx.call, "a second derivative")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: Call, *tensors: Tensor) -> tuple[Any, Any]:
        cotangents, params, hparams = call.split(tensors, 2)
        first_dims, second_dims, hparam_dims = call.split(in_dims[1:], 2)
        both = zip([*cotangents, *params], [*first_dims, *second_dims], strict=True)
        batched = [_to_front(tensor, dim, info.batch_size) for tensor, dim in both]
        moved = [
            _to_front(tensor, dim, info.batch_size).clone() for tensor, dim in zip(hparams, hparam_dims, strict=True)
        ]
        out = _Pull.apply(call.vmapped([0] * len(hparams)), *batched, *moved)
        return out, (0,) * len(out)


def _saved(ctx: FunctionContext) -> list[Tensor]:
    """What was saved, without the wrappers of transforms that are left.

    In another transform at the level of theirs PyTorch takes them for its own, and ends with an error ("escaped?").
    """
    found = []
    for tensor in ctx.saved_tensors:
        while is_dead_tensor_wrapper(tensor):
            tensor = get_unwrapped(tensor)
        found.append(tensor)
    return found


@without_saved_tensors_hooks()
def _plain_pull(call: Call, params: list[Tensor], hparams: list[Tensor], cotangents: list[Tensor]) -> Pulled:
    """The pull of the method, outside of all transforms; the graph that the solve ended with serves once."""
    point = call.findings.point
    if point is None or point.params[0].shape != params[0].shape or not _same(point.hparams, hparams):
        point = call.point([leaf.detach() for leaf in params], [tensor.detach() for tensor in hparams])
    if call.findings.ranks is not None:
        call.findings.ranks.check_same(cotangents, SAME_GRADIENT)
    pulled = call.check_finite(call.hypergrad.pull(point, point.raveler.ravel([g.detach() for g in cotangents])))
    point.release()
    call.keep(pulled.adjoint, point)
    return pulled


def _differentiable_pull(
    call: Call, params: list[Tensor], hparams: list[Tensor], cotangents: list[Tensor], needed: Sequence[bool]
) -> Pulled:
    """The same as a composition of differentiable functions."""
    if not isinstance(call.hypergrad, Implicit):
        out = list(_Pull.apply(call, *cotangents, *params, *hparams))
        start, grads = call.split(out)
        return Pulled(grads, start if call.hypergrad.reaches_init else None)
    if call.findings.fused:
        raise NotImplementedError(
            f"A derivative under torch.func, or a second one, was asked for through the fused {call.findings.fused} in "
            "training mode, where PyTorch is silently wrong by several percent. Take bilevel.nn.batch_norm, "
            "or write the norm with torch.var_mean and rsqrt."
        )
    u = _Adjoint.apply(call, True, *cotangents, *params, *hparams)
    chosen = [index for index in _floating(hparams) if needed[index]]
    by_hparams: list[Tensor | None] = [None] * len(hparams)
    if chosen:

        def residual(tensors: list[Tensor]) -> list[Tensor]:
            return call.statement.residual(params, _replaced(hparams, chosen, tensors))

        _, pull = _vjp(residual, [hparams[index] for index in chosen])
        for index, grad in zip(chosen, pull([-part for part in u])[0], strict=True):
            by_hparams[index] = grad
    pulled = Pulled(by_hparams)
    hidden = in_transform() or any(is_functorch_wrapped_tensor(tensor) for tensor in (*params, *hparams, *cotangents))
    return pulled if hidden else call.check_finite(pulled)


def _implicit(call: Call, what: str) -> Implicit:
    if isinstance(call.hypergrad, Implicit):
        return call.hypergrad
    raise _first_only(call, what)


def _first_only(call: Call, what: str) -> NotImplementedError:
    name = type(call.hypergrad).__name__
    return NotImplementedError(
        f"{what} was asked for through hypergrad={name}(...), which gives first derivatives in reverse mode only. "
        "Use hypergrad=Implicit(), which has all of them, or Unroll() outside of torch.func."
    )


def _push(
    fn: Callable[[list[Tensor]], list[Tensor]], at: list[Tensor], tangents: Sequence[Tensor | None]
) -> list[Tensor]:
    """The derivative of ``fn`` along tangents; None stands for zero.

    As the derivative of a vector-Jacobian product by its cotangent: reverse mode nests where forward mode does not.
    """
    moving = {i: tangent for i, tangent in enumerate(tangents) if tangent is not None and is_continuous(at[i])}
    chosen = list(moving)
    out, pull = _vjp(lambda moved: fn(_replaced(at, chosen, moved)), [at[index] for index in chosen])
    if not chosen:
        return [torch.zeros_like(o) for o in out]
    _, push = _vjp(lambda cotangents: pull(cotangents)[0], [torch.zeros_like(o) for o in out])
    return push(list(moving.values()))[0]


def _vjp(
    fn: Callable[[list[Tensor]], list[Tensor]], at: list[Tensor]
) -> tuple[list[Tensor], Callable[[list[Tensor]], tuple[list[Tensor]]]]:
    out, pull = torch.func.vjp(fn, at)  # type: ignore[misc]
    return out, pull


def _replaced(tensors: Sequence[Tensor], chosen: Sequence[int], new: Sequence[Tensor]) -> list[Tensor]:
    full = list(tensors)
    for index, tensor in zip(chosen, new, strict=True):
        full[index] = tensor
    return full


def _floating(tensors: Sequence[Tensor]) -> list[int]:
    return [index for index, tensor in enumerate(tensors) if is_continuous(tensor)]


def _to_front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether these are the same memory, so that a kept graph still belongs to them; sparse ones do not show it."""
    return len(a) == len(b) and all(
        x.layout == y.layout == torch.strided and x.is_set_to(y) and x._version == y._version
        for x, y in zip(a, b, strict=True)
    )


def _refuse_layer_norm(call: Call) -> None:
    if call.findings.layer_norm:
        raise NotImplementedError(
            "A second derivative was asked for through layer_norm, whose third derivative is silently wrong by "
            "several percent in PyTorch. Use group_norm, rms_norm, or a norm written with torch.var_mean and rsqrt."
        )


def _refuse_nested_forward_mode() -> None:
    stack = get_interpreter_stack() or []
    if sum(interpreter.key() == TransformType.Jvp for interpreter in stack) > 1:
        raise NotImplementedError(
            "Forward mode over forward mode was asked for (jacfwd of jacfwd, jvp of jvp): PyTorch is silently wrong "
            "there for every custom function. Use torch.func.hessian, which is jacfwd of jacrev, or jacrev of jacfwd."
        )


def _refuse_legacy_vmap(tensors: Sequence[Tensor]) -> None:
    if any(is_legacy_batchedtensor(tensor) for tensor in tensors):
        raise NotImplementedError(
            "A derivative in several directions at once (is_grads_batched=True, or torch.autograd.functional with "
            "vectorize=True) does not work here: use torch.func.jacrev, torch.func.jacfwd or torch.func.vmap."
        )
