"""An evaluation cut in two: what enters a loss, or leaves a module, stands there as a leaf of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._torch import is_functorch_wrapped_tensor


class Cut:
    """Around an evaluation.

    Attributes:
        outputs: the tensors at the cut, with the graph that they have. points: the leaves that took their places.
    """

    def __init__(self, enter: Callable[[Cut, ExitStack], None]):
        self.outputs: list[Tensor] = []
        self.points: list[Tensor] = []
        self._enter, self._stack = enter, ExitStack()
        self._thread = threading.get_ident()

    @classmethod
    def before(cls, loss: Callable[..., Any] | None) -> Cut:
        """At the first argument of ``loss``: a module, or a function that PyTorch lets modes see."""
        if isinstance(loss, nn.Module):
            return cls(lambda cut, stack: cut._hook(stack, loss.register_forward_pre_hook(cut._first_of_call)))
        return cls(lambda cut, stack: cut._enter_mode(stack, loss))

    @classmethod
    def after(cls, module: nn.Module) -> Cut:
        """At what ``module`` returns."""
        return cls(lambda cut, stack: cut._hook(stack, module.register_forward_hook(cut._result_of_call)))

    def __enter__(self) -> Cut:
        self._enter(self, self._stack)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def at(self, tensor: Any) -> Any:
        """The leaf in the place of a tensor that depends on the params; anything else as it is."""
        if not isinstance(tensor, Tensor) or threading.get_ident() != self._thread:
            return tensor
        if is_functorch_wrapped_tensor(tensor):
            raise NotImplementedError(
                "GaussNewton.of cannot look into torch.vmap, under which the objective calls its module: write "
                "GaussNewton(torch.vmap(outputs), torch.vmap(loss), torch.vmap(rest))."
            )
        if not tensor.requires_grad:
            return tensor
        self.outputs.append(tensor)
        self.points.append(tensor.detach().requires_grad_())
        return self.points[-1]

    def _enter_mode(self, stack: ExitStack, loss: Callable[..., Any] | None) -> None:
        if loss is not None:
            stack.enter_context(_Before(loss, self))

    @staticmethod
    def _hook(stack: ExitStack, handle: Any) -> None:
        stack.callback(handle.remove)

    def _first_of_call(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.at(args[0]), *args[1:]) if args else args

    def _result_of_call(self, _: nn.Module, args: tuple[Any, ...], found: Any) -> Any:
        if isinstance(found, tuple | list):
            return type(found)(self.at(part) for part in found)
        return self.at(found)


class _Before(TorchFunctionMode):
    """Cuts where one function of PyTorch is called."""

    def __init__(self, loss: Callable[..., Any], cut: Cut):
        super().__init__()
        self.loss, self.cut = loss, cut

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is self.loss:
            if args:
                args = (self.cut.at(args[0]), *args[1:])
            elif "input" in kwargs:
                kwargs["input"] = self.cut.at(kwargs["input"])
        return func(*args, **kwargs)
