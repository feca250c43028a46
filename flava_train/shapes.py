"""Shapes in signatures: those of jaxtyping if it is installed, otherwise without effect.

Training needs only torch and numpy; the tests have jaxtyping and check every shape.
"""

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Shaped, UInt

    Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
else:
    Array = np.ndarray
    try:
        from jaxtyping import Bool, Float, Int, Shaped, UInt
    except ImportError:

        class _Unchecked:
            """`Float[Tensor, "b d"]` is `Tensor`."""

            def __class_getitem__(cls, item: tuple[type, str]) -> type:
                return item[0]

        Bool = Float = Int = Shaped = UInt = _Unchecked

__all__ = ["Array", "Bool", "Float", "Int", "Shaped", "UInt"]
