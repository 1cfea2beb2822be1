"""Completions of images that are partly hidden."""

import logging
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from drl_jax import data, inpainting, masks
from drl_jax import images as images_lib
from drl_jax import model as model_lib
from drl_jax.files import make_writable
from drl_jax.modes import parts
from drl_jax.modes.parts import Revise

log = logging.getLogger(__name__)

ROWS = 8  # images that are completed where none are named


def run(
    workdir: epath.Path,
    revise: Revise,
    mask: str,
    images: Sequence[str],
    completions: int,
    rounds: int,
    seed: int,
) -> None:
    """Writes completions of images whose pixels a mask hides, and how near the truth they are.

    Args:
      workdir: of a run.
      revise: changes the configuration.
      mask: a name (`masks.named`), or a PNG file that is white where pixels are hidden.
      images: files; none for the first of the run's data.
      completions: of each image, at least 2.
      rounds: how often each level is drawn (`inpainting`).
      seed: of all noise, and of a random mask.

    Raises:
      UserError: if there is no checkpoint or no data, the mask or a file cannot be used, or
        the folder cannot be written to.
    """
    config, model, step = model_lib.load_run(workdir, revise)
    parts.require_images(model, "inpaint")
    shape = model.method.energy.shape
    key, mask_key, samples_key = jax.random.split(jax.random.key(seed), 3)
    if mask.lower().endswith(".png"):
        known = data.read_image(mask, channels=1) < images_lib.GREY
        title = epath.Path(mask).stem
    else:
        known = masks.named(mask, config.data.image_size, mask_key)
        title = mask.replace(":", "_")
    masks.require_mask(known, shape)
    if images:
        truth = data.prepared_files(config, images)
    else:
        truth = np.stack(list(data.all_images(config, limit=ROWS)))
    folder = workdir / "inpaintings" / f"step_{step}_seed_{seed}_{title}"
    make_writable(folder)
    parts.adapt(config, model)
    completed = model.inpaint(key, truth, known, completions, rounds)
    samples = model.sample(samples_key, len(truth) * completions).reshape(completed.shape)
    shown = [
        np.where(known, truth, 0.0),
        np.broadcast_to(np.where(known, -1.0, 1.0), truth.shape),
        *completed.swapaxes(0, 1),
        truth,
    ]
    sheet = np.stack(shown, axis=1).reshape(-1, *shape)
    images_lib.write_png(folder / "grid.png", images_lib.grid(sheet, columns=len(shown)))
    errors = inpainting.errors(completed, samples, truth, known)
    parts.write_json(folder / "metrics.json", {"step": step, **errors})
    log.info(
        "mean squared distance of hidden pixels: completion to truth %.3f, completion to "
        "completion %.3f, sample to truth %.3f",
        errors["completion_to_truth"],
        errors["between_completions"],
        errors["sample_to_truth"],
    )
    log.info("%d completions of each of %d images are in %s", completions, len(truth), folder)
