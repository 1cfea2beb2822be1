"""Masks: which pixels of an image are known. They are named for what they hide."""

import difflib
import math
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from drl_jax.errors import UserError

# Whether pixel (row, column) of an image of size x size is hidden.
_HIDDEN: dict[str, Callable[[Int[np.ndarray, "h 1"], Int[np.ndarray, "1 w"], int], np.ndarray]]
_HIDDEN = {
    "centre": lambda row, column, size: _middle(row, size) & _middle(column, size),
    "left": lambda row, column, size: column < size // 2,
    "right": lambda row, column, size: column >= size // 2,
    "top": lambda row, column, size: row < size // 2,
    "bottom": lambda row, column, size: row >= size // 2,
    "checkerboard": lambda row, column, size: (row + column) % 2 == 0,
}
_RANDOM = "random"


def _middle(i: Int[np.ndarray, "*D"], size: int) -> Bool[np.ndarray, "*D"]:
    """The middle half of 0..size-1."""
    return (i >= size // 4) & (i < size - size // 4)


def named(name: str, size: int, key: Key[Array, ""]) -> Bool[np.ndarray, "size size 1"]:
    """Returns the known pixels under the mask of this name.

    Args:
      name: what is hidden: 'centre' (the middle half of the rows and of the columns),
        'left', 'right', 'top' or 'bottom' (that half), 'checkerboard' (every other pixel),
        or 'random:0.3' (this fraction of the pixels, anywhere).
      size: of the image's sides.
      key: of the random mask.

    Raises:
      UserError: an unknown name, or a fraction outside (0, 1).
    """
    if name in _HIDDEN:
        row, column = np.ogrid[:size, :size]
        hidden = np.broadcast_to(_HIDDEN[name](row, column, size), (size, size))
        return ~hidden[..., np.newaxis]
    kind, _, number = name.partition(":")
    if kind == _RANDOM:
        hide = round(_fraction(name, number) * size**2)
        order = np.asarray(jax.random.permutation(key, size**2))
        return (order >= hide).reshape(size, size, 1)
    near = difflib.get_close_matches(kind, [*_HIDDEN, _RANDOM], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(
        f"mask {name!r} is unknown: {hint}Masks are {', '.join(_HIDDEN)}, {_RANDOM}:0.5, or a "
        "PNG file that is white where pixels are hidden"
    )


def _fraction(name: str, number: str) -> float:
    try:
        fraction = float(number)
    except ValueError:
        fraction = math.nan
    if not 0 < fraction < 1:
        raise UserError(
            f"mask {name!r}: give the fraction of hidden pixels in (0, 1), as in {_RANDOM}:0.5"
        )
    return fraction


def require_mask(known: Bool[np.ndarray, "H W 1"], shape: tuple[int, ...]) -> None:
    """Refuses what cannot be a mask of images of this shape [H, W, C].

    Raises:
      UserError: of another size, of no booleans, or with nothing known or nothing hidden.
    """
    height, width, _ = shape
    if known.shape != (height, width, 1):
        raise UserError(
            f"the mask is {'x'.join(map(str, known.shape))}, the images are {height}x{width}: "
            f"give a mask of {height}x{width}x1"
        )
    if known.dtype != np.bool_:
        raise UserError(f"the mask holds {known.dtype}: give booleans, true where known")
    if known.all():
        raise UserError("the mask hides no pixel: there is nothing to sample")
    if not known.any():
        raise UserError("the mask hides every pixel: for that there is --mode=sample")
