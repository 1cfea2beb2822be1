"""What several modes are made of."""

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from drl_jax import exported, images, train_step
from drl_jax import model as model_lib
from drl_jax.errors import UserError
from drl_jax.files import write_whole
from drl_jax.model import Model, Run
from drl_jax.progress import Progress

log = logging.getLogger(__name__)

# Changes the configuration of a trained model, by what the command line says.
Revise = Callable[[ConfigDict], ConfigDict]

COLUMNS = 10  # of a sheet of 10 x 10 images


def load(workdir: epath.Path, revise: Revise, model: str | None) -> Run:
    """Loads the model that --model names, or else the work directory's own.

    Raises:
      UserError: if there is none.
    """
    return exported.load(model, revise) if model else model_lib.load_run(workdir, revise)


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
    with Progress(n, "image") as progress:
        for batch in model.sample_batches(key, n):
            yield batch
            progress.add(len(batch))


def write_json(path: epath.Path, values: dict[str, Any]) -> None:
    """Writes numbers by name."""
    write_whole(path, (json.dumps(values, indent=2) + "\n").encode())
