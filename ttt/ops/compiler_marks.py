"""Marks of functions for torch.compile.

PyTorch's own import its compiler at once, which takes seconds that programs without compiled code
need not spend.
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Returned = TypeVar("Returned")
Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """Return what `torch.compiler.disable` does: nothing of the function is compiled."""
    disabled = torch._disable_dynamo(function)

    @wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Returned:
        if "torch._dynamo" in sys.modules:
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)  # nothing can be compiling yet

    return call


def constant_result(function: Function) -> Function:
    """Mark a function as `torch.compiler.assume_constant_result` does: compiled code takes what it
    returns as a constant."""
    vars(function)["_dynamo_marked_constant"] = True
    return function
