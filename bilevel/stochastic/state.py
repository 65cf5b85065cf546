"""What a `Stochastic.state_dict` must be to be taken: compared as a whole, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Layout = dict[str, Tensor]
"""Names and what stands under them: tensors of the right shape and dtype, without values (on the meta device)."""


def blank(tensor: Tensor) -> Tensor:
    """Its shape and dtype."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def check_state(
    state: Any, settings: Mapping[str, Any], params: Mapping[str, Layout], kept: Mapping[str, Layout]
) -> None:
    """Refuse a state that is not of this method.

    Args:
        settings: entries that must be the same.
        params: for each level the layout of its params, in order; in the state they are a list.
        kept: entries that are of this layout, or empty.

    Raises:
        ValueError: it says what the state has, and what the method has.
    """
    given = state if isinstance(state, Mapping) else {}
    for name, expected in settings.items():
        if name in given and given[name] != expected:
            raise ValueError(f"state has {name} {given[name]}, this method has {expected}.")
    missing = {"num_steps", *settings, *params, *kept} - set(given)
    if missing:
        raise ValueError(f"state lacks {', '.join(sorted(missing))}: it is no state_dict of a stochastic method.")
    steps = state["num_steps"]
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"state has num_steps {steps!r}: a whole number is needed, 0 or more.")
    for name, layout in params.items():
        found = state[name]
        if not isinstance(found, Sequence) or len(found) != len(layout):
            raise ValueError(f"state has {name} that are no list of {len(layout)} tensors.")
        _check_layout(name, dict(zip(layout, found, strict=True)), layout)
    for name, layout in kept.items():
        if steps or state[name]:
            _check_layout(name, state[name], layout)


def _check_layout(name: str, found: object, expected: Layout) -> None:
    if not isinstance(found, Mapping) or list(found) != list(expected):
        names = list(found) if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"state has {name} {names}, this method has {list(expected)}, in this order.")
    for key, blank in expected.items():
        value = found[key]
        if not isinstance(value, Tensor):
            raise ValueError(f"state has a {type(value).__name__} as {key!r} of {name}: a tensor is needed.")
        if value.shape != blank.shape:
            raise ValueError(
                f"state has {name} of shapes {tuple(value.shape)} at {key!r}, this method has {tuple(blank.shape)}."
            )
        if value.dtype != blank.dtype:
            raise ValueError(f"state has {name} of {value.dtype} at {key!r}, this method has {blank.dtype}.")
