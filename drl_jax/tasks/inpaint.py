"""The task `inpaint`: completes images of which some pixels are hidden."""

import logging
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Bool, Float, Key

from drl_jax.data import image_files, pipeline, sources
from drl_jax.plots import images as images_lib
from drl_jax.sampling import inpainting, masks
from drl_jax.storage import data_record, results
from drl_jax.storage.atomic import write_json
from drl_jax.storage.runs import Run
from drl_jax.tasks import common

log = logging.getLogger(__name__)

NUM_IMAGES = 8  # images of the data that are completed if no files are given
UNKNOWN = 0.25  # lightness of the checkerboard, in [-1, 1], shown in place of unknown pixels
WHITE = 128  # pixel value at and above which a mask file hides a pixel


def run(
    run: Run,
    workdir: epath.Path,
    mask: str,
    images: Sequence[str],
    completions: int,
    rounds: int,
    seed: int,
    label: str | None,
    guidance: float,
) -> None:
    """Hides some pixels of images, completes them, and compares with the original pixels.

    Writes to `workdir`/inpaintings/step_STEP_seed_SEED_MASK, or to a folder with a number after
    this name if there are results with other settings (`storage.results.folder`):
      settings.json: everything on which the completions depend.
      grid.png: one row per image: the known pixels (the others are a checkerboard), the mask
        (white: hidden), the completions, and the original.
      metrics.json: step, and the mean squared distances of `inpainting.errors`.

    Args:
      run: the trained model.
      workdir: folder of the results.
      mask: the name of a mask (`masks.named`), or a PNG file that is white at hidden pixels.
      images: image files; empty for the first `NUM_IMAGES` images of `config.data`.
      completions: number of completions per image, at least 2.
      rounds: number of times each level is sampled (`inpainting.inpaint`).
      label: class of the completions; None: none.
      guidance: weight of guidance (`Model.given`).
      seed: random seed of the completions and of a random mask.

    Raises:
      UserError: if the data, the mask or a file cannot be used, the folder cannot be
        written to, or a completion is not finite.
    """
    run = common.given(run, label, guidance)
    config, model = run.config, run.model
    common.require_images(model, "inpaint")
    key, mask_key, samples_key = jax.random.split(common.task_key("inpaint", seed), 3)
    known, mask_name = load_mask(mask, config.data.image_size, mask_key)
    masks.require_mask(known, model.shape)
    if images:
        x = pipeline.prepared_files(config, images)
    else:
        source = sources.open_source(config)
        data_record.warn_if_changed(workdir, source)
        x = pipeline.load_examples(config, source, limit=NUM_IMAGES)
    settings = common.result_settings(
        run,
        "inpaint",
        seed,
        **common.condition(label, guidance),
        images=results.digest(x),
        mask=results.digest(known),
        completions=completions,
        rounds=rounds,
    )
    path = workdir / "inpaintings" / f"step_{run.step}_seed_{seed}_{mask_name}"
    with results.folder(path, settings) as folder:
        model = common.adapted(run).model
        completed = model.inpaint(key, x, known, completions, rounds)
        common.require_finite(completed, "images")
        samples = model.sample(samples_key, len(x) * completions).reshape(completed.shape)
        common.require_finite(samples, "images")
        columns = [
            np.where(known, x, unknown_pixels(config.data.image_size)),
            np.broadcast_to(np.where(known, -1.0, 1.0), x.shape),
            *completed.swapaxes(0, 1),
            x,
        ]
        tiles = np.stack(columns, axis=1).reshape(-1, *model.shape)
        grid = images_lib.grid(tiles, columns=len(columns))
        images_lib.write_png(folder / "grid.png", grid)
        errors = inpainting.errors(completed, samples, x, known)
        write_json(folder / "metrics.json", {"step": run.step, **errors})
        log.info(
            "mean squared distance per hidden pixel: completion to original %.3f, between "
            "completions %.3f, unrelated sample to original %.3f",
            errors["completion_to_truth"],
            errors["between_completions"],
            errors["sample_to_truth"],
        )


def unknown_pixels(size: int) -> Float[np.ndarray, "size size 1"]:
    """Returns what is shown in place of unknown pixels: a checkerboard of two greys.

    Both differ from the grey of the gaps between images.
    """
    rows, columns = np.indices((size, size))
    return np.where((rows + columns) % 2, UNKNOWN, -UNKNOWN)[..., None]


def load_mask(
    mask: str, image_size: int, key: Key[Array, ""]
) -> tuple[Bool[np.ndarray, "H W 1"], str]:
    """Returns a mask, true at known pixels, and its name for use in a path.

    Args:
      mask: a name, or a PNG file.
      image_size: height and width of a named mask.
      key: random key, used by masks that are random.

    Raises:
      UserError: if the name is unknown or the file cannot be read.
    """
    if mask.lower().endswith(".png"):
        hidden = image_files.read_image(mask, channels=1) >= WHITE
        return ~hidden, epath.Path(mask).stem
    return masks.named(mask, image_size, key), mask.replace(":", "_")
