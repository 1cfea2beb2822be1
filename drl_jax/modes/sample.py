"""Samples, as PNGs, a sheet and one array."""

import logging

import jax
import numpy as np
from etils import epath

from drl_jax import images
from drl_jax import model as model_lib
from drl_jax.files import make_writable, told, whole
from drl_jax.modes import parts
from drl_jax.modes.parts import Revise

log = logging.getLogger(__name__)


def run(workdir: epath.Path, revise: Revise, num_samples: int, seed: int) -> None:
    """Writes samples of the newest checkpoint: PNGs, a grid, and one array (.npy).

    They are written as they are drawn: memory does not grow with their number. Of points, the
    grid is a histogram, and there are no other PNGs.

    Raises:
      UserError: if there is no checkpoint, or the folder cannot be written to.
    """
    config, model, step = model_lib.load_run(workdir, revise)
    folder = workdir / "samples" / f"step_{step}_seed_{seed}"
    make_writable(folder)
    parts.adapt(config, model)
    shape = model.method.energy.shape
    shown: list[np.ndarray] = []  # in the grid
    wanted, done = images.shown(shape, parts.COLUMNS), 0
    header = {"descr": "<f4", "fortran_order": False, "shape": (num_samples, *shape)}
    path = folder / "samples.npy"
    failure = f"cannot write to {path}"
    with whole(path) as file:
        with told(failure):
            np.lib.format.write_array_header_1_0(file, header)
        for batch in parts.draw(model, jax.random.key(seed), num_samples):
            with told(failure):
                file.write(batch.astype("<f4").tobytes())
            if not images.are_points(shape):
                for i, image in enumerate(images.to_uint8(batch), done):
                    images.write_png(folder / f"{i:06d}.png", image)
            if done < wanted:
                shown.append(batch[: wanted - done])
            done += len(batch)
    images.write_png(folder / "grid.png", images.picture(np.concatenate(shown), parts.COLUMNS))
    log.info("%d samples are in %s", num_samples, folder)
