"""A small classifier of labelled images, signals or volumes, and what it says about samples.

FID needs the weights of a network that was trained on photographs. For small images with
labels, a network that is trained on the data set itself in a few seconds takes its place.
"""

import functools
import logging
import math
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import traverse_util
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from drl_jax import standardisation
from drl_jax.data.sources import Source
from drl_jax.metrics import cache, frechet, neighbours
from drl_jax.runtime.matmul_precision import full_precision
from drl_jax.standardisation import Standardisation

log = logging.getLogger(__name__)

VERSION = 1  # of the network and its training; part of the name of the file that caches it

BATCH_SIZE = 64
STEPS = 800
LEARNING_RATE = 5e-3  # at first; it falls to zero with a cosine
SHIFT = 1  # largest random shift, in pixels, along each axis
NOISE = 0.1  # standard deviation of the noise added to pixels in [-1, 1]

SURE = 0.9  # class probability above which the classifier counts as confident
ROWS = 500  # images that are classified at a time


class Network(nn.Module):
    """Two convolutions with pooling, a layer of 64 features, and the logits.

    Attributes:
      classes: number of classes.
    """

    classes: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B *D"]
    ) -> tuple[Float[Array, "B 64"], Float[Array, "B classes"]]:
        """Returns the features and the logits."""
        axes = x.ndim - 2
        stride = max(1, x.shape[1] // (16 if axes > 1 else 64))  # at most 31 pixels per side
        h = nn.swish(nn.Conv(32, (5,) * axes, stride, name="conv1")(x))
        h = _pooled(h)
        h = _pooled(nn.swish(nn.Conv(64, (3,) * axes, name="conv2")(h)))
        features = nn.swish(nn.Dense(64, name="features")(h.reshape(len(h), -1)))
        return features, nn.Dense(self.classes, name="logits")(features)


def _pooled(h: Float[Array, "B *D"]) -> Float[Array, "B *E"]:
    """Returns the averages of blocks of two along each axis, unless these have one element."""
    axes = h.ndim - 2
    return nn.avg_pool(h, (2,) * axes, (2,) * axes) if h.shape[1] > 1 else h


class Classifier(NamedTuple):
    """A trained network.

    Attributes:
      params: parameters of `Network`.
      scale: factor of the features, with which their variances over the training data have the
        mean 1. Distances then do not depend on the scale that training happened to find.
      standardisation: of signals and volumes, fitted to the training data; images have none.
    """

    params: dict[str, Any]
    scale: float
    standardisation: Standardisation = standardisation.IDENTITY

    def __call__(
        self, x: Float[np.ndarray, "n *D"]
    ) -> tuple[Float[np.ndarray, "n 64"], Float[np.ndarray, "n classes"]]:
        """Returns the scaled features and the class probabilities of examples.

        Images are clipped to [-1, 1].
        """
        x = np.asarray(self._prepared(x))
        # The last batch is padded with the last image, so that all have the same size.
        batches = [
            _apply(self.params, x[np.minimum(np.arange(start, start + ROWS), len(x) - 1)])
            for start in range(0, len(x), ROWS)
        ]
        features, probabilities = (
            np.concatenate([np.asarray(array, np.float64) for array in arrays])[: len(x)]
            for arrays in zip(*batches, strict=True)
        )
        return self.scale * features, probabilities

    def label(self, x: Float[Array, "B *D"]) -> Float[Array, "B"]:
        """Returns the most probable class of each example; can be compiled."""
        _, probabilities = _apply(self.params, self._prepared(x))
        return jnp.argmax(probabilities, axis=1).astype(x.dtype)

    def _prepared(self, x: Any) -> Any:
        """Returns the network's input: clipped images, or other examples, standardised."""
        if self.standardisation.is_identity:
            return x.clip(-1, 1)
        return self.standardisation.apply(x)

    def metrics(
        self,
        samples: Float[np.ndarray, "n *D"],
        train: Float[np.ndarray, "m *D"],
        test: Float[np.ndarray, "k *D"],
    ) -> dict[str, Any]:
        """Compares samples with training images, and test images with the same training images.

        Only the first min(n, k) samples and test images are used, so that a perfect model
        reaches what the test images reach.

        Args:
          samples: examples drawn from a model.
          train: images on which the classifier, and possibly the model, was trained.
          test: images of the same data set on which the classifier was not trained.

        Returns:
          JSON values. Those that end in _of_test are the same for the test images:
            num_samples, num_train: numbers of images that are compared.
            feature_frechet, feature_frechet_of_test: squared Fréchet distance to the training
              images in the scaled features.
            confident, confident_of_test: share of images with a class of probability above
              `SURE`.
            classes, classes_of_test: share of images per most probable class.
            precision, recall, precision_of_test, recall_of_test: see
              `neighbours.precision_and_recall`, in the scaled features.
            nearest: Euclidean distance to the nearest training example, of images in [-1, 1]
              or standardised examples: median and percentile_5, the same of the test examples,
              and the ratios median_ratio and percentile_5_ratio of both.
        """
        n = min(len(samples), len(test))
        samples, test = samples[:n], test[:n]
        train_features, _ = self(train)
        of_samples = self._compare(samples, train_features)
        of_test = self._compare(test, train_features)
        flat_samples, flat_test, flat = (
            self._prepared(x).reshape(len(x), -1) for x in (samples, test, train)
        )
        distances, test_distances = (
            np.percentile(neighbours.nearest(x, flat), [50, 5])
            for x in (flat_samples, flat_test)
        )
        near = {}
        for i, name in enumerate(("median", "percentile_5")):
            near[name] = float(distances[i])
            near[f"{name}_of_test"] = float(test_distances[i])
            near[f"{name}_ratio"] = float(distances[i] / test_distances[i])
        return {
            "num_samples": n,
            "num_train": len(train),
            **of_samples,
            **{f"{name}_of_test": value for name, value in of_test.items()},
            "nearest": near,
        }

    def accuracy(self, x: Float[np.ndarray, "n *D"], labels: Int[np.ndarray, "n"]) -> float:
        """Returns the share of images whose most probable class is their label."""
        _, probabilities = self(x)
        return float(np.mean(probabilities.argmax(axis=1) == labels))

    def _compare(
        self, x: Float[np.ndarray, "n *D"], train_features: Float[np.ndarray, "m 64"]
    ) -> dict[str, Any]:
        """Returns the metrics of one set of images, except for the nearest neighbours."""
        features, probabilities = self(x)
        counts = np.bincount(probabilities.argmax(axis=1), minlength=probabilities.shape[1])
        precision, recall = neighbours.precision_and_recall(features, train_features)
        return {
            "feature_frechet": frechet.frechet_distance(
                frechet.fit(features), frechet.fit(train_features)
            ),
            "confident": float(np.mean(probabilities.max(axis=1) > SURE)),
            "classes": (counts / len(x)).tolist(),
            "precision": precision,
            "recall": recall,
        }


def of_data(
    config: ConfigDict,
    source: Source,
    x: Float[np.ndarray, "n *D"],
    labels: Int[np.ndarray, "n"],
    workdir: epath.Path,
) -> Classifier:
    """Returns a classifier of labelled data, which is trained once and cached.

    Its file (`cache.of_data`) depends on the source, the number of images, their preparation,
    and `VERSION`.

    Args:
      config: its field data is used.
      source: the data.
      x: the first n examples of the source, prepared.
      labels: their classes, from 0.
      workdir: work directory of the run.
    """

    def compute() -> cache.Arrays:
        log.info("training a classifier of the data, once, on %d images", len(x))
        trained = train(x, labels)
        flat = traverse_util.flatten_dict(trained.params, sep="/")
        own = {} if trained.standardisation.is_identity else trained.standardisation._asdict()
        return {"scale": np.asarray(trained.scale), **flat, **own}

    arrays = cache.of_data(
        kind="classifier",
        description="the classifier of the data",
        key=[config.data.image_size, config.data.crop, config.data.channels, VERSION],
        source=source,
        n=len(x),
        workdir=workdir,
        compute=compute,
    )
    scale = float(arrays.pop("scale"))
    own = standardisation.IDENTITY
    if "mean" in arrays:
        own = Standardisation(arrays.pop("mean"), arrays.pop("std"))
    return Classifier(traverse_util.unflatten_dict(arrays, sep="/"), scale, own)


def train(
    x: Float[np.ndarray, "n *D"], labels: Int[np.ndarray, "n"], steps: int = STEPS
) -> Classifier:
    """Trains a classifier, always with the same random seed.

    Args:
      x: images in [-1, 1], or other examples.
      labels: their classes, from 0.
      steps: number of training steps.
    """
    own = standardisation.IDENTITY if x.ndim == 4 else standardisation.fit([x])
    original, x = x, own.apply(x)
    rng = np.random.default_rng(0)
    params = _initial_params(rng, Network(int(labels.max()) + 1), x[:1])
    state = _optimiser(steps).init(params)
    for _ in range(steps):
        i = rng.integers(len(x), size=BATCH_SIZE)
        params, state = _step(params, state, _augmented(rng, x[i]), labels[i], steps=steps)
    classifier = Classifier(jax.tree.map(np.asarray, params), 1.0, own)
    features, _ = classifier(original)
    variance = features.var(axis=0, ddof=1).mean()
    return classifier._replace(scale=1 / math.sqrt(variance))


def _optimiser(steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))


@functools.partial(jax.jit, static_argnames="steps")
@full_precision
def _step(params, state, x, labels, steps):
    """Returns the parameters and the optimiser's state after one of `steps` training steps."""

    def loss(params):
        _, logits = _network(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    updates, state = _optimiser(steps).update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state


def _initial_params(
    rng: np.random.Generator, network: Network, x: Float[np.ndarray, "B *D"]
) -> dict[str, Any]:
    """Draws kernels with variance 1 / fan-in; biases are zero.

    NumPy draws them, because JAX would compile for seconds to do so.
    """

    def draw(shape: jax.ShapeDtypeStruct) -> Float[np.ndarray, "*D"]:
        fan_in = math.prod(shape.shape[:-1])
        kernel = rng.standard_normal(shape.shape, np.float32) / np.float32(math.sqrt(fan_in))
        return kernel * np.float32(len(shape.shape) > 1)

    return jax.tree.map(draw, jax.eval_shape(network.init, jax.random.key(0), x))


def _augmented(
    rng: np.random.Generator, x: Float[np.ndarray, "B *D"]
) -> Float[np.ndarray, "B *D"]:
    """Shifts each example by up to `SHIFT` pixels, repeating its edge, and adds noise."""
    B, *sides, _ = x.shape
    example, *positions = np.ogrid[tuple(map(slice, (B, *sides)))]
    shifts = rng.integers(-SHIFT, SHIFT + 1, (len(sides), *example.shape))
    shifted = x[
        example,
        *(
            np.clip(position + shift, 0, side - 1)
            for position, shift, side in zip(positions, shifts, sides, strict=True)
        ),
    ]
    return shifted + np.float32(NOISE) * rng.standard_normal(x.shape, np.float32)


@jax.jit
@full_precision
def _apply(params, x):
    """Returns the features and the class probabilities."""
    features, logits = _network(params, x)
    return features, jax.nn.softmax(logits)


def _network(params, x):
    """Returns the features and the logits."""
    classes = params["params"]["logits"]["bias"].size
    return cast(tuple[jax.Array, jax.Array], Network(classes).apply(params, x))
