"""Operators compute in the types of their inputs, whatever `torch.autocast` would make of these.

Inverses, sums over chunks and fast weights need the digits of float32: see docs/numerics.md.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Returned = TypeVar("Returned")

DEVICES = ("cpu", "cuda")
"""Devices that operators run on; each has an autocast of its own."""


def without_autocast(function: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """Return the function with autocast switched off while it runs.

    To be put around all that computes in types of its own: operators, the backward passes of their
    `torch.autograd.Function`s, which PyTorch runs apart, and what a layer does with its state.
    """

    @wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Returned:
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return call(*args, **kwargs)
        return function(*args, **kwargs)

    return call
