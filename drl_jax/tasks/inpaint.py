"""The task `inpaint`: completes examples of which some values are hidden."""

import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Bool, Float, Key

from drl_jax.data import image_files, pipeline, sources
from drl_jax.errors import UserError
from drl_jax.metrics import restoration
from drl_jax.plots import images as images_lib
from drl_jax.sampling import inpainting, masks
from drl_jax.storage import data_record, npz, results
from drl_jax.storage.atomic import write_atomically, write_json
from drl_jax.storage.runs import Run
from drl_jax.tasks import common

log = logging.getLogger(__name__)

NUM_EXAMPLES = 8  # of the data, completed if no files are given
NUM_OTHERS = 64  # the same for examples that are not images, of which a few are shown
SHOWN = 8  # examples in the picture
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
    """Hides some pixels or other values, completes them, and compares with the original ones.

    Writes to `workdir`/inpaintings/step_STEP_seed_SEED_MASK, or to a folder with a number after
    this name if there are results with other settings (`storage.results.folder`):
      settings.json: everything on which the completions depend.
      grid.png: one row per image: the known pixels (the others are a checkerboard), the mask
        (white: hidden), the completions, and the original. Of signals and (standardised)
        vectors, lines.
      completed.npz: `known` (the mask), `original` [n, ...] and `completions` [n, k, ...].
      metrics.json: step, and of the hidden values, in the units of the data, the mean squared
        distances of `inpainting.errors` and `restoration.coverage` of the completions.

    Args:
      run: the trained model.
      workdir: folder of the results.
      mask: the name of a mask (`masks.named`), or for images a PNG file that is white at hidden
        pixels.
      images: image files; empty for the first examples of `config.data`, held-out ones if there
        are any.
      completions: number of completions per example, at least 2.
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
    are_images = images_lib.are_images(model.shape)
    if images:
        common.require_images(model, "--images")
    key, mask_key, samples_key = jax.random.split(common.task_key("inpaint", seed), 3)
    known, mask_name = load_mask(mask, model.shape, mask_key)
    masks.require_mask(known, model.shape)
    if images:
        x = pipeline.prepared_files(config, images)
    else:
        source = sources.open_held_out(config)
        data_record.warn_if_changed(workdir, source)
        limit = NUM_EXAMPLES if are_images else NUM_OTHERS
        x = pipeline.load_examples(config, common.of_label(source, label), limit=limit)
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
        common.require_finite(completed, "completions")
        samples = model.sample(samples_key, len(x) * completions).reshape(completed.shape)
        common.require_finite(samples, "samples")
        unknown = unknown_pixels(config.data.image_size) if are_images else np.nan
        parts = {"known": np.where(known, x, unknown)[:, None]}
        if are_images:
            parts["mask"] = np.broadcast_to(np.where(known, -1.0, 1.0), x.shape)[:, None]
        parts |= {"completions": completed, "original": x[:, None]}
        picture = images_lib.rows(
            {name: part[:SHOWN] for name, part in parts.items()},
            standardisation=model.standardisation,
        )
        images_lib.write_png(folder / "grid.png", picture)
        arrays = {"known": known, "original": x, "completions": completed}
        write_atomically(folder / "completed.npz", npz.encode(arrays, compress=True))
        metrics: dict[str, Any] = {"step": run.step}
        metrics |= inpainting.errors(completed, samples, x, known)
        hidden = np.broadcast_to(~known, model.shape)
        metrics["coverage"] = restoration.coverage(completed[..., hidden], x[..., hidden])
        write_json(folder / "metrics.json", metrics)
        log.info(
            "mean squared distance per hidden value: completion to original %.3g, between "
            "completions %.3g, unrelated sample to original %.3g; 90%% intervals of the "
            "completions contain %.1f%% of the hidden values",
            metrics["completion_to_truth"],
            metrics["between_completions"],
            metrics["sample_to_truth"],
            100 * metrics["coverage"]["0.9"],
        )


def unknown_pixels(size: int) -> Float[np.ndarray, "size size 1"]:
    """Returns what is shown in place of unknown pixels: a checkerboard of two greys.

    Both differ from the grey of the gaps between images.
    """
    rows, columns = np.indices((size, size))
    return np.where((rows + columns) % 2, UNKNOWN, -UNKNOWN)[..., None]


def load_mask(
    mask: str, shape: tuple[int, ...], key: Key[Array, ""]
) -> tuple[Bool[np.ndarray, "..."], str]:
    """Returns a mask, true at known pixels, and its name for use in a path.

    Args:
      mask: a name, or a PNG file.
      shape: shape of the examples.
      key: random key, used by masks that are random.

    Raises:
      UserError: if the name is unknown, or the file cannot be read or the examples are not
        images.
    """
    if mask.lower().endswith(".png") and not images_lib.are_images(shape):
        raise UserError(f"the mask {mask} is an image, but the examples are not: give a name")
    if mask.lower().endswith(".png"):
        hidden = image_files.read_image(mask, channels=1) >= WHITE
        return ~hidden, epath.Path(mask).stem
    return masks.named(mask, shape, key), mask.replace(":", "_")
