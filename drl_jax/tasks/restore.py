"""The task `restore`: samples images given noisy or incomplete observations of them."""

import logging
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.tree_util import Partial
from jaxtyping import Float

from drl_jax import noise, operators
from drl_jax.data import image_files, pipeline, sources
from drl_jax.errors import UserError, as_user_error
from drl_jax.metrics import restoration
from drl_jax.plots import images as images_lib
from drl_jax.sampling import smc
from drl_jax.storage import data_record, npz, results
from drl_jax.storage.atomic import write_atomically, write_json
from drl_jax.storage.runs import Run
from drl_jax.tasks import common
from drl_jax.tasks.inpaint import load_mask

log = logging.getLogger(__name__)

NUM_IMAGES = 8  # held-out images of the data, restored if no files are given
SHOWN = 4  # samples per image in the grid
LARGEST = 10.0  # absolute value of an observed pixel
RUNS = 4  # of sequential Monte Carlo per image, and of the model alone, for the evidence


def run(
    run: Run,
    workdir: epath.Path,
    model: str | None,
    operator: str,
    images: Sequence[str],
    observations: Sequence[str],
    samples: int,
    particles: int,
    label: str | None,
    guidance: float,
    seed: int,
) -> None:
    """Restores images from observations of them, with the uncertainty of each pixel.

    Writes to `workdir`/restorations/step_STEP_seed_SEED_OPERATOR, or to a folder with a number
    after this name if there are results with other settings (`storage.results.folder`):
      settings.json: everything on which the results depend.
      grid.png: one row per image: the observation, samples, their mean, their standard
        deviation (white: 1 or more), and the original, if it is known.
      restored.npz: `observed` [n, h, w, c], `samples` [n, k, H, W, C].
      metrics.json: step; `restoration.report`, if the originals are known; the mean acceptance
        probability; with particles, the smallest effective sample size of any level and image,
        and `log_evidence`, log p(observed) of each image, with its standard error
        `log_evidence_std_error` [nats] (`smc.log_evidence`).

    The samples are from the first run of an image. For the evidence, there are `RUNS` runs of
    each image, and `RUNS` without a likelihood: 36 instead of 8, for eight images.

    Args:
      run: the trained model.
      workdir: folder of the results.
      model: the name by which the model was loaded; None for the model of `workdir`.
      operator: what is observed (`operators.parse`).
      images: image files, of which observations are simulated; empty for images of the data,
        held-out ones if there are any.
      observations: files with observations, .npy or images, instead of images.
      samples: number of samples per image.
      particles: 0 for approximate samples, or the number of weighted particles per image, from
        which the samples are drawn (`Model.posterior`).
      label: class of the images; None: none.
      guidance: weight of guidance (`Model.given`).
      seed: random seed of the samples, of simulated noise and of a random mask.

    Raises:
      UserError: if the operator, the data or a file cannot be used, there are fewer particles
        than samples, the folder cannot be written to, or a sample is not finite.
    """
    run = common.given(run, label, guidance)
    config, shape = run.config, run.model.shape
    common.require_images(run.model, "restore")
    if 0 < particles < samples:
        raise UserError(
            f"--particles is {particles}, but --samples is {samples}: give at least as many "
            "particles, or 0"
        )
    key, mask_key, noise_key, prior_key = jax.random.split(common.task_key("restore", seed), 4)
    size = config.data.image_size
    observe, std = operators.parse(
        operator, shape, lambda name: load_mask(name, size, mask_key)[0]
    )
    if observations:
        truth, observed = None, _load(observations, observe, shape)
    else:
        truth = _truth(run, model or workdir, images)
        keys = noise.example_keys(noise_key, jnp.arange(len(truth)))
        observed = np.asarray(operators.observe(observe, jnp.asarray(truth), std, keys))
    settings = common.result_settings(
        run,
        "restore",
        seed,
        **common.condition(label, guidance),
        observed=results.digest(observed),
        operator=operator,
        masks=results.digest(observe),
        samples=samples,
        particles=particles,
    )
    name = re.sub("[^\\w.-]+", "_", operator.strip())
    path = workdir / "restorations" / f"step_{run.step}_seed_{seed}_{name}"
    with results.folder(path, settings) as folder:
        problems = [operators.likelihood(observe, o, std) for o in observed]
        number = particles or smc.unweighted(samples, run.model.mesh.size)
        n, repeated = len(problems), problems * (RUNS if particles else 1)
        every = run.model.smc(
            key,
            operators.stack(repeated),
            len(repeated),
            number,
            width=std,
            corrected=bool(particles),
        )
        result = jax.tree.map(lambda values: values[:, :n], every)
        if particles:
            u = np.random.default_rng(seed).random(len(observed))
            drawn = smc.draws(result, samples, u)
        else:
            drawn = np.asarray(result.x[:samples])
        restored = drawn.swapaxes(0, 1)
        common.require_finite(restored, "images")
        metrics: dict[str, Any] = {
            "step": run.step,
            "acceptance": float(result.acceptance.mean()),
        }
        if particles:
            smallest = float(result.effective_sample_size.min())
            metrics["smallest_effective_sample_size"] = smallest
            alone = operators.stack(problems[:1] * RUNS)
            prior = run.model.smc(prior_key, alone, RUNS, number, width=std, strength=0.0)
            log_evidence, error = smc.log_evidence(every, prior, n)
            metrics["log_evidence"] = log_evidence.tolist()
            metrics["log_evidence_std_error"] = error.tolist()
        if truth is not None:
            metrics |= restoration.report(restored, truth)
        images_lib.write_png(folder / "grid.png", _grid(observed, restored, truth))
        arrays = {"observed": observed, "samples": restored}
        write_atomically(folder / "restored.npz", npz.encode(arrays, compress=True))
        write_json(folder / "metrics.json", metrics)
        if truth is not None:
            log.info(
                "PSNR of the mean %.1f dB, of a sample %.1f dB; 90%% intervals contain %.1f%% "
                "of the pixels",
                metrics["psnr_of_mean"],
                metrics["psnr_of_samples"],
                100 * metrics["coverage"]["0.9"],
            )


def _truth(
    run: Run, trained: epath.Path | str, images: Sequence[str]
) -> Float[np.ndarray, "n *D"]:
    """Returns the images of which observations are simulated."""
    if images:
        return pipeline.prepared_files(run.config, images)
    source = sources.open_held_out(run.config)
    data_record.warn_if_changed(trained, source)
    return pipeline.load_examples(run.config, source, limit=NUM_IMAGES)


def _load(
    files: Sequence[str], operator: Partial, shape: tuple[int, ...]
) -> Float[np.ndarray, "n h w c"]:
    """Reads observations: arrays in [-1, 1] from .npy files, or image files.

    Raises:
      UserError: naming a file that cannot be read, or that has another shape than observations,
        or values that are not finite or far outside of [-1, 1].
    """
    wanted = jax.eval_shape(operator, jax.ShapeDtypeStruct((1, *shape), jnp.float32)).shape[1:]
    observed = []
    for file in files:
        if file.lower().endswith(".npy"):
            with as_user_error(f"cannot read the observation {file}"):
                array = np.load(epath.Path(file), allow_pickle=False)
                array = array.astype(np.float32, casting="same_kind")  # not of complex numbers
        else:
            array = image_files.read_image(file, wanted[-1]) / np.float32(127.5) - 1
        if array.shape != wanted:
            found, needed = ("x".join(map(str, s)) for s in (array.shape, wanted))
            raise UserError(f"the observation {file} is {found}: this operator gives {needed}")
        if not np.abs(array).max() <= LARGEST:  # also true of NaN
            raise UserError(
                f"the observation {file} has values in [{array.min():g}, {array.max():g}]: "
                "scale pixels to [-1, 1]; noise may lead beyond"
            )
        observed.append(array)
    return np.stack(observed)


def _grid(observed, restored, truth):
    """Returns the picture of observations, samples, their mean and deviation, and originals."""
    H, W, C = restored.shape[2:]
    rows, columns = (
        np.arange(n) * m // n for n, m in zip((H, W), observed.shape[1:3], strict=True)
    )
    enlarged = np.broadcast_to(observed[:, rows][:, :, columns], (len(observed), H, W, C))
    tiles = [enlarged, *restored.swapaxes(0, 1)[:SHOWN], restored.mean(axis=1)]
    tiles.append(2 * np.minimum(restored.std(axis=1), 1) - 1)
    if truth is not None:
        tiles.append(truth)
    tiles = np.clip(np.stack(tiles, axis=1).reshape(-1, H, W, C), -1, 1)
    return images_lib.grid(tiles, columns=len(tiles) // len(observed))
