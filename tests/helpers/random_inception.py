"""Weights for the Inception network, made up as fixtures/inception_random/README.md says."""

import functools
import zlib

import numpy as np

from drl_jax.metrics import weights
from drl_jax.metrics.weights import file_places  # as it is where a test replaces it


def draw(name, shape):
    """One tensor, in the order of axes that PyTorch's file has."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        x = rng.uniform(0.5, 1.5, shape)
    elif name.endswith("bn.weight"):
        x = rng.uniform(0.8, 1.2, shape)
    elif len(shape) == 4:
        x = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
    elif len(shape) == 2:
        x = rng.normal(0, np.sqrt(1 / shape[1]), shape)
    else:
        x = rng.normal(0, 0.1, shape)
    return x.astype(np.float32)


@functools.cache
def tensors():
    """All of them by name."""
    return {name: draw(name, shape) for name, (_, shape) in file_places().items()}


def variables():
    return weights.variables("these weights", tensors())


def vectors(images):
    """A stand-in for the network: the first pixel in 2048 numbers, batches of 3."""
    images = list(images)
    for first in range(0, len(images), 3):
        pixels = np.float32([np.broadcast_to(x[0, 0], 3) for x in images[first : first + 3]])
        yield {
            "2048": np.pad(pixels, ((0, 0), (0, 2045))),
            "logits_unbiased": pixels,
        }
