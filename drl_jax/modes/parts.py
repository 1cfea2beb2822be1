"""What several modes are made of."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict
from tqdm import tqdm

from drl_jax import images, train_step
from drl_jax.errors import UserError
from drl_jax.model import Model

log = logging.getLogger(__name__)

# Changes the configuration of a trained model, by what the command line says.
Revise = Callable[[ConfigDict], ConfigDict]

COLUMNS = 10  # of a sheet of 10 x 10 images
SILENCE = 30  # seconds after which a log without a bar hears how far things are


def require_images(model: Model, mode: str) -> None:
    """Refuses a model of points for a mode that is for images.

    Raises:
      UserError: if it is one.
    """
    if images.are_points(model.method.energy.shape):
        raise UserError(
            f"--mode={mode} is for images, and this is a model of points: --mode=sample and "
            "--mode=evaluate are for them too"
        )


def adapt(config: ConfigDict, model: Model) -> None:
    """Warms MALA or HMC up; the other samplers need nothing."""
    if config.mcmc.sampler not in ("mala", "hmc"):
        return
    step_size, acceptance = model.adapt(
        jax.random.key(config.seed), config.mcmc.warmup_steps, config.mcmc.target_acceptance
    )
    log.info("step sizes of %s after the warm-up:", config.mcmc.sampler)
    for group in train_step.level_groups(len(step_size)):
        t = group[0]
        log.info("  level %d: %.3g, acceptance %.2f", t, step_size[t], acceptance[t])


def draw(model: Model, key: Key[Array, ""], n: int) -> Iterator[Float[np.ndarray, "B H W C"]]:
    """Yields `model.sample_batches`, and shows how far they are."""
    done, told = 0, time.monotonic()
    with tqdm(total=n, unit="image", disable=None) as bar:
        for batch in model.sample_batches(key, n):
            yield batch
            done += len(batch)
            bar.update(len(batch))
            if bar.disable and time.monotonic() - told > SILENCE:
                log.info("%d of %d images", done, n)
                told = time.monotonic()


def write_json(path: epath.Path, values: dict[str, Any]) -> None:
    """Writes numbers by name."""
    path.write_text(json.dumps(values, indent=2) + "\n")
