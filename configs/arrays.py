"""Your own arrays in a .npz, .npy or .csv file, 100 noise levels.

Reproduces: nothing in the paper; `configs/README.md` shows two examples.
Hardware:   1 core of an AMD EPYC server.
Time:       30 s for a table of 13 columns (28 November 2026).
Steps:      1,000, our choice.
Command:

    python -m drl_jax.main --config=configs/arrays.py --workdir=DIR --config.data.name=npz:PATH

The shape of the examples and the network follow the file: an MLP for vectors, images of up to
16x16 pixels, and signals and volumes of up to 1024 numbers; a U-Net for what is larger. What is
given on the command line takes precedence.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from ml_collections import FieldReference

from drl_jax import config as config_lib
from drl_jax.data import arrays

SMALL = 16  # size up to which an MLP learns images [pixels]
FEW = 1024  # number of values up to which it learns signals and volumes
LONG = 128  # length above which steps of a signal are grouped


class Operation(NamedTuple):
    """A function of a default and of another field, which `FieldReference` evaluates late."""

    fn: Callable
    args: tuple[FieldReference, ...]


def get_config():
    config = config_lib.default()
    config.data.name = "npz:"
    fields = (config.data.get_ref("name"),)

    def follows(default: Any, choose: Callable) -> FieldReference:
        """Returns what `choose` finds for x and `fields`; the default if there is no file."""

        def value(default: Any, name: str, *others: int) -> Any:
            x = arrays.outline(name)
            return default if x is None else choose(x, *others)

        return FieldReference(default, op=Operation(value, fields))

    config.data.axes = follows(0, lambda x: x.ndim - 2)
    config.data.image_size = follows(SMALL, lambda x: SMALL if x.ndim == 2 else x.shape[1])
    config.data.channels = follows(2, lambda x: x.shape[-1])
    config.data.standardise = follows(True, lambda x: not arrays.are_images(x))
    config.data.flip = False
    config.data.dequantise = follows(0.0, lambda x: 2 / 255 if arrays.are_bytes(x) else 0.0)
    fields += (config.data.get_ref("image_size"),)

    def by_kind(vectors: Any, small: Any, large: Any, short: Any, long: Any) -> FieldReference:
        """Returns the value for vectors, images, or signals and volumes, by their size."""

        def choose(x: np.ndarray, size: int) -> Any:
            if arrays.are_images(x):
                return small if size <= SMALL else large
            if x.ndim == 2:
                return vectors
            return short if math.prod(x.shape[1:]) <= FEW else long

        return follows(vectors, choose)

    config.diffusion.schedule = "cosine"
    config.diffusion.T = 100
    config.energy.network = by_kind("mlp", "image_mlp", "unet", "image_mlp", "unet")
    config.energy.ch = by_kind(64, 256, 64, 256, 32)
    config.energy.N = by_kind(2, 4, 1, 4, 1)
    config.energy.mult = follows(
        (1,), lambda x, size: (1,) if arrays.are_images(x) or size % 2 else (1, 2)
    )
    config.energy.patch = follows(
        1,
        lambda x, size: math.gcd(size, 4) if size > (LONG if x.ndim == 3 else SMALL) else 1,
    )
    config.energy.dropout = by_kind(0.0, 0.4, 0.05, 0.1, 0.05)
    config.energy.parameterisation = by_kind("unit", "uniform", "uniform", "noise", "noise")
    config.mcmc.start = "posterior"
    config.mcmc.K = 0
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 200
    config.optim.decay_steps = config.train.get_oneway_ref("num_steps")
    config.optim.ema_decay = 0.995
    config.train.objective = "denoising"
    config.train.levels = by_kind("log_snr", *["uniform"] * 4)
    config.train.batch_size = 128
    config.train.num_steps = 1000
    config.log.every_steps = 500
    config.log.sample_every_steps = 1000
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_every_steps = 1000
    return config
