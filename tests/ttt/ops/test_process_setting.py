"""A setting of the whole process, held by several threads."""

import torch
from moshi.utils import compile as moshi_compile

from ttt.layers.execution import eager_on_cpu
from ttt.ops.process_setting import ProcessSetting


class Setting:
    """One that a program has set to "fast"."""

    def __init__(self) -> None:
        self.value = "fast"
        self.exact = ProcessSetting("exact", read=lambda: self.value, write=self.set)

    def set(self, value: str) -> None:
        self.value = value


def test_the_first_that_leaves_takes_it_from_no_other() -> None:
    setting = Setting()
    first, second = setting.exact.holding(), setting.exact.holding()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert setting.value == "exact"
    second.__exit__(None, None, None)
    assert setting.value == "fast"


def test_what_is_set_in_between_is_set_afterwards() -> None:
    setting = Setting()
    with setting.exact.holding():
        setting.set("faster")
        with setting.exact.holding():
            assert setting.value == "exact"
        assert setting.value == "exact"
    assert setting.value == "faster"
    with setting.exact.holding():
        setting.set("fastest")
    assert setting.value == "fastest"


def test_an_error_leaves_it_as_it_was() -> None:
    setting = Setting()
    try:
        with setting.exact.holding():
            raise ValueError
    except ValueError:
        assert setting.value == "fast"
    with setting.exact.holding():
        assert setting.value == "exact"
    assert setting.value == "fast"


def test_two_models_that_compute_at_once_leave_moshi_as_it_was() -> None:
    """The first that is done must not have the other compile, nor the last forbid it for good."""
    before = moshi_compile._compile_disabled
    first, second = (eager_on_cpu(torch.device("cpu")) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert moshi_compile._compile_disabled
    second.__exit__(None, None, None)
    assert moshi_compile._compile_disabled == before
