"""Strips of images between two."""

import logging
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from drl_jax import data, interpolation
from drl_jax import images as images_lib
from drl_jax import model as model_lib
from drl_jax.files import make_writable
from drl_jax.modes import parts
from drl_jax.modes.parts import Revise

log = logging.getLogger(__name__)


def run(
    workdir: epath.Path,
    revise: Revise,
    images: Sequence[str],
    pairs: int,
    frames: int,
    level: int | None,
    seed: int,
) -> None:
    """Writes strips between samples or between given images, and how smooth they are.

    Args:
      workdir: of a run.
      revise: changes the configuration.
      images: files, each two a pair; none for pairs of samples.
      pairs: of samples, where there are no images.
      frames: of a strip, its ends included.
      level: that strips go through; None for a third of the ladder with images, and for
        `interpolation.sample_level` without.
      seed: of all noise.

    Raises:
      UserError: if there is no checkpoint, a file or the level cannot be used, or the folder
        cannot be written to.
    """
    config, model, step = model_lib.load_run(workdir, revise)
    parts.require_images(model, "interpolate")
    schedule = model.method.schedule
    if level is None:
        level = max(1, schedule.T // 3) if images else interpolation.sample_level(schedule)
    interpolation.require_level(level, schedule.T)
    ends = data.prepared_files(config, images) if images else None
    kind = "images" if images else "samples"
    folder = workdir / "interpolations" / f"step_{step}_seed_{seed}_{kind}_level_{level}"
    make_writable(folder)
    parts.adapt(config, model)
    key = jax.random.key(seed)
    if ends is None:
        strips = model.interpolate(key, pairs, frames, level)
    else:
        strips = model.interpolate_images(key, ends[::2], ends[1::2], frames, level)
        # The strip's ends are recovered from noise: the images themselves stand beside them.
        strips = np.concatenate([ends[::2, None], strips, ends[1::2, None]], axis=1)
    for i, strip in enumerate(strips):
        row = images_lib.grid(strip, columns=len(strip))
        images_lib.write_png(folder / f"{i:03d}.png", row)
    sheet = strips.reshape(-1, *strips.shape[2:])
    images_lib.write_png(folder / "grid.png", images_lib.grid(sheet, columns=strips.shape[1]))
    recovered = strips if ends is None else strips[:, 1:-1]
    smoothness = [interpolation.smoothness(strip) for strip in recovered]
    length = [interpolation.length(strip) for strip in recovered]
    distance = [interpolation.length(strip[[0, -1]]) for strip in recovered]
    metrics = {"step": step, "smoothness": smoothness, "length": length, "distance": distance}
    parts.write_json(folder / "metrics.json", metrics)
    log.info(
        "the largest step is %.2f of the mean one (one jump: %d); strips are %.2f long, their "
        "ends %.2f apart",
        *(np.mean(smoothness), frames - 1, np.mean(length), np.mean(distance)),
    )
    log.info("%d strips are in %s", len(strips), folder)
