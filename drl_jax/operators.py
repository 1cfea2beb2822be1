"""Operators: what is observed of an example, and the likelihood of an observation.

    observed = A(x) + std eps,   eps ~ N(0, I)

`parse` reads A and std from a text such as 'mask:centre,blur:1,noise:0.1', whose parts act from
left to right:

- mask:NAME hides pixels, or other values (`masks.named`): they become 0.
- downsample:N averages blocks of N x N pixels, or of N steps of a signal.
- blur:S averages pixels with Gaussian weights of standard deviation S pixels. At the edges,
  only pixels inside of the image count.
- grayscale averages the channels; those of images with three have the weights of luma (ITU-R
  BT.601).
- noise:S, the last part, sets std, in the units of the data: of images, pixels in [-1, 1].

Vectors can only be masked.

Operators and likelihoods are pytrees (`jax.tree_util.Partial`). Their masks, widths and
observations are arrays, so other values of them need no new compilation.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float

from drl_jax.errors import UserError

NOISE = 0.05  # std for images, unless it is given
LEAST, LARGEST = 1e-6, 1e6  # of the numbers in a text; the rounding of others gives NaN
LUMA = 0.299, 0.587, 0.114
FORMS = "mask:NAME, downsample:N, blur:S, grayscale, noise:S"


def mask(known: Bool[Array | np.ndarray, "..."]) -> Partial:
    """Returns the operator that sets the pixels to 0 that are not known."""
    return Partial(_masked, jnp.asarray(known))


def _masked(known: Bool[Array, "*#D"], x: Float[Array, "n *D"]) -> Array:
    return jnp.where(known, x, 0.0)


def downsample(factor: int) -> Partial:
    """Returns the operator that averages blocks of factor x factor pixels."""
    return Partial(_Downsampled(factor))


class _Downsampled:
    """Averages blocks of pixels. Equal factors are equal functions, and compile once."""

    def __init__(self, factor: int):
        self.factor = factor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Downsampled) and other.factor == self.factor

    def __hash__(self) -> int:
        return hash((_Downsampled, self.factor))

    def __call__(self, x: Float[Array, "n *D"]) -> Float[Array, "n *E"]:
        n, *sides, C = x.shape
        blocks = (size for side in sides for size in (side // self.factor, self.factor))
        return x.reshape(n, *blocks, C).mean(axis=tuple(range(2, 2 * len(sides) + 1, 2)))


def blur(std: float) -> Partial:
    """Returns the operator that averages pixels with Gaussian weights."""
    return Partial(_blurred, jnp.float32(std))


def _blurred(std: Float[Array, ""], x: Float[Array, "n *D"]) -> Float[Array, "n *D"]:
    def weights(size):
        distance = jnp.arange(size)[:, None] - jnp.arange(size)
        return jax.nn.softmax(-((distance / std) ** 2) / 2, axis=1)

    for axis in range(1, x.ndim - 1):
        x = jnp.moveaxis(jnp.tensordot(weights(x.shape[axis]), x, [1, axis]), 0, axis)
    return x


def grayscale() -> Partial:
    """Returns the operator that averages the channels."""
    return Partial(_grey)


def _grey(x: Float[Array, "n *D C"]) -> Float[Array, "n *D 1"]:
    C = x.shape[-1]
    weights = jnp.asarray(LUMA if (x.ndim, C) == (4, 3) else [1 / C] * C, x.dtype)
    return jnp.sum(x * weights, axis=-1, keepdims=True)


def composition(operators: Sequence[Partial]) -> Partial:
    """Returns the operator that applies others in turn."""
    return Partial(_in_turn, tuple(operators))


def _in_turn(operators: tuple[Partial, ...], x: Float[Array, "n *D"]) -> Array:
    for operator in operators:
        x = operator(x)
    return x


def observe(
    operator: Partial, x: Float[Array, "n *D"], std: float, keys: Any
) -> Float[Array, "n *E"]:
    """Draws observations of images; hidden pixels contain no noise, and are 0.

    Args:
      operator: A.
      x: images.
      std: standard deviation of the noise.
      keys: one random key per image.
    """
    clean = operator(x)
    eps = jax.vmap(lambda key: jax.random.normal(key, clean.shape[1:], clean.dtype))(keys)
    return jnp.where(visible(operator, x[:1]), clean + std * eps, 0.0)


def visible(operator: Partial, x: Float[Array, "1 *D"]) -> Bool[Array, "1 *E"]:
    """Returns which pixels of an observation depend on the image, which can have any values.

    All operators preserve constant images, except where pixels are hidden.
    """
    return operator(jnp.ones_like(x)) > 0


def likelihood(
    operator: Partial, observed: Float[Array | np.ndarray, "*E"], std: float
) -> Partial:
    """Returns x [n, ...] -> log p(observed | x) [n], of pixels that are not hidden [nats].

    The observed values of hidden pixels have no effect.

    Raises:
      UserError: from the result, if the operator gives observations of another shape.
    """
    return Partial(_log_likelihood, operator, jnp.asarray(observed), jnp.float32(std))


def _log_likelihood(operator, observed, std, x):
    expected = operator(x)
    if observed.shape != expected.shape[1:]:  # which may broadcast
        raise UserError(
            f"the observation has shape {observed.shape}: this operator gives "
            f"{expected.shape[1:]}"
        )
    log_normal = -(jnp.square((observed - expected) / std) + math.log(2 * math.pi)) / 2
    each = jnp.where(visible(operator, x[:1]), log_normal - jnp.log(std), 0.0)
    return jnp.sum(each, axis=range(1, each.ndim))


def stack(likelihoods: Sequence[Any]) -> Any:
    """Returns the likelihoods of several problems as one pytree, for `Model.smc`.

    They must be of the same kind, and have the same shapes.
    """
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *likelihoods)


def parse(
    text: str,
    shape: tuple[int, ...],
    load_mask: Callable[[str], Bool[np.ndarray, "..."]],
) -> tuple[Partial, float]:
    """Returns the operator that a text describes, and the std of the noise.

    Args:
      text: parts separated by commas, such as 'downsample:2,noise:0.1'.
      shape: shape of an example.
      load_mask: returns the mask of a name, true at known pixels.

    Raises:
      UserError: if a part is unknown, a number is not one or out of range, an operator does not
        fit the examples that it gets, or there is no noise and the examples are not images.
    """
    *sides, _ = shape
    operators, std = [], None
    for part in text.split(","):
        kind, _, value = part.strip().partition(":")
        if std is not None:
            raise UserError(f"operator {text!r}: noise must be the last part")
        if kind == "mask" and value:
            known = load_mask(value)
            axes = sides or shape
            if known.shape != ((*sides, 1) if sides else shape):
                found, wanted = (
                    "x".join(map(str, size)) for size in (known.shape[: len(axes)], axes)
                )
                raise UserError(f"operator {part!r}: the mask is {found}, the example {wanted}")
            operators.append(mask(known))
        elif kind in ("downsample", "blur", "grayscale") and not sides:
            raise UserError(f"operator {part!r}: vectors have no axes; use mask:NAME")
        elif kind == "downsample":
            factor = _number(part, value, int)
            if any(side % factor for side in sides):
                size, block = ("x".join(map(str, of)) for of in (sides, [factor] * len(sides)))
                raise UserError(
                    f"operator {part!r}: an example of {size} does not divide into blocks of "
                    f"{block}"
                )
            sides = [side // factor for side in sides]
            operators.append(downsample(factor))
        elif kind == "blur":
            operators.append(blur(_number(part, value, float)))
        elif kind == "grayscale" and not value:
            operators.append(grayscale())
        elif kind == "noise":
            std = _number(part, value, float)
        else:
            raise UserError(f"operator {part!r} is unknown: use some of {FORMS}")
    if std is None and len(shape) != 3:
        raise UserError(
            f"operator {text!r}: add noise:S, its standard deviation in the units of the data"
        )
    return composition(operators), NOISE if std is None else std


def _number(part: str, value: str, kind: type) -> Any:
    """Returns the number of a part.

    Raises:
      UserError: if it is none, or not in `LEAST`..`LARGEST`.
    """
    try:
        number = kind(value)
    except ValueError:
        number = 0
    if not LEAST <= number <= LARGEST:
        what = (
            "a whole number above 0"
            if kind is int
            else f"a number from {LEAST:g} to {LARGEST:g}"
        )
        raise UserError(f"operator {part!r}: give {what}, as in {part.split(':')[0]}:2")
    return number
