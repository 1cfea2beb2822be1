"""Weights for the Inception network, made up as shared/fixtures/inception_random says."""

import functools
import zlib

import numpy as np
import pytest
from test_original import FIXTURES

from drl_jax.evaluation import weights
from drl_jax.evaluation.weights import file_places  # as it is where a test replaces it

FOLDER = FIXTURES / "inception_random"
needs_fixtures = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no {FOLDER}: set DRL_FIXTURES to where the fixtures lie"
)


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
