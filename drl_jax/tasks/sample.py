"""The task `sample`: draws samples and writes them."""

from collections.abc import Iterable

import numpy as np
from etils import epath
from jaxtyping import Float

from drl_jax.data import pipeline
from drl_jax.errors import as_user_error
from drl_jax.plots import images
from drl_jax.storage import results
from drl_jax.storage.atomic import replacing
from drl_jax.storage.runs import Run
from drl_jax.tasks import common


def run(
    run: Run,
    workdir: epath.Path,
    num_samples: int,
    seed: int,
    label: str | None,
    guidance: float,
) -> None:
    """Draws samples and writes each batch as it arrives.

    Memory does not grow with `num_samples`. Until all are drawn, the name of the folder ends
    with .unfinished_HASH.

    Writes to `workdir`/samples/step_STEP_seed_SEED, or to a folder with a number after this
    name if there are samples with other settings (`storage.results.folder`):
      settings.json: everything on which the samples depend.
      samples.npy: all samples, float32 [num_samples, H, W, C] in [-1, 1]; [num_samples, D] for
        vectors; [num_samples, L, C] for signals.
      000000.png, ...: one file per image; none for vectors and signals.
      grid.png: the first images (at most 100), vectors or signals (`images.picture`).

    Args:
      run: the trained model.
      workdir: folder of the results.
      num_samples: number of samples.
      label: class of the samples, or 0 for none; 'all': each class in turn; None: 'all', if the
        model has classes.
      guidance: weight of guidance (`Model.given`).
      seed: random seed of the samples.

    Raises:
      UserError: if the model has no such class, the folder cannot be written to, or a sample is
        not finite.
    """
    label = common.label_of_samples(run.model, label, guidance)
    run, condition = common.given(run, label, guidance), common.condition(label, guidance)
    guidance = guidance if label == "all" else 0.0  # that of a single class is in the model
    settings = common.result_settings(run, "sample", seed, num_samples=num_samples, **condition)
    path = workdir / "samples" / f"step_{run.step}_seed_{seed}"
    with results.folder(path, settings) as folder:
        model = common.adapted(run, guidance).model
        key = common.task_key("sample", seed)
        batches = common.draw(model, key, num_samples, guidance)
        write(folder, batches, num_samples, model.shape)


def write(
    folder: epath.Path,
    batches: Iterable[Float[np.ndarray, "B *D"]],
    num_samples: int,
    shape: tuple[int, ...],
) -> None:
    """Writes the samples of `run`, and a picture of the first ones.

    Args:
      folder: folder of the files.
      batches: the samples.
      num_samples: their number.
      shape: shape of one sample.

    Raises:
      UserError: if a file cannot be written.
    """
    in_grid: list[np.ndarray] = []
    grid_size, done = images.grid_size(shape, common.COLUMNS), 0
    header = {"descr": "<f4", "fortran_order": False, "shape": (num_samples, *shape)}
    path = folder / "samples.npy"
    failure = f"cannot write to {path}"
    with replacing(path) as file:
        with as_user_error(failure):
            np.lib.format.write_array_header_1_0(file, header)
        for batch in batches:
            with as_user_error(failure):
                file.write(batch.astype("<f4").tobytes())
            if images.are_images(shape):
                for i, image in enumerate(pipeline.to_uint8(batch), done):
                    images.write_png(folder / f"{i:06d}.png", image)
            if done < grid_size:
                in_grid.append(batch[: grid_size - done])
            done += len(batch)
    grid = images.picture(np.concatenate(in_grid), common.COLUMNS)
    images.write_png(folder / "grid.png", grid)
