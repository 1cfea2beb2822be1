"""The task `restore`: samples examples given noisy or incomplete observations of them."""

import logging
import math
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

NUM_IMAGES = 8  # held-out images of the data, restored if no files are given,
NUM_OTHERS = 16  # or other examples
SHOWN = 4  # samples per image in the grid
LARGEST = 10.0  # absolute value of an observed pixel


def run(
    run: Run,
    workdir: epath.Path,
    model: str | None,
    operator: str,
    images: Sequence[str],
    observations: Sequence[str],
    samples: int,
    particles: int,
    evidence_runs: int,
    label: str | None,
    guidance: float,
    seed: int,
) -> None:
    """Restores images, or other examples, with the uncertainty of each pixel or value.

    Writes to `workdir`/restorations/step_STEP_seed_SEED_OPERATOR, or to a folder with a number
    after this name if there are results with other settings (`storage.results.folder`):
      settings.json: everything on which the results depend.
      grid.png: one row per image: the observation, samples, their mean, their standard
        deviation (white: 1 or more), and the original, if it is known. Of signals and
        (standardised) vectors, lines.
      restored.npz: `observed` [n, ...], `samples` [n, k, ...].
      metrics.json: step; `restoration.report`, if the originals are known (of examples that are
        standardised, its errors are in standard deviations); the mean acceptance probability;
        with particles, the smallest effective sample size of any level and example; with
        evidence_runs, `log_evidence`, log p(observed) of each example, and its standard error
        `log_evidence_std_error` [nats] (`smc.log_evidence`).

    Args:
      run: the trained model.
      workdir: folder of the results.
      model: the name by which the model was loaded; None for the model of `workdir`.
      operator: what is observed (`operators.parse`).
      images: image files, of which observations are simulated; empty for examples of the data,
        held-out ones if there are any.
      observations: files with observations, .npy or images, instead of examples.
      samples: number of samples per example.
      particles: 0 for approximate samples, or the number of weighted particles per image, from
        which the samples are drawn (`Model.posterior`).
      evidence_runs: number of runs of sequential Monte Carlo of each example, and of the model
        alone, from whose spread the error of the evidence follows; 0: no evidence. Samples are
        those of the first run.
      label: class of the examples; None: none.
      guidance: weight of guidance (`Model.given`).
      seed: random seed of the samples, of simulated noise and of a random mask.

    Raises:
      UserError: if the operator, the data or a file cannot be used, there are fewer particles
        than samples, the folder cannot be written to, or a sample is not finite.
    """
    run = common.given(run, label, guidance)
    shape = run.model.shape
    if images:
        common.require_images(run.model, "--images")
    if 0 < particles < samples:
        raise UserError(
            f"--particles is {particles}, but --samples is {samples}: give at least as many "
            "particles, or 0"
        )
    key, mask_key, noise_key, prior_key = jax.random.split(common.task_key("restore", seed), 4)
    observe, std = operators.parse(
        operator, shape, lambda name: load_mask(name, shape, mask_key)[0]
    )
    if observations:
        truth, observed = None, _load(observations, observe, shape)
    else:
        truth = _truth(run, model or workdir, images, label)
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
        evidence_runs=evidence_runs,
    )
    name = re.sub("[^\\w.-]+", "_", operator.strip())
    path = workdir / "restorations" / f"step_{run.step}_seed_{seed}_{name}"
    with results.folder(path, settings) as folder:
        problems = [operators.likelihood(observe, o, std) for o in observed]
        number = particles or smc.unweighted(samples, run.model.mesh.size)
        n, repeated = len(problems), problems * max(1, evidence_runs)
        # What the noise leaves to a value, in the units of the levels.
        there = run.model.standardisation
        width = std / math.exp(there.log_volume(shape) / math.prod(shape))
        every = run.model.smc(
            key,
            operators.stack(repeated),
            len(repeated),
            number,
            width=width,
            corrected=bool(particles),
        )
        result = jax.tree.map(lambda values: values[:, :n], every)
        if particles:
            u = np.random.default_rng(seed).random(len(observed))
            drawn = smc.draws(result, samples, u)
        else:
            drawn = np.asarray(result.x[:samples])
        restored = drawn.swapaxes(0, 1)
        common.require_finite(restored, "restorations")
        metrics: dict[str, Any] = {
            "step": run.step,
            "acceptance": float(result.acceptance.mean()),
        }
        if particles:
            smallest = float(result.effective_sample_size.min())
            metrics["smallest_effective_sample_size"] = smallest
        if evidence_runs:
            alone = operators.stack(problems[:1] * evidence_runs)
            prior = run.model.smc(
                prior_key, alone, evidence_runs, number, width=width, strength=0.0
            )
            log_evidence, error = smc.log_evidence(every, prior, n)
            metrics["log_evidence"] = log_evidence.tolist()
            metrics["log_evidence_std_error"] = error.tolist()
        if truth is not None:
            metrics |= restoration.report(there.apply(restored), there.apply(truth))
        seen = np.asarray(operators.visible(observe, jnp.zeros((1, *shape))))
        picture = _picture(observed, seen, restored, truth, there)
        images_lib.write_png(folder / "grid.png", picture)
        arrays = {"observed": observed, "samples": restored}
        write_atomically(folder / "restored.npz", npz.encode(arrays, compress=True))
        write_json(folder / "metrics.json", metrics)
        if truth is not None:
            log.info(
                "%s; 90%% intervals contain %.1f%% of the values",
                ", ".join(
                    f"{name.replace('_', ' ')} {metrics[name]:.3g}"
                    for name in (
                        "psnr_of_mean",
                        "psnr_of_samples",
                        "rmse_of_mean",
                        "rmse_of_samples",
                    )
                    if name in metrics
                ),
                100 * metrics["coverage"]["0.9"],
            )


def _truth(
    run: Run, trained: epath.Path | str, images: Sequence[str], label: str | None
) -> Float[np.ndarray, "n *D"]:
    """Returns the images, or those of a class, of which observations are simulated."""
    if images:
        return pipeline.prepared_files(run.config, images)
    source = sources.open_held_out(run.config)
    data_record.warn_if_changed(trained, source)
    limit = NUM_IMAGES if images_lib.are_images(run.model.shape) else NUM_OTHERS
    return pipeline.load_examples(run.config, common.of_label(source, label), limit)


def _load(
    files: Sequence[str], operator: Partial, shape: tuple[int, ...]
) -> Float[np.ndarray, "n *E"]:
    """Reads observations: arrays from .npy files, or image files.

    Raises:
      UserError: naming a file that cannot be read, or that has another shape than observations,
        or values that are not finite or, of images, far outside of [-1, 1].
    """
    are_images = images_lib.are_images(shape)
    wanted = jax.eval_shape(operator, jax.ShapeDtypeStruct((1, *shape), jnp.float32)).shape[1:]
    observed = []
    for file in files:
        if file.lower().endswith(".npy"):
            with as_user_error(f"cannot read the observation {file}"):
                array = np.load(epath.Path(file), allow_pickle=False)
                array = array.astype(np.float32, casting="same_kind")  # not of complex numbers
        elif not are_images:
            raise UserError(f"the observation {file}: give a .npy file")
        else:
            array = image_files.read_image(file, wanted[-1]) / np.float32(127.5) - 1
        if array.shape != wanted:
            found, needed = ("x".join(map(str, s)) for s in (array.shape, wanted))
            raise UserError(f"the observation {file} is {found}: this operator gives {needed}")
        if not are_images and not np.isfinite(array).all():
            raise UserError(f"the observation {file} is not finite: give finite numbers")
        if are_images and not np.abs(array).max() <= LARGEST:  # also true of NaN
            raise UserError(
                f"the observation {file} has values in [{array.min():g}, {array.max():g}]: "
                "scale pixels to [-1, 1]; noise may lead beyond"
            )
        observed.append(array)
    return np.stack(observed)


def _picture(observed, seen, restored, truth, standardisation):
    """Returns the picture of observations, samples, their mean and deviation, and originals.

    Values of signals, vectors and volumes that are not `seen` are left out.
    """
    n, _, *shape = restored.shape
    observed = observed if len(shape) == 3 else np.where(seen, observed, np.nan)
    for axis, side in enumerate(shape[:-1], start=1):  # enlarged by repeating
        positions = np.arange(side) * observed.shape[axis] // side
        observed = np.take(observed, positions, axis)
    observed = np.broadcast_to(observed, (n, *shape))
    if len(shape) < 3:
        n = min(n, NUM_IMAGES)
    mean = restored.mean(axis=1, keepdims=True)
    parts = {"observed": observed[:, None], "samples": restored[:, :SHOWN], "mean": mean}
    if len(shape) == 3:
        parts["deviation"] = 2 * np.minimum(restored.std(axis=1, keepdims=True), 1) - 1
    if truth is not None:
        parts["original"] = truth[:, None]
    if len(shape) == 3:
        parts = {name: np.clip(part, -1, 1) for name, part in parts.items()}
    parts = {name: part[:n] for name, part in parts.items()}
    return images_lib.rows(parts, standardisation=standardisation)
