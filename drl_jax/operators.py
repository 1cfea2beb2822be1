"""Operators: what is observed of an image, and the likelihood of an observation.

    observed = A(x) + std eps,   eps ~ N(0, I)

`parse` reads A and std from a text such as 'mask:centre,blur:1,noise:0.1', whose parts act from
left to right:

- mask:NAME hides pixels (`masks.named`): they become 0.
- downsample:N averages blocks of N x N pixels.
- blur:S averages pixels with Gaussian weights of standard deviation S pixels. At the edges,
  only pixels inside of the image count.
- grayscale averages the channels, with the weights of luma (ITU-R BT.601) if there are three.
- noise:S, the last part, sets std, in units of pixel values in [-1, 1].

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

NOISE = 0.05  # std, unless it is given
LEAST, LARGEST = 1e-6, 1e6  # of the numbers in a text; the rounding of others gives NaN
LUMA = 0.299, 0.587, 0.114
FORMS = "mask:NAME, downsample:N, blur:S, grayscale, noise:S"


def mask(known: Bool[Array | np.ndarray, "H W 1"]) -> Partial:
    """Returns the operator that sets the pixels to 0 that are not known."""
    return Partial(_masked, jnp.asarray(known))


def _masked(known: Bool[Array, "H W 1"], x: Float[Array, "n H W C"]) -> Array:
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

    def __call__(self, x: Float[Array, "n H W C"]) -> Float[Array, "n h w C"]:
        n, H, W, C = x.shape
        f = self.factor
        return x.reshape(n, H // f, f, W // f, f, C).mean(axis=(2, 4))


def blur(std: float) -> Partial:
    """Returns the operator that averages pixels with Gaussian weights."""
    return Partial(_blurred, jnp.float32(std))


def _blurred(std: Float[Array, ""], x: Float[Array, "n H W C"]) -> Float[Array, "n H W C"]:
    def weights(size):
        distance = jnp.arange(size)[:, None] - jnp.arange(size)
        return jax.nn.softmax(-((distance / std) ** 2) / 2, axis=1)

    return jnp.einsum("ih,jw,nhwc->nijc", weights(x.shape[1]), weights(x.shape[2]), x)


def grayscale() -> Partial:
    """Returns the operator that averages the channels."""
    return Partial(_grey)


def _grey(x: Float[Array, "n H W C"]) -> Float[Array, "n H W 1"]:
    C = x.shape[-1]
    weights = jnp.asarray(LUMA if C == 3 else [1 / C] * C, x.dtype)
    return jnp.sum(x * weights, axis=-1, keepdims=True)


def composition(operators: Sequence[Partial]) -> Partial:
    """Returns the operator that applies others in turn."""
    return Partial(_in_turn, tuple(operators))


def _in_turn(operators: tuple[Partial, ...], x: Float[Array, "n H W C"]) -> Array:
    for operator in operators:
        x = operator(x)
    return x


def observe(
    operator: Partial, x: Float[Array, "n H W C"], std: float, keys: Any
) -> Float[Array, "n h w c"]:
    """Draws observations of images; hidden pixels contain no noise, and are 0.

    Args:
      operator: A.
      x: images.
      std: standard deviation of the noise.
      keys: one random key per image.
    """
    clean = operator(x)
    eps = jax.vmap(lambda key: jax.random.normal(key, clean.shape[1:], clean.dtype))(keys)
    return jnp.where(_known(operator, x[:1]), clean + std * eps, 0.0)


def _known(operator: Partial, x: Float[Array, "1 H W C"]) -> Bool[Array, "1 h w c"]:
    """Returns which pixels of an observation depend on the image.

    All operators preserve constant images, except where pixels are hidden.
    """
    return operator(jnp.ones_like(x)) > 0


def likelihood(
    operator: Partial, observed: Float[Array | np.ndarray, "h w c"], std: float
) -> Partial:
    """Returns x [n, H, W, C] -> log p(observed | x) [n], of pixels that are not hidden [nats].

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
    known = _known(operator, x[:1])
    return jnp.sum(jnp.where(known, log_normal - jnp.log(std), 0.0), axis=(1, 2, 3))


def stack(likelihoods: Sequence[Any]) -> Any:
    """Returns the likelihoods of several problems as one pytree, for `Model.smc`.

    They must be of the same kind, and have the same shapes.
    """
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *likelihoods)


def parse(
    text: str,
    shape: tuple[int, ...],
    load_mask: Callable[[str], Bool[np.ndarray, "H W 1"]],
) -> tuple[Partial, float]:
    """Returns the operator that a text describes, and the std of the noise.

    Args:
      text: parts separated by commas, such as 'downsample:2,noise:0.1'.
      shape: [H, W, C] of the images.
      load_mask: returns the mask of a name, true at known pixels.

    Raises:
      UserError: if a part is unknown, a number is not one or out of range, or an operator does
        not fit the images that it gets.
    """
    H, W, _ = shape
    operators, std = [], None
    for part in text.split(","):
        kind, _, value = part.strip().partition(":")
        if std is not None:
            raise UserError(f"operator {text!r}: noise must be the last part")
        if kind == "mask" and value:
            known = load_mask(value)
            if known.shape != (H, W, 1):
                size = "x".join(map(str, known.shape[:2]))
                raise UserError(f"operator {part!r}: the mask is {size}, the image {H}x{W}")
            operators.append(mask(known))
        elif kind == "downsample":
            factor = _number(part, value, int)
            if H % factor or W % factor:
                raise UserError(
                    f"operator {part!r}: an image of {H}x{W} does not divide into blocks of "
                    f"{factor}x{factor}"
                )
            H, W = H // factor, W // factor
            operators.append(downsample(factor))
        elif kind == "blur":
            operators.append(blur(_number(part, value, float)))
        elif kind == "grayscale" and not value:
            operators.append(grayscale())
        elif kind == "noise":
            std = _number(part, value, float)
        else:
            raise UserError(f"operator {part!r} is unknown: use some of {FORMS}")
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
