"""Strips of images between two, by descending from a strip of noisy ones.

The frames of a strip start at the same noise level, each a little further from one end to
the other, and share the noise of their chains: what differs along a strip comes from its
starts alone. `sampling.descend` makes images of them.

- Between samples: a strip of x_t on the arc from one half-made sample to another, at a
  level t where they are noise for the most part; at t = T, between white noises.
- Between images: both diffused to level t by the same noise, and the line from one to the
  other (Ho et al. 2020, section 4.4); the higher t, the more the model changes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from drl_jax import diffusion, noise
from drl_jax.diffusion import NoiseSchedule
from drl_jax.errors import UserError

# Below this sine of their angle, arc and chord differ by less than float32 can tell.
_PARALLEL = 1e-3


def slerp(
    a: Float[Array, "B *D"], b: Float[Array, "B *D"], w: Float[Array, "B"]
) -> Float[Array, "B *D"]:
    """Interpolates spherically, each example as one vector; w = 0 is a, w = 1 is b.

        sin((1 - w) θ) / sin θ · a + sin(w θ) / sin θ · b,   θ the angle of a and b

    (Shoemake 1985.) White noise stays as long as white noise is, which on the chord it does
    not. Where a and b are parallel, the chord is taken.
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
    """Returns a strip of x_level for each pair of these: the arc between them."""
    return _strips(slerp, first, last, frames)


def sample_level(schedule: NoiseSchedule) -> int:
    """Returns the level where strips between samples start unless another is chosen.

    The highest with a_bar of a quarter or more: 5 of T6, 521 of T1k. Its x_t is little but
    noise. Where the chains' noise is shared, the levels above tell less and less on the
    sample; of T1k's x_T nothing comes through.
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
    """Returns a strip of x_level for each pair of images, diffused by the pair's own noise.

    With the same noise at both ends, the line between the diffused images is the diffused
    line between the images: every frame is as noisy as its level says.
    """
    t = jnp.full(keys.shape, level)
    keys = noise.fold(keys, schedule.T)  # the levels below use 0..T-1
    first, last = (diffusion.diffuse(keys, x, t, schedule) for x in (first, last))

    def chord(a, b, w):
        w = noise.per_example(w, a)
        return (1 - w) * a + w * b

    return _strips(chord, first, last, frames)


def _strips(between, first, last, frames):
    """Puts `frames` equidistant points between the ends, along a new second axis."""
    w = jnp.linspace(0.0, 1.0, frames)
    along = jax.vmap(lambda w: between(first, last, jnp.full(first.shape[:1], w)), out_axes=1)
    return along(w)


def require_level(level: int, T: int) -> None:
    """Refuses what is no level to descend from.

    Raises:
      UserError: with the level, and those that can be.
    """
    if not 1 <= level <= T:
        raise UserError(
            f"level is {level}: images are diffused to a noise level from 1, where they "
            f"hardly change, to {T}, where nothing is left of them"
        )


def smoothness(strip: Float[np.ndarray, "frames *D"]) -> float:
    """Returns the largest step of a strip over its mean step, in Euclidean pixel distance.

    1 where all steps are equal (or nothing moves), frames - 1 where one jump makes the way.
    """
    steps = _steps(strip)
    return float(steps.max() / steps.mean()) if steps.any() else 1.0


def length(strip: Float[np.ndarray, "frames *D"]) -> float:
    """Returns the sum of a strip's steps, in Euclidean pixel distance.

    Beside the distance of the ends it tells strips apart that `smoothness` cannot: unrelated
    images are equidistant, too, and make frames - 1 times the way.
    """
    return float(_steps(strip).sum())


def _steps(strip: Float[np.ndarray, "frames *D"]) -> Float[np.ndarray, "frames-1"]:
    flat = np.asarray(strip, np.float64).reshape(len(strip), -1)
    return np.linalg.norm(np.diff(flat, axis=0), axis=1)
