"""Masks for inpainting, named after what they hide of an image or another example."""

import difflib
import functools
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Int, Shaped

from drl_jax.errors import UserError
from drl_jax.noise import AnyKey

# (positions along each axis, size) -> whether that value of an example with `size` values along
# each axis is hidden. The last axis goes to the right; it is time in a signal.
_HIDDEN: dict[str, Callable[[Sequence[Int[np.ndarray, "..."]], int], np.ndarray]] = {
    "centre": lambda at, size: functools.reduce(np.logical_and, [_middle(i, size) for i in at]),
    "left": lambda at, size: at[-1] < size // 2,
    "right": lambda at, size: at[-1] >= size // 2,
    "top": lambda at, size: at[-2] < size // 2,
    "bottom": lambda at, size: at[-2] >= size // 2,
    "checkerboard": lambda at, size: functools.reduce(np.add, at) % 2 == 0,
}
_VERTICAL = ("top", "bottom")
_RANDOM = "random"


def _middle(i: Int[np.ndarray, "*D"], size: int) -> Bool[np.ndarray, "*D"]:
    """Returns whether i lies in the middle half of 0..size-1."""
    return (i >= size // 4) & (i < size - size // 4)


def named(name: str, shape: int | tuple[int, ...], key: AnyKey) -> Bool[np.ndarray, "*D"]:
    """Returns the mask of this name, true where a pixel, time step or feature is known.

    Args:
      name: what is hidden: 'centre' (the middle half along each axis); 'left', 'right', 'top'
        or 'bottom' (that half; of signals and vectors, 'left' is the first half);
        'checkerboard' (every other one); or a random fraction, such as 'random:0.3'.
      shape: shape of an example; or the width and height of square images.
      key: random key, which only 'random' uses.

    Returns:
      a mask [D] of vectors; otherwise one that all channels share, [..., 1].

    Raises:
      UserError: if the name is unknown, or of no use for such examples, or the fraction is not
        in (0, 1).
    """
    shape = (shape, shape, 1) if isinstance(shape, int) else shape
    axes = shape if len(shape) == 1 else shape[:-1]
    mask_shape = shape if len(shape) == 1 else (*axes, 1)
    names = [name for name in _HIDDEN if len(axes) > 1 or name not in _VERTICAL]
    if name in names:
        hidden = _HIDDEN[name](np.ogrid[tuple(slice(size) for size in axes)], axes[0])
        return ~np.broadcast_to(hidden, axes).reshape(mask_shape)
    kind, _, number = name.partition(":")
    if kind == _RANDOM:
        n = math.prod(axes)
        hide = round(_fraction(name, number) * n)
        order = np.asarray(jax.random.permutation(key, n))
        return (order >= hide).reshape(mask_shape)
    near = difflib.get_close_matches(kind, [*names, _RANDOM], n=1)
    hint = f"did you mean {near[0]!r}? If not, " if near else ""
    png = ", or a PNG file with hidden pixels in white" if len(axes) == 2 else ""
    raise UserError(
        f"mask {name!r} is unknown: {hint}use {', '.join(names)} or {_RANDOM}:0.5{png}"
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
    """Checks that a mask fits examples of this shape.

    Raises:
      UserError: if it has neither this shape nor, unless examples are vectors, one with a last
        axis of length 1; if it is not boolean; or if all or none of its values are known.
    """
    wanted = [shape] if len(shape) == 1 else [(*shape[:-1], 1), shape]
    if known.shape not in wanted:
        found, *sizes = ("x".join(map(str, size)) for size in (known.shape, shape, wanted[0]))
        raise UserError(
            f"the mask is {found}, the examples are {sizes[0]}: give a mask of {sizes[1]}"
        )
    if known.dtype != np.bool_:
        raise UserError(f"the mask has dtype {known.dtype}: give bool, true where known")
    if known.all():
        raise UserError("the mask hides nothing, so there is nothing to sample")
    if not known.any():
        raise UserError("the mask hides everything: use --mode=sample instead")
