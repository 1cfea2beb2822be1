"""Out-of-distribution detection with the energy of each level.

An image, or another example, x is diffused to level t and scaled as in training,
y = a_{t+1} x_t. It then has two scores: the log-density F(y, t), and the norm |grad_y F(y, t)|
of its gradient.

In-distribution images are expected to have a high log-density and, being close to a maximum of
it, a small gradient norm. Neither is guaranteed: if another set of images has higher
log-densities than the data, its AUROC is below 1/2. The noise of high levels hides differences
between images, fine details first.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from sklearn.metrics import roc_auc_score

from drl_jax import diffusion, noise, recovery
from drl_jax.diffusion import NoiseSchedule
from drl_jax.mcmc.log_density import value_and_gradient
from drl_jax.model import Model
from drl_jax.recovery import LevelFn


class Scores(NamedTuple):
    """Scores of n images at G levels, from the lowest level to the highest.

    Attributes:
      log_density: F(y, t), up to a constant per level [nats].
      score_norm: |grad_y F(y, t)|.
    """

    log_density: Float[np.ndarray, "G n"]
    score_norm: Float[np.ndarray, "G n"]


# 1 if in-distribution images are expected to have high scores, -1 if low.
ORIENTATION = {"log_density": 1, "score_norm": -1}


def levels(schedule: NoiseSchedule) -> list[int]:
    """Returns the levels at which images are scored: the first of each `level_groups`."""
    return [group[0] for group in diffusion.level_groups(schedule.T)]


def evaluate(
    F: LevelFn,
    key: Key[Array, ""],
    indices: Int[Array, "B"],
    x: Float[Array, "B *D"],
    level: Int[Array, ""],
    schedule: NoiseSchedule,
) -> tuple[Float[Array, "B *D"], Float[Array, "B"], Float[Array, "B *D"]]:
    """Diffuses images to a level, and returns y, F(y, t) and grad_y F(y, t).

    The noise of an image depends on the key, the level and its index only.
    """
    keys = noise.example_keys(jax.random.fold_in(key, level), indices)
    t = jnp.full(indices.shape, level)
    y, _ = recovery.positives(keys, x, t, schedule)
    return y, *value_and_gradient(lambda y: F(y, t), y)


def norm(gradient: Float[Array, "B *D"]) -> Float[Array, "B"]:
    """Returns the Euclidean norm of each example."""
    return jnp.sqrt(jnp.sum(jnp.square(gradient), axis=range(1, gradient.ndim)))


class Scorer:
    """Computes the scores of images under a model.

    Attributes:
      levels: levels at which images are scored (`levels`).
    """

    def __init__(self, model: Model):
        """Compiles the scores for the model's devices and batch size."""
        method = model.method
        self.levels = levels(method.schedule)
        self._model = model

        def program(shared, examples):
            params, key, levels = shared
            indices, x = examples
            F = method.F(params)

            def at_level(level):
                _, log_density, gradient = evaluate(F, key, indices, x, level, method.schedule)
                return log_density, norm(gradient)

            scores = jax.lax.map(at_level, levels)
            return jax.tree.map(jnp.transpose, scores)  # examples along the first axis

        self._compiled = model.engine.compile(program)

    def __call__(
        self, key: Key[Array, ""], images: Iterable[Float[np.ndarray, "*D"]]
    ) -> Scores:
        """Scores a stream of one or more images in [-1, 1], reading one batch at a time.

        The noise of image i depends on the key, the level and i only, so that the i-th images
        of different sets are diffused with the same noise.
        """
        engine = self._model.engine
        shared = self._model.params, key, np.array(self.levels)
        x = map(self._model.standardisation.apply, images)
        batches = engine.run(self._compiled, shared, engine.stack(enumerate(x)))
        return Scores(*(np.concatenate(scores).T for scores in zip(*batches, strict=True)))


def _shuffled(key: Key[Array, ""], x: Float[Array, "*D"]) -> Float[Array, "*D"]:
    """Permutes pixels or steps, keeping their channels together; of vectors, the features."""
    rows = x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x
    return jax.random.permutation(key, rows).reshape(x.shape)


def _inverted(key: Key[Array, ""], x: Float[Array, "*D"]) -> Float[Array, "*D"]:
    """Returns the negative."""
    del key
    return -x


def _uniform(key: Key[Array, ""], x: Float[Array, "*D"]) -> Float[Array, "*D"]:
    """Draws every value uniformly, with a width that depends on x (`_half_width`)."""
    half = _half_width(x)
    return jax.random.uniform(key, x.shape, x.dtype, minval=-half, maxval=half)


def _half_width(x: Float[Array, "*D"]) -> float:
    """Returns 1 for images, and otherwise sqrt(3), which gives uniform values variance 1."""
    return 1.0 if x.ndim == 3 else math.sqrt(3)


def _patch(key: Key[Array, ""], x: Float[Array, "*D"]) -> Float[Array, "*D"]:
    """Replaces a square, or a cube, or a stretch of a signal or vector, by uniform noise.

    Its place is random, and its sides are a quarter of x's, rounded up. Its mask are the values
    that change.
    """
    sides = x.shape[:-1] if x.ndim > 1 else x.shape
    *place_keys, noise_key = jax.random.split(key, len(sides) + 1)
    size = tuple(-(-side // 4) for side in sides)
    place = [
        jax.random.randint(place_key, (), 0, side - length + 1)
        for place_key, side, length in zip(place_keys, sides, size, strict=True)
    ]
    patch = _uniform(noise_key, jnp.zeros((*size, *x.shape[len(sides) :]), x.dtype))
    return jax.lax.dynamic_update_slice(x, patch, (*place, *[0] * (x.ndim - len(sides))))


# Functions (key, example) -> out-of-distribution example, by name. Examples that are not images
# are standardised.
SYNTHETIC: dict[str, Callable[[Key[Array, ""], Float[Array, "*D"]], Float[Array, "*D"]]]
SYNTHETIC = {"shuffled": _shuffled, "inverted": _inverted, "uniform": _uniform, "patch": _patch}


@functools.partial(jax.jit, static_argnames="name")
def _synthesise(
    name: str, keys: Key[Array, "B"], x: Float[Array, "B *D"]
) -> Float[Array, "B *D"]:
    return jax.vmap(SYNTHETIC[name])(keys, x)


def synthetic_images(
    name: str,
    key: Key[Array, ""],
    images: Iterable[Float[np.ndarray, "*D"]],
    batch_size: int = 256,
) -> Iterator[Float[np.ndarray, "*D"]]:
    """Yields one out-of-distribution example per example, of a kind named in `SYNTHETIC`.

    The i-th image depends on the key, on i and on the i-th image of `images` only.
    """
    images, first = iter(images), 0
    while batch := list(itertools.islice(images, batch_size)):
        keys = noise.example_keys(key, first + jnp.arange(len(batch)))
        yield from np.asarray(_synthesise(name, keys, np.stack(batch)))
        first += len(batch)


def auroc(
    in_distribution: Float[np.ndarray, "n"], out_of_distribution: Float[np.ndarray, "m"]
) -> float:
    """Returns the area under the ROC curve of a score that should be higher in distribution.

    It equals P(in > out) + P(in = out) / 2 for a random image of each set: 1 if the score
    separates the sets perfectly, 1/2 if it does not separate them, 0 if it separates them
    perfectly the wrong way round.
    """
    is_in = np.repeat([True, False], [len(in_distribution), len(out_of_distribution)])
    scores = np.concatenate([in_distribution, out_of_distribution])
    return float(roc_auc_score(is_in, scores))


def aurocs(in_distribution: Scores, out_of_distribution: Scores) -> dict[str, list[float]]:
    """Returns the AUROC at each level, for each of the `Scores`.

    It is 1 if every in-distribution image scores better (`ORIENTATION`) than every other image.
    """
    return {
        name: [auroc(sign * i, sign * o) for i, o in zip(*scores, strict=True)]
        for (name, sign), *scores in zip(
            ORIENTATION.items(), in_distribution, out_of_distribution, strict=True
        )
    }
