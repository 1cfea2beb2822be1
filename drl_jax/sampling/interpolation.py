"""Interpolation: strips of images that lead from one image to another.

A strip is interpolated at a noise level t, and then `ladder.descend` draws x_0 given each of
its frames x_t. The chains of all frames of a strip share their noise, so the resulting images
differ only because the frames x_t do.

- Between samples: spherical interpolation from one partly generated sample x_t to another, at
  a level t where they are mostly noise; at t = T, between two draws of white noise.
- Between images: both are diffused to level t with the same noise and interpolated linearly
  (Ho et al. 2020, section 4.4). The higher t, the more the model may change.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from drl_jax import diffusion, noise
from drl_jax.diffusion import NoiseSchedule
from drl_jax.errors import UserError

# Sine of the angle below which spherical and linear interpolation are equal in float32.
_PARALLEL = 1e-3


def slerp(
    a: Float[Array, "B *D"], b: Float[Array, "B *D"], w: Float[Array, "B"]
) -> Float[Array, "B *D"]:
    """Interpolates spherically between vectors: w = 0 gives a, w = 1 gives b.

        sin((1 - w) θ) / sin θ · a + sin(w θ) / sin θ · b,   θ the angle between a and b

    (Shoemake 1985.) Each example is one vector. Unlike linear interpolation, this keeps the
    norm of white noise. Parallel vectors are interpolated linearly.
    """
    axes = range(1, a.ndim)
    norms = jnp.sqrt(jnp.sum(jnp.square(a), axes) * jnp.sum(jnp.square(b), axes))
    cosine = jnp.sum(a * b, axes) / jnp.where(norms == 0, 1.0, norms)
    angle = jnp.arccos(jnp.clip(cosine, -1.0, 1.0))
    sine = jnp.sin(angle)
    parallel = (sine < _PARALLEL) | (norms == 0)
    sine = jnp.where(parallel, 1.0, sine)
    of_a = jnp.where(parallel, 1 - w, jnp.sin((1 - w) * angle) / sine)
    of_b = jnp.where(parallel, w, jnp.sin(w * angle) / sine)
    return noise.per_example(of_a, a) * a + noise.per_example(of_b, b) * b


def sample_strips(
    first: Float[Array, "P *D"], last: Float[Array, "P *D"], frames: int
) -> Float[Array, "P frames *D"]:
    """Interpolates spherically between pairs of partly generated samples x_level.

    Args:
      first: x_level of P samples, the start of each strip.
      last: x_level of P samples, the end of each strip.
      frames: number of images per strip, including both ends.
    """
    return _strips(slerp, first, last, frames)


def sample_level(schedule: NoiseSchedule) -> int:
    """Returns the default level for interpolation between samples.

    This is the highest level with a_bar >= 1/4: 5 for T6, 521 for T1k. There x_t is mostly
    noise. If chains share their noise, x_t has less effect on the sample at higher levels; x_T
    of T1k has none.
    """
    return int(np.flatnonzero(schedule.a_bar >= 0.25)[-1])


def image_strips(
    keys: Key[Array, "P"],
    first: Float[Array, "P *D"],
    last: Float[Array, "P *D"],
    frames: int,
    level: Int[Array, ""],
    schedule: NoiseSchedule,
) -> Float[Array, "P frames *D"]:
    """Diffuses pairs of images to a level and interpolates linearly between them.

    Both images of a pair get the same noise, so the noise of every frame has the standard
    deviation of the level: the frames are a_bar_t ((1 - w) first + w last) + sigma_bar_t eps.

    Args:
      keys: one key per pair.
      first: images at the start of the strips.
      last: images at the end of the strips.
      frames: number of images per strip, including both ends.
      level: noise level in 1..T.
      schedule: noise levels.

    Returns:
      strips of x_level.
    """
    t = jnp.full(keys.shape, level)
    keys = noise.fold(keys, schedule.T)  # the levels below use 0..T-1
    first, last = (diffusion.diffuse(keys, x, t, schedule) for x in (first, last))

    def linear(a, b, w):
        w = noise.per_example(w, a)
        return (1 - w) * a + w * b

    return _strips(linear, first, last, frames)


def _strips(interpolate, first, last, frames):
    """Returns `frames` points from first to last, along a new second axis."""
    weights = jnp.linspace(0.0, 1.0, frames)

    def frame(w):
        return interpolate(first, last, jnp.full(first.shape[:1], w))

    return jax.vmap(frame, out_axes=1)(weights)


def require_level(level: int, T: int) -> None:
    """Checks that images can be diffused to this level and recovered from it.

    Raises:
      UserError: if the level is not in 1..T.
    """
    if not 1 <= level <= T:
        raise UserError(
            f"level is {level}: give a noise level from 1 (images hardly change) to {T} "
            "(nothing of them is left)"
        )


def smoothness(strip: Float[np.ndarray, "frames *D"]) -> float:
    """Returns the ratio of a strip's largest step to its mean step.

    A step is the Euclidean distance between neighbouring frames. The ratio is 1 if all steps
    are equal or zero, and frames - 1 if only one step is not zero.
    """
    steps = _steps(strip)
    return float(steps.max() / steps.mean()) if steps.any() else 1.0


def length(strip: Float[np.ndarray, "frames *D"]) -> float:
    """Returns the sum of a strip's steps, each the Euclidean distance between two frames.

    Compare it with the distance between the ends. A strip of unrelated images also has about
    equal steps, so its `smoothness` is about 1, but its length is about frames - 1 times that
    distance.
    """
    return float(_steps(strip).sum())


def _steps(strip: Float[np.ndarray, "frames *D"]) -> Float[np.ndarray, "frames-1"]:
    flat = np.asarray(strip, np.float64).reshape(len(strip), -1)
    return np.linalg.norm(np.diff(flat, axis=0), axis=1)
