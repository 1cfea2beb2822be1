"""Random weights for the Inception network, as fixtures/inception_random/README.md defines."""

import functools
import zlib

import numpy as np

from drl_jax.metrics import weights

# Imported by name, so that it stays complete if a test replaces the module's function.
from drl_jax.metrics.weights import file_layout


def draw(name, shape):
    """Draws one tensor, with the axes in the order of the PyTorch file."""
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
    """Returns all tensors by name."""
    return {name: draw(name, shape) for name, (_, shape) in file_layout().items()}


def variables():
    """Returns the weights as Flax variables."""
    return weights.to_variables(tensors(), "random weights")


def vectors(images):
    """Replaces the network: returns each image's first pixel as its features.

    The pixel is padded to 2048 numbers for the features; the batch size is 3.
    """
    images = list(images)
    for first in range(0, len(images), 3):
        pixels = np.float32([np.broadcast_to(x[0, 0], 3) for x in images[first : first + 3]])
        yield {
            "2048": np.pad(pixels, ((0, 0), (0, 2045))),
            "logits_unbiased": pixels,
        }
