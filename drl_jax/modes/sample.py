"""Samples, as PNGs, a sheet and one array."""

import io
import logging

import jax
import numpy as np
from etils import epath

from drl_jax import images
from drl_jax import model as model_lib
from drl_jax.files import make_writable, write_whole
from drl_jax.modes import parts
from drl_jax.modes.parts import Revise

log = logging.getLogger(__name__)


def run(workdir: epath.Path, revise: Revise, num_samples: int, seed: int) -> None:
    """Writes samples of the newest checkpoint: PNGs, a grid, and one array (.npz).

    Of points, the grid is a histogram, and there are no other PNGs.

    Raises:
      UserError: if there is no checkpoint, or the folder cannot be written to.
    """
    config, model, step = model_lib.load_run(workdir, revise)
    folder = workdir / "samples" / f"step_{step}_seed_{seed}"
    make_writable(folder)
    parts.adapt(config, model)
    batches: list[np.ndarray] = []
    for batch in parts.draw(model, jax.random.key(seed), num_samples):
        first = sum(map(len, batches))
        if not images.are_points(batch.shape[1:]):
            for i, image in enumerate(images.to_uint8(batch), first):
                images.write_png(folder / f"{i:06d}.png", image)
        batches.append(batch)
    x = np.concatenate(batches)
    encoded = io.BytesIO()
    np.savez_compressed(encoded, samples=x)
    write_whole(folder / "samples.npz", encoded.getvalue())
    images.write_png(folder / "grid.png", images.picture(x, parts.COLUMNS))
    log.info("%d samples are in %s", num_samples, folder)
