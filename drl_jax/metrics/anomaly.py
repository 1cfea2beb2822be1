"""Detection of anomalous images and pixels, with all levels of the energy together.

An image x is diffused to level t several times (`DRAWS`), with y = a_{t+1} x_t as in
`metrics.ood`. There are four statistics per level, each averaged over the draws:

- of the image, the log-density F(y, t) and the norm |grad_y F(y, t)|;
- of each pixel, the norm over its channels of grad_y F(y, t), and of the denoising residual
  E[x | x_t] - x, by Tweedie's formula (`ladder.tweedie`).

Steps of signals and voxels are pixels, too, and so are the features of vectors.

A `Detector` is fitted to in-distribution images only, of which it needs two sets.

The first gives the mean and the standard deviation of each statistic, at each pixel if it is a
map. With these, a statistic becomes a z-score; that of the log-density is negated, so that high
values are anomalous. The first set also gives a weight for each statistic and level,

    w = 1 - (variance due to the noise) / (variance over the images),

which is the share of the variance that is a property of the image: the reliability of classical
test theory. It is near 0 where the noise of the diffusion decides the value: at high levels for
F, at level 0 for the residual. The score of an image is the sum of w z over both of its
statistics and all levels, and its map the same sum for each pixel.

The second set, of images that the first step has not seen, gives the mean and the standard
deviation by which both sums are standardised, and the thresholds (`Detector.threshold`).
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from drl_jax import noise
from drl_jax.errors import UserError
from drl_jax.metrics import ood
from drl_jax.model import Model, require_examples
from drl_jax.runtime.batching import Engine
from drl_jax.sampling import ladder

DRAWS = 8  # of the noise, per image and level
LEAST = 20  # smallest number of images in each of the two sets
_SMALLEST = np.finfo(np.float32).tiny

Images = Iterable[Float[np.ndarray, "*D"]]


class Statistics(NamedTuple):
    """Statistics of B images at G levels, from the lowest level to the highest.

    They are numpy arrays, except while JAX computes them.

    Attributes:
      log_density: F(y, t), up to a constant per level [nats].
      score_norm: |grad_y F(y, t)|.
      gradient: at each pixel, the norm over the channels of grad_y F(y, t).
      residual: at each pixel, the norm over the channels of E[x | x_t] - x.
    """

    log_density: Any  # Float[np.ndarray, "B G"]
    score_norm: Any  # Float[np.ndarray, "B G"]
    gradient: Any  # Float[np.ndarray, "B G *E"]
    residual: Any  # Float[np.ndarray, "B G *E"]


def over_channels(v: Float[Array, "B *D"]) -> Float[Array, "B *E"]:
    """Returns the norm over the channels; of vectors, the absolute value of each feature."""
    return jnp.abs(v) if v.ndim == 2 else jnp.linalg.norm(v, axis=-1)


class Detection(NamedTuple):
    """Results for B images: in distribution, about standard normal; if anomalous, higher.

    Attributes:
      score: of each image.
      map: of each pixel.
      z: the z-score of each statistic at each level. Negated for the log-density.
    """

    score: Float[np.ndarray, "B"]
    map: Float[np.ndarray, "B *E"]
    z: Statistics


class Meter:
    """Computes the `Statistics` of images under a model.

    Attributes:
      levels: levels of the statistics, those of `ood.Scorer`.
    """

    def __init__(self, model: Model, batch_size: int):
        """Compiles the statistics for batches of this size, the only one that is used."""
        method = model.method
        schedule = method.schedule
        self.levels = ood.levels(schedule)
        self._shape = model.shape
        self._params = model.params
        self._standardisation = model.standardisation
        self._engine = Engine(model.mesh, batch_size)

        def program(shared, examples):
            params, key, levels = shared
            indices, x = examples
            F = method.F(params)

            def at_level(level):
                t = jnp.full(indices.shape, level)
                a = noise.per_example(schedule.y_scale(t), x)

                def draw(number):
                    y, log_density, gradient = ood.evaluate(
                        F, jax.random.fold_in(key, number), indices, x, level, schedule
                    )
                    x_hat = ladder.tweedie(y / a, a * gradient, t, schedule)
                    return Statistics(
                        log_density=log_density,
                        score_norm=ood.norm(gradient),
                        gradient=over_channels(gradient),
                        residual=over_channels(x_hat - x),
                    )

                drawn = jax.lax.map(draw, jnp.arange(DRAWS))
                mean = jax.tree.map(lambda v: jnp.mean(v, axis=0), drawn)
                variance = jax.tree.map(lambda v: jnp.var(v, axis=0, ddof=1) / DRAWS, drawn)
                return mean, variance

            # Examples along the first axis.
            return jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), jax.lax.map(at_level, levels))

        self._compiled = self._engine.compile(program)

    def __call__(
        self, key: Key[Array, ""], images: Images
    ) -> Iterator[tuple[Statistics, Statistics]]:
        """Yields the means over the draws, and the variances of these means due to the noise.

        One batch of images is in memory at a time. The noise of image i depends on the key,
        the level and i only.

        Raises:
          UserError: if images have another shape than those of the model, or are not of
            finite floating-point numbers.
        """
        engine = self._engine
        shared = self._params, key, np.array(self.levels)

        def batches():
            for indices, x in engine.stack(enumerate(images)):
                require_examples(x, self._shape)
                if not np.isfinite(x).all():
                    raise UserError("an image has pixels that are not finite (NaN or infinite)")
                yield indices, self._standardisation.apply(x)

        yield from engine.run(self._compiled, shared, batches(), size=engine.batch_size)


@dataclasses.dataclass(frozen=True)
class Detector:
    """Finds anomalous images and pixels; fitted to in-distribution images by `fit`.

    Other images need no new compilation, whatever their number, and the memory that it takes
    does not depend on it.

    Attributes:
      levels: levels of the statistics.
      weights: of each statistic and level, in [0, 1].
      calibration: scores of the second set, in ascending order.
      num_fitted: number of images in the first set.
    """

    levels: list[int]
    weights: dict[str, Float[np.ndarray, "G"]]
    calibration: Float[np.ndarray, "n"]
    num_fitted: int
    _meter: Meter
    _key: Key[Array, ""]
    _mean: Any
    _std: Any
    _centre: tuple[float, float]  # of the sums for images and for pixels
    _scale: tuple[float, float]

    def __call__(self, images: Images) -> Iterator[Detection]:
        """Yields the results of a stream of images in [-1, 1], batch by batch.

        Raises:
          UserError: if images have another shape or dtype than those of the model, or pixels
            that are not finite.
        """
        for score, map_, z in self._sums(self._key, images):
            (centre, scale), (map_centre, map_scale) = zip(
                self._centre, self._scale, strict=True
            )
            yield Detection((score - centre) / scale, (map_ - map_centre) / map_scale, z)

    def scores(self, images: Images) -> Float[np.ndarray, "n"]:
        """Returns the score of each of one or more images."""
        return np.concatenate([found.score for found in self(images)])

    def maps(self, images: Images) -> Float[np.ndarray, "n *E"]:
        """Returns the map of each of one or more images."""
        return np.concatenate([found.map for found in self(images)])

    def threshold(self, rate: float) -> float:
        """Returns a threshold that in-distribution images exceed with this probability.

        Of the n scores of `calibration`, it is the k-th smallest, k = ceil((n + 1) (1 - rate)).
        If a new image and those of the second set are exchangeable (for example independent
        draws from one distribution), its score exceeds the threshold with probability at most
        `rate`, and if no scores are equal, more than rate - 1 / (n + 1), however small n is
        (split conformal prediction; Vovk et al. 2005). This is an average over calibration
        sets: for one given set, the probability varies around it.

        Raises:
          UserError: if the rate is not in (0, 1), or too low for this number of images.
        """
        return conformal_threshold(self.calibration, rate)

    def _sums(self, key: Key[Array, ""], images: Images) -> Iterator[Detection]:
        """Yields results that are not standardised."""
        for statistics, _ in self._meter(key, images):
            z = Statistics(
                *(
                    (value - mean) / std
                    for value, mean, std in zip(statistics, self._mean, self._std, strict=True)
                )
            )
            z = z._replace(log_density=-z.log_density)
            weighted = {
                name: np.moveaxis(value, 1, -1) @ self.weights[name]
                for name, value in z._asdict().items()
            }
            yield Detection(
                score=weighted["log_density"] + weighted["score_norm"],
                map=weighted["gradient"] + weighted["residual"],
                z=z,
            )


def fit(model: Model, key: Key[Array, ""], fitted: Images, calibration: Images) -> Detector:
    """Fits a detector to in-distribution images that the model was not trained on.

    Args:
      model: a model of images.
      key: random key of the noise of all images.
      fitted: the first set, a stream of images in [-1, 1].
      calibration: the second set, which shares no image with the first.

    Raises:
      UserError: if one of the sets has fewer than `LEAST` images, or images have another shape
        or dtype than those of the model.
    """
    images = iter(fitted)
    first = list(itertools.islice(images, model.engine.batch_size))
    require_enough(len(first))
    meter = Meter(model, len(first))
    keys = jax.random.split(key, 3)  # no two sets share noise: their scores are independent
    n, sums = 0, None
    for mean, variance in meter(keys[0], itertools.chain(first, images)):
        n += len(mean.log_density)
        new = [
            np.sum(np.float64(value), axis=0)
            for value in (*mean, *map(np.square, map(np.float64, mean)), *variance)
        ]
        sums = new if sums is None else [a + b for a, b in zip(sums, new, strict=True)]
    assert sums is not None
    means, stds, weights = [], [], {}
    for name, total, squares, within in zip(
        Statistics._fields, sums[:4], sums[4:8], sums[8:], strict=True
    ):
        mean = total / n
        variance = np.maximum(squares - n * mean**2, 0) / (n - 1)
        pixels = tuple(range(1, mean.ndim))
        reliable = 1 - within.mean(pixels) / n / np.maximum(variance.mean(pixels), _SMALLEST)
        means.append(np.float32(mean))
        stds.append(np.float32(np.maximum(np.sqrt(variance), _SMALLEST)))
        weights[name] = np.clip(reliable, 0, 1)
    detector = Detector(
        levels=meter.levels,
        weights=weights,
        calibration=np.zeros(0),
        num_fitted=n,
        _meter=meter,
        _key=keys[2],
        _mean=means,
        _std=stds,
        _centre=(0.0, 0.0),
        _scale=(1.0, 1.0),
    )
    scores, moments, num_pixels = [], np.zeros(2), 0
    for found in detector._sums(keys[1], calibration):
        scores.append(found.score)
        moments += [np.sum(found.map), np.sum(found.map**2)]
        num_pixels += found.map.size
    score = np.sort(np.concatenate(scores)) if scores else np.zeros(0)
    require_enough(len(score))
    centre = float(np.mean(score)), moments[0] / num_pixels
    scale = float(np.std(score, ddof=1)), math.sqrt(moments[1] / num_pixels - centre[1] ** 2)
    return dataclasses.replace(
        detector,
        calibration=(score - centre[0]) / scale[0],
        _centre=centre,
        _scale=scale,
    )


def conformal_threshold(scores: Float[np.ndarray, "n"], rate: float) -> float:
    """Returns the threshold of `Detector.threshold` for the scores of in-distribution images.

    Args:
      scores: in ascending order.
      rate: false-alarm rate.

    Raises:
      UserError: if the rate is not in (0, 1), or too low for this number of images.
    """
    require_rate(rate, len(scores))
    return float(scores[_rank(rate, len(scores)) - 1])


def require_rate(rate: float, n: int) -> None:
    """Checks that n images suffice for a threshold with this false-alarm rate.

    Raises:
      UserError: if they do not, or the rate is not in (0, 1).
    """
    if not 0 < rate < 1:
        raise UserError(f"the false-alarm rate is {rate:g}: give a number between 0 and 1")
    if _rank(rate, n) > n:
        least = np.ceil(round(1 / rate - 1, 6))
        raise UserError(
            f"a false-alarm rate of {rate:g} needs {least:.6g} or more in-distribution images "
            f"to calibrate the threshold, but there are {n}: give more images or a higher rate"
        )


def require_enough(n: int) -> None:
    """Checks that a set of in-distribution images is large enough to fit a detector.

    Raises:
      UserError: if it has fewer than `LEAST` images.
    """
    if n < LEAST:
        raise UserError(
            f"a detector needs two sets of {LEAST} or more in-distribution images, but one has "
            f"{n}: give more images"
        )


def _rank(rate: float, n: int) -> int:
    """Returns ceil((n + 1) (1 - rate)), without rounding errors that would change it."""
    return max(1, math.ceil(round((n + 1) * (1 - rate), 9)))
