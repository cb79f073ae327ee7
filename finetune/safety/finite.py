"""Numbers that are none."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def all_finite(values: "Tensor") -> "Tensor":
    """Return whether no value is NaN or infinite: a boolean without dimensions, on their device.

    The least and the largest say so, as NaN is both: on a CPU a hundred times faster than to ask
    each value of bfloat16.
    """
    if not values.is_floating_point() or not values.numel():
        return values.isfinite().all()
    if values.element_size() == 1:  # of 8 bits, which have no order of their own here
        values = values.float()
    least, largest = values.aminmax()
    return least.isfinite() & largest.isfinite()
