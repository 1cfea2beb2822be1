"""What a run does: one short program a mode, over the pure functions."""

import io
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict
from tqdm import tqdm

from drl_jax import config as config_lib
from drl_jax import (
    data,
    exported,
    images,
    inpainting,
    interpolation,
    long_run_mode,
    long_run_report,
    masks,
    original,
    train_step,
)
from drl_jax import long_run as long_run_lib
from drl_jax import model as model_lib
from drl_jax.checkpoints import Checkpoints, make_writable
from drl_jax.errors import UserError
from drl_jax.evaluation import inception, levels, pixels, reference, summary, weights
from drl_jax.evaluation.weights import Weights
from drl_jax.model import Model

log = logging.getLogger(__name__)

# Changes the configuration of a trained model, by what the command line says.
Revise = Callable[[ConfigDict], ConfigDict]

ROWS = 8  # images that are completed where none are named
SHEET = 100  # images on a sheet of 10 x 10
STATISTICS = 256  # images on which the levels' statistics are computed
HELD = 10_000  # images at most that are held in memory, for the distance of raw pixels
SILENCE = 30  # seconds after which a log without a bar hears how far things are


def train(config: ConfigDict, workdir: epath.Path) -> None:
    """Trains, then writes samples.png and metrics.json."""
    from drl_jax import train as train_lib  # TensorFlow, behind clu: seconds

    perception = named_weights(config)
    model, step = train_lib.train(config, workdir)
    measure(config, model, step, workdir, perception)


def import_original(
    config: ConfigDict, prefix: str, image_size: int, workdir: epath.Path
) -> None:
    """Makes a work directory of a checkpoint of the authors' TensorFlow program.

    Raises:
      UserError: if the folder holds checkpoints already or cannot be written to, or this one
        cannot be used (`original`).
    """
    folder = workdir / "checkpoints"
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{workdir} holds checkpoints already: give another --workdir")
    tensors = original.read(prefix)
    config = original.configure(config, tensors, image_size)
    state = original.to_state(tensors, config)
    make_writable(workdir)  # all that can be known to be wrong was found before this line
    with Checkpoints(workdir, config) as checkpoints:
        checkpoints.save(state)
    network = ", ".join(f"{name} = {value}" for name, value in config.energy.items())
    log.info("step %d of a network with %s is in %s", state.step, network, workdir)


def evaluate(workdir: epath.Path, revise: Revise) -> None:
    """Computes the metrics of the newest checkpoint: metrics.json and samples.png.

    Raises:
      UserError: if there is no checkpoint, no data, no such file of Inception weights, or
        the folder cannot be written to.
    """
    config, model, step = model_lib.load_run(workdir, revise)
    data.open_source(config)
    perception = named_weights(config)
    make_writable(workdir)
    adapt(config, model)
    measure(config, model, step, workdir, perception)


def export(workdir: epath.Path) -> None:
    """Writes model.npz: what `drl_jax.load` needs of the newest checkpoint, in one file.

    Raises:
      UserError: if there is no checkpoint, or the folder cannot be written to.
    """
    run = model_lib.load_run(workdir)
    make_writable(workdir)
    exported.write(run, workdir / "model.npz")
    log.info("drl_jax.load reads %s", workdir / "model.npz")


def sample(workdir: epath.Path, revise: Revise, num_samples: int, seed: int) -> None:
    """Writes samples of the newest checkpoint: PNGs, a grid, and one array (.npz).

    Raises:
      UserError: if there is no checkpoint, or the folder cannot be written to.
    """
    config, model, step = model_lib.load_run(workdir, revise)
    folder = workdir / "samples" / f"step_{step}_seed_{seed}"
    make_writable(folder)
    adapt(config, model)
    batches: list[np.ndarray] = []
    for batch in draw(model, jax.random.key(seed), num_samples):
        first = sum(map(len, batches))
        for i, image in enumerate(images.to_uint8(batch), first):
            images.write_png(folder / f"{i:06d}.png", image)
        batches.append(batch)
    x = np.concatenate(batches)
    encoded = io.BytesIO()
    np.savez_compressed(encoded, samples=x)
    (folder / "samples.npz").write_bytes(encoded.getvalue())
    images.write_png(folder / "grid.png", images.grid(x[:SHEET], columns=10))
    log.info("%d samples are in %s", num_samples, folder)


def interpolate(
    workdir: epath.Path,
    revise: Revise,
    files: Sequence[str],
    pairs: int,
    frames: int,
    level: int | None,
    seed: int,
) -> None:
    """Writes strips between samples or between given images, and how smooth they are.

    Args:
      workdir: of a run.
      revise: changes the configuration.
      files: images, each two a pair; none for pairs of samples.
      pairs: of samples, where there are no files.
      frames: of a strip, its ends included.
      level: to which the given images are diffused; None for a third of the ladder.
      seed: of all noise.

    Raises:
      UserError: if there is no checkpoint, a file or the level cannot be used, or the folder
        cannot be written to.
    """
    config, model, step = model_lib.load_run(workdir, revise)
    T = model.method.schedule.T
    level = max(1, T // 3) if level is None else level
    interpolation.require_level(level, T)
    ends = data.prepared_files(config, files) if files else None
    name = f"step_{step}_seed_{seed}" + (f"_level_{level}" if files else "")
    folder = workdir / "interpolations" / name
    make_writable(folder)
    adapt(config, model)
    key = jax.random.key(seed)
    if ends is None:
        strips = model.interpolate(key, pairs, frames)
    else:
        strips = model.interpolate_images(key, ends[::2], ends[1::2], frames, level)
        # The strip's ends are recovered from noise: the images themselves stand beside them.
        strips = np.concatenate([ends[::2, None], strips, ends[1::2, None]], axis=1)
    for i, strip in enumerate(strips):
        images.write_png(folder / f"{i:03d}.png", images.grid(strip, columns=len(strip)))
    sheet = strips.reshape(-1, *strips.shape[2:])
    images.write_png(folder / "grid.png", images.grid(sheet, columns=strips.shape[1]))
    recovered = strips if ends is None else strips[:, 1:-1]
    smoothness = [interpolation.smoothness(strip) for strip in recovered]
    length = [interpolation.length(strip) for strip in recovered]
    distance = [interpolation.length(strip[[0, -1]]) for strip in recovered]
    metrics = {"step": step, "smoothness": smoothness, "length": length, "distance": distance}
    write_json(folder / "metrics.json", metrics)
    log.info(
        "the largest step is %.2f of the mean one (one jump: %d); strips are %.2f long, their "
        "ends %.2f apart",
        *(np.mean(smoothness), frames - 1, np.mean(length), np.mean(distance)),
    )
    log.info("%d strips are in %s", len(strips), folder)


def inpaint(
    workdir: epath.Path,
    revise: Revise,
    mask: str,
    files: Sequence[str],
    completions: int,
    rounds: int,
    seed: int,
) -> None:
    """Writes completions of images whose pixels a mask hides, and how near the truth they are.

    Args:
      workdir: of a run.
      revise: changes the configuration.
      mask: a name (`masks.named`), or a PNG file that is white where pixels are hidden.
      files: images; none for the first of the run's data.
      completions: of each image, at least 2.
      rounds: how often each level is drawn (`inpainting`).
      seed: of all noise, and of a random mask.

    Raises:
      UserError: if there is no checkpoint or no data, the mask or a file cannot be used, or
        the folder cannot be written to.
    """
    config, model, step = model_lib.load_run(workdir, revise)
    shape = model.method.energy.shape
    key, mask_key, samples_key = jax.random.split(jax.random.key(seed), 3)
    if mask.lower().endswith(".png"):
        known = data.read_image(mask, channels=1) < images.GREY
        title = epath.Path(mask).stem
    else:
        known = masks.named(mask, config.data.image_size, mask_key)
        title = mask.replace(":", "_")
    masks.require_mask(known, shape)
    if files:
        truth = data.prepared_files(config, files)
    else:
        truth = np.stack(list(data.all_images(config, limit=ROWS)))
    folder = workdir / "inpaintings" / f"step_{step}_seed_{seed}_{title}"
    make_writable(folder)
    adapt(config, model)
    completed = model.inpaint(key, truth, known, completions, rounds)
    samples = model.sample(samples_key, len(truth) * completions).reshape(completed.shape)
    shown = [
        np.where(known, truth, 0.0),
        np.broadcast_to(np.where(known, -1.0, 1.0), truth.shape),
        *completed.swapaxes(0, 1),
        truth,
    ]
    sheet = np.stack(shown, axis=1).reshape(-1, *shape)
    images.write_png(folder / "grid.png", images.grid(sheet, columns=len(shown)))
    errors = inpainting.errors(completed, samples, truth, known)
    write_json(folder / "metrics.json", {"step": step, **errors})
    log.info(
        "mean squared distance of hidden pixels: completion to truth %.3f, completion to "
        "completion %.3f, sample to truth %.3f",
        errors["completion_to_truth"],
        errors["between_completions"],
        errors["sample_to_truth"],
    )
    log.info("%d completions of each of %d images are in %s", completions, len(truth), folder)


def long_run(
    workdir: epath.Path,
    revise: Revise,
    num_steps: int,
    num_chains: int | None,
    levels: Sequence[int],
    seed: int,
) -> None:
    """Watches chains for thousands of steps (`long_run_mode`), going on where it stopped.

    Args:
      workdir: of a run.
      revise: changes the configuration.
      num_steps: of every chain.
      num_chains: a level; None for as many as one batch holds.
      levels: to be watched; none for all, or for ten of many.
      seed: of all noise, and of the choice of images.

    Raises:
      UserError: if there is no checkpoint or no data, the chains asked for are impossible or
        were begun with other settings, or the folder cannot be written to.
      Interrupted: a signal asked for the end; all is saved.
    """
    config, model, step = model_lib.load_run(workdir, revise)
    T = model.method.schedule.T
    watched = np.unique(levels or [group[0] for group in train_step.level_groups(T)])
    long_run_lib.require_levels(watched, T)
    long_run_lib.require_chain(model.method.sampler)
    sharing = long_run_lib.SHARING
    if num_chains is None:
        num_chains = max(1, config.evaluation.batch_size // len(watched) // sharing) * sharing
    long_run_lib.shared_conditions(num_chains)
    truth = np.stack(list(data.all_images(config, limit=config.evaluation.num_data)))
    key, setting_key = jax.random.split(jax.random.key(seed))
    setting = long_run_mode.prepare(model, setting_key, truth, watched, num_chains)
    name = f"step_{step}_{config.mcmc.sampler}_seed_{seed}"
    folder = workdir / "long_run" / name
    make_writable(folder)
    adapt(config, model)
    settings = {"num_chains": num_chains, "levels": watched.tolist()}
    fields = config_lib.flatten(config)
    decisive = ("mcmc.", "data.", "evaluation.num_data", "evaluation.batch_size")
    settings |= {f"config.{name}": v for name, v in fields if name.startswith(decisive)}
    story = long_run_mode.run(model, key, setting, num_steps, folder, settings)
    long_run_report.write(folder, story, setting, T)


def adapt(config: ConfigDict, model: Model) -> None:
    """Warms MALA or HMC up; the other samplers need nothing."""
    if config.mcmc.sampler not in ("mala", "hmc"):
        return
    step_size, acceptance = model.adapt(
        jax.random.key(config.seed), config.mcmc.warmup_steps, config.mcmc.target_acceptance
    )
    log.info("step sizes of %s after the warm-up:", config.mcmc.sampler)
    for group in train_step.level_groups(len(step_size)):
        t = group[0]
        log.info("  level %d: %.3g, acceptance %.2f", t, step_size[t], acceptance[t])


def draw(model: Model, key: Key[Array, ""], n: int) -> Iterator[Float[np.ndarray, "B H W C"]]:
    """Yields `model.sample_batches`, and shows how far they are."""
    done, told = 0, time.monotonic()
    with tqdm(total=n, unit="image", disable=None) as bar:
        for batch in model.sample_batches(key, n):
            yield batch
            done += len(batch)
            bar.update(len(batch))
            if bar.disable and time.monotonic() - told > SILENCE:
                log.info("%d of %d images", done, n)
                told = time.monotonic()


def named_weights(config: ConfigDict) -> Weights | None:
    """Reads the Inception weights that the configuration names, if it names any.

    Raises:
      UserError: if they cannot be used.
    """
    if config.evaluation.inception_weights:
        return weights.load(config.evaluation.inception_weights)
    if config.data.channels == 3 and config.data.image_size >= 32:
        log.info("FID, KID and the inception score are left out; for them, %s", weights.GET)
    return None


def measure(
    config: ConfigDict, model: Model, step: int, workdir: epath.Path, perception: Weights | None
) -> None:
    """Samples, compares with the data, and writes samples.png and metrics.json.

    Samples are compared as raw pixels, `HELD` of them at most, and all of them as the
    Inception network perceives them, if there are weights for it.
    """
    key, levels_key = jax.random.split(jax.random.key(config.seed))
    wanted = config.evaluation.num_samples
    num_held = min(wanted, HELD)
    batches = draw(model, key, max(wanted if perception else num_held, SHEET))
    held = []
    for batch in batches:
        held.append(batch)
        if sum(map(len, held)) > HELD:
            break
    samples = np.concatenate(held)
    images.write_png(workdir / "samples.png", images.grid(samples[:SHEET], columns=10))
    limit = min(config.evaluation.num_data, HELD)
    truth = np.stack(list(data.all_images(config, limit)))
    metrics = {"step": step, **pixels.pixel_metrics(samples[:num_held], truth)}
    metrics["levels"] = levels.level_statistics(model, levels_key, truth[:STATISTICS])
    if perception:
        all_batches = itertools.chain(held, batches)
        metrics["inception"] = perceived(config, model, all_batches, workdir, perception)
    write_json(workdir / "metrics.json", metrics)
    log.info(
        "pixel Fréchet distance %.3f (two halves of the data: %.3f); pixels %.2f to %.2f",
        metrics["pixel_frechet"],
        metrics["pixel_frechet_of_data_halves"],
        metrics["pixel_min"],
        metrics["pixel_max"],
    )
    log.info("samples.png and metrics.json are in %s", workdir)


def perceived(
    config: ConfigDict,
    model: Model,
    batches: Iterable[Float[np.ndarray, "B H W C"]],
    workdir: epath.Path,
    perception: Weights,
) -> dict[str, float]:
    """Compares samples, which come in batches, with the data by FID, KID, inception score."""
    extractor = inception.Extractor(
        perception.variables, model.mesh, config.evaluation.batch_size
    )
    of_data = reference.of_data(config, extractor, perception.sha256, workdir)
    stream = (image for batch in batches for image in images.to_uint8(batch))
    of_samples = summary.summarise(extractor, stream, config.evaluation.num_samples)
    metrics = summary.compare(of_samples, of_data)
    log.info(
        "FID %(fid).3f, KID %(kid).3g, inception score %(inception_score).2f (of the data: "
        "%(inception_score_of_data).2f)",
        metrics,
    )
    return metrics


def write_json(path: epath.Path, values: dict[str, Any]) -> None:
    """Writes numbers by name."""
    path.write_text(json.dumps(values, indent=2) + "\n")
