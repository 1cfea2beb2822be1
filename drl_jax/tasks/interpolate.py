"""The task `interpolate`: leads from one image, or another example, to another one."""

import logging
from collections.abc import Sequence

import numpy as np
from etils import epath

from drl_jax.data import pipeline
from drl_jax.plots import images as images_lib
from drl_jax.sampling import interpolation
from drl_jax.storage import npz, results
from drl_jax.storage.atomic import write_atomically, write_json
from drl_jax.storage.runs import Run
from drl_jax.tasks import common

log = logging.getLogger(__name__)


def run(
    run: Run,
    workdir: epath.Path,
    images: Sequence[str],
    pairs: int,
    frames: int,
    level: int | None,
    seed: int,
    label: str | None,
    guidance: float,
) -> None:
    """Interpolates between samples, or between the given images.

    Writes to `workdir`/interpolations/step_STEP_seed_SEED_KIND_level_LEVEL, where KIND is
    'samples' or 'images', or to a folder with a number after this name if there are results
    with other settings (`storage.results.folder`):
      settings.json: everything on which the strips depend.
      000.png, ...: one strip per pair, for images. If there are `images`, the two of a pair
        are added at the ends of its strip, next to the frames recovered from their diffused
        versions.
      grid.png: all strips; of vectors and signals, one panel per pair, with a line per frame.
      strips.npz: `frames` [pairs, frames, ...].
      metrics.json, with the fields:
        step: number of training steps of the model.
        smoothness: per strip, its largest step divided by its mean step. A step is the
          Euclidean distance between two neighbouring frames, of pixels in [-1, 1] or
          standardised values.
        length: per strip, the sum of its steps.
        distance: per strip, the Euclidean distance between its ends.

    Args:
      run: the trained model.
      workdir: folder of the results.
      images: image files, every two of which are a pair; empty to interpolate samples.
      pairs: number of pairs of samples; unused if there are `images`.
      frames: number of frames per strip, its ends included.
      level: the noise level at which the strips are interpolated, in 1..T. None for a third
        of T (images) or for `interpolation.sample_level` (samples).
      label: class of the images; None: none.
      guidance: weight of guidance (`Model.given`).
      seed: random seed.

    Raises:
      UserError: if a file or the level cannot be used, the folder cannot be written to, or a
        strip is not finite.
    """
    run = common.given(run, label, guidance)
    model = run.model
    if images:
        common.require_images(model, "--images")
    schedule = model.method.schedule
    if level is None:
        level = max(1, schedule.T // 3) if images else interpolation.sample_level(schedule)
    interpolation.require_level(level, schedule.T)
    ends = pipeline.prepared_files(run.config, images) if images else None
    kind = "images" if images else "samples"
    name = f"step_{run.step}_seed_{seed}_{kind}_level_{level}"
    settings = common.result_settings(
        run,
        "interpolate",
        seed,
        **common.condition(label, guidance),
        images=None if ends is None else results.digest(ends),
        pairs=None if images else pairs,
        frames=frames,
        level=level,
    )
    with results.folder(workdir / "interpolations" / name, settings) as folder:
        model = common.adapted(run).model
        key = common.task_key("interpolate", seed)
        if ends is None:
            strips = shown = model.interpolate(key, pairs, frames, level)
        else:
            strips = model.interpolate_images(key, ends[::2], ends[1::2], frames, level)
            # The first and the last frame are recovered from noise, so they differ from the
            # images: show the images too.
            shown = np.concatenate([ends[::2, None], strips, ends[1::2, None]], axis=1)
        common.require_finite(strips, "strips")
        if images_lib.are_images(model.shape):
            for i, strip in enumerate(shown):
                row = images_lib.grid(strip, columns=len(strip))
                images_lib.write_png(folder / f"{i:03d}.png", row)
        picture = images_lib.rows({"frames": shown}, standardisation=model.standardisation)
        images_lib.write_png(folder / "grid.png", picture)
        content = npz.encode({"frames": strips}, compress=True)
        write_atomically(folder / "strips.npz", content)
        strips = model.standardisation.apply(strips)
        metrics = {
            "smoothness": [interpolation.smoothness(strip) for strip in strips],
            "length": [interpolation.length(strip) for strip in strips],
            "distance": [interpolation.length(strip[[0, -1]]) for strip in strips],
        }
        write_json(folder / "metrics.json", {"step": run.step, **metrics})
        log.info(
            "means over the strips: largest step / mean step %.2f (equal steps: 1; a single "
            "jump: %d), length %.2f, distance between the ends %.2f",
            np.mean(metrics["smoothness"]),
            frames - 1,
            np.mean(metrics["length"]),
            np.mean(metrics["distance"]),
        )
