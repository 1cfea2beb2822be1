"""Labelled data of a run, split into training and test images, and a classifier of them."""

import logging
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from drl_jax import config as config_lib
from drl_jax.data import pipeline, sources
from drl_jax.data.sources import Source
from drl_jax.metrics import classifier
from drl_jax.metrics.classifier import Classifier

log = logging.getLogger(__name__)

MAX_IN_MEMORY = 10_000  # images of each part of the data that are held
MIN_LABELLED = 500  # images with labels, to train a classifier that is worth its answers
MAX_SIZE = {1: 512, 2: 32, 3: 16}  # largest side that the small classifier suits, by rank
MIN_COMPARED = 50  # samples and test images that the classifier compares
TEST_FRACTION = 0.2  # of the data, as test images for the classifier if none are held out


class Labelled(NamedTuple):
    """Labelled data, and a classifier that was trained on the training images.

    Attributes:
      classifier: the classifier.
      train: training examples.
      test: test examples.
      test_labels: their classes, from 0.
      held_out: whether the model is known not to have been trained on the test images.
    """

    classifier: Classifier
    train: Float[np.ndarray, "m *D"]
    test: Float[np.ndarray, "k *D"]
    test_labels: Int[np.ndarray, "k"]
    held_out: bool


def load(
    config: ConfigDict, source: Source, num_samples: int, workdir: epath.Path
) -> Labelled | None:
    """Returns the data of a run and their classifier, which is trained once and cached.

    If no data are held out, a fixed share of the data, `TEST_FRACTION`, takes the place of the
    test images: the model was trained on them, but the classifier is not. At most
    `MAX_IN_MEMORY` images of each part are used.

    Args:
      config: uses `data` and `evaluation.num_data`.
      source: the training data.
      num_samples: number of samples to be compared with them.
      workdir: keeps the classifier if the folder of the data cannot (`classifier.of_data`).

    Returns:
      None if the data have no labels, are vectors or larger than `MAX_SIZE`, or there are
      fewer than `MIN_LABELLED` training images, or fewer than `MIN_COMPARED` samples or test
      images. The last two are logged.
    """
    *sides, _ = config_lib.example_shape(config)
    if source.labels is None or not sides or sides[0] > MAX_SIZE[len(sides)]:
        return None
    test_source = sources.open_held_out(config)
    held_out = test_source.held_out
    if not held_out:
        source, test_source = sources.split(source, TEST_FRACTION)
    limit = min(config.evaluation.num_data, MAX_IN_MEMORY)
    n, k = min(limit, len(source)), min(limit, len(test_source))
    if n < MIN_LABELLED or min(num_samples, k) < MIN_COMPARED:
        log.info(
            "not comparing samples with a classifier of the data, which needs at least %d "
            "training images (there are %d), %d test images (%d) and as many samples (%d)",
            MIN_LABELLED,
            n,
            MIN_COMPARED,
            k,
            num_samples,
        )
        return None
    (train, labels), (test, test_labels) = (
        pipeline.load_labelled(config, part, limit) for part in (source, test_source)
    )
    trained = classifier.of_data(config, source, train, labels - 1, workdir)
    return Labelled(trained, train, test, test_labels - 1, held_out)
