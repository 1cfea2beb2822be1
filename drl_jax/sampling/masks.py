"""Masks for inpainting, named after the region that they hide."""

import difflib
import math
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Bool, Int, Shaped

from drl_jax.errors import UserError
from drl_jax.noise import AnyKey

# (row, column, size) -> whether that pixel of a size x size image is hidden.
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
    """Returns whether i lies in the middle half of 0..size-1."""
    return (i >= size // 4) & (i < size - size // 4)


def named(name: str, size: int, key: AnyKey) -> Bool[np.ndarray, "size size 1"]:
    """Returns the mask of this name, true where a pixel is known.

    Args:
      name: the hidden region: 'centre' (the middle half of the rows and columns); 'left',
        'right', 'top' or 'bottom' (that half); 'checkerboard' (every other pixel); or a random
        fraction of the pixels, such as 'random:0.3'.
      size: height and width of the image.
      key: random key, which only 'random' uses.

    Raises:
      UserError: if the name is unknown, or the fraction is not in (0, 1).
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
    hint = f"did you mean {near[0]!r}? If not, " if near else ""
    raise UserError(
        f"mask {name!r} is unknown: {hint}use {', '.join(_HIDDEN)}, {_RANDOM}:0.5, or a PNG "
        "file with hidden pixels in white"
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


def require_mask(known: Shaped[np.ndarray, "..."], shape: tuple[int, ...]) -> None:
    """Checks that a mask fits images of this shape [H, W, C].

    Raises:
      UserError: if its shape differs, it is not boolean, or all or none of its pixels are
        known.
    """
    height, width, _ = shape
    if known.shape != (height, width, 1):
        raise UserError(
            f"the mask is {'x'.join(map(str, known.shape))}, the images are {height}x{width}: "
            f"give a mask of {height}x{width}x1"
        )
    if known.dtype != np.bool_:
        raise UserError(f"the mask has dtype {known.dtype}: give bool, true where known")
    if known.all():
        raise UserError("the mask hides no pixels, so there is nothing to sample")
    if not known.any():
        raise UserError("the mask hides every pixel: use --mode=sample instead")
