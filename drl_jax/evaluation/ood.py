"""Out-of-distribution scores: how like the data images are, and how well that tells sets apart.

An image x is diffused to a level and scaled as in training, y = a_{t+1} x_t, and scored by the
log-density F(y, t) and by the norm |grad_y F(y, t)| of the level's score. Of images like the
data the log-density should be high, and the norm low, since they lie near its maxima. Neither
has to be so: where another set's scores look more like the data than the data's own, its AUROC
is below 1/2. The noise of higher levels hides what tells images apart, fine detail first.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from sklearn.metrics import roc_auc_score

from drl_jax import noise, parallel, train_step
from drl_jax.mcmc.log_density import value_and_gradient
from drl_jax.model import Model


class Scores(NamedTuple):
    """What the levels say of images, from the lowest of G levels to the highest.

    Attributes:
      log_density: F(y, t), up to a constant of the level [nats].
      score_norm: |grad_y F(y, t)|.
    """

    log_density: Float[np.ndarray, "G n"]
    score_norm: Float[np.ndarray, "G n"]


# Whether images like the data score high (1) or low (-1).
ORIENTATION = {"log_density": 1, "score_norm": -1}


class Scorer:
    """A model's levels as scores of images, compiled for its devices.

    Attributes:
      levels: all of few, or of many the first of each of the `train_step.level_groups`.
    """

    def __init__(self, model: Model, batch_size: int = 256):
        """Takes the model; about `batch_size` images lie on its devices at a time."""
        method, mesh = model.method, model.mesh
        self.levels = [group[0] for group in train_step.level_groups(method.schedule.T)]
        self._model = model
        self._batch_size = -(-batch_size // mesh.size) * mesh.size

        def on_device(shared, examples):
            params, key, level = shared
            indices, x = examples
            keys = noise.example_keys(jax.random.fold_in(key, level), indices)
            t = jnp.full(indices.shape, level)
            y, _ = train_step.positives(keys, x, t, method.schedule)
            F, gradient = value_and_gradient(lambda y: method.F(params)(y, t), y)
            return F, jnp.sqrt(jnp.sum(jnp.square(gradient), axis=range(1, y.ndim)))

        self._at_level = jax.jit(parallel.over_examples(on_device, mesh))

    def __call__(
        self, key: Key[Array, ""], images: Iterable[Float[np.ndarray, "H W C"]]
    ) -> Scores:
        """Scores n images in [-1, 1], one or more, of which few are held at a time.

        The i-th one's scores depend on it, the key and i alone: images of equal number meet
        equal noise, whatever set they are of. A last batch that is not full is filled up with
        copies, which are dropped again: it needs no program of its own.
        """
        split = parallel.by_example(self._model.mesh)
        batches = []
        for first, x in _batched(images, self._batch_size):
            rows = np.minimum(np.arange(self._batch_size), len(x) - 1)
            examples = parallel.place((first + rows, x[rows]), split)
            found = [
                self._at_level((self._model.params, key, level), examples)
                for level in self.levels
            ]
            batches.append(np.array(parallel.fetch(found))[..., : len(x)])
        return Scores(*np.concatenate(batches, axis=-1).swapaxes(0, 1))


def _shuffled(key: Key[Array, ""], x: Float[Array, "H W C"]) -> Float[Array, "H W C"]:
    """Permutes the pixels; the channels of each stay together."""
    return jax.random.permutation(key, x.reshape(-1, x.shape[-1])).reshape(x.shape)


def _inverted(key: Key[Array, ""], x: Float[Array, "H W C"]) -> Float[Array, "H W C"]:
    """Makes the negative."""
    del key
    return -x


def _uniform(key: Key[Array, ""], x: Float[Array, "H W C"]) -> Float[Array, "H W C"]:
    """Draws every number anew, uniform in [-1, 1)."""
    return jax.random.uniform(key, x.shape, x.dtype, minval=-1, maxval=1)


# Images unlike the data, made of an image of it; each has a key of its own.
UNLIKE: dict[str, Callable[[Key[Array, ""], Float[Array, "H W C"]], Float[Array, "H W C"]]]
UNLIKE = {"shuffled": _shuffled, "inverted": _inverted, "uniform": _uniform}


@functools.partial(jax.jit, static_argnames="name")
def unlike(
    name: str, keys: Key[Array, "B"], x: Float[Array, "B H W C"]
) -> Float[Array, "B H W C"]:
    """Makes an image of `UNLIKE` of each."""
    return jax.vmap(UNLIKE[name])(keys, x)


def unlike_images(
    name: str,
    key: Key[Array, ""],
    images: Iterable[Float[np.ndarray, "H W C"]],
    batch_size: int = 256,
) -> Iterator[Float[np.ndarray, "H W C"]]:
    """Makes an image of `UNLIKE` of each. The i-th depends on its own, the key and i alone."""
    for first, x in _batched(images, batch_size):
        keys = noise.example_keys(key, first + jnp.arange(len(x)))
        yield from np.asarray(unlike(name, keys, x))


def auroc(inside: Float[np.ndarray, "n"], outside: Float[np.ndarray, "m"]) -> float:
    """Returns P(one inside > one outside) + P(both are equal) / 2 of a score.

    This is the area under the curve of true against false positives, those inside being the
    positives. Where it is 1/2 the scores do not tell the sets apart; 0 tells as well as 1.
    """
    is_inside = np.repeat([True, False], [len(inside), len(outside)])
    return float(roc_auc_score(is_inside, np.concatenate([inside, outside])))


def aurocs(inside: Scores, outside: Scores) -> dict[str, list[float]]:
    """Returns the AUROC at each level by each of the `Scores`, 1 where all inside are liker."""
    return {
        name: [auroc(sign * i, sign * o) for i, o in zip(*both, strict=True)]
        for (name, sign), *both in zip(ORIENTATION.items(), inside, outside, strict=True)
    }


def _batched(
    images: Iterable[Float[np.ndarray, "H W C"]], batch_size: int
) -> Iterator[tuple[int, Float[np.ndarray, "B H W C"]]]:
    """Yields the number of a batch's first image, and the batch."""
    images, first = iter(images), 0
    while batch := list(itertools.islice(images, batch_size)):
        yield first, np.stack(batch)
        first += len(batch)
