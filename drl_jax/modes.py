"""What a run does: one short program a mode, over the pure functions."""

import io
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict
from tqdm import tqdm

from drl_jax import data, exported, images, original, train_step
from drl_jax import model as model_lib
from drl_jax.checkpoints import Checkpoints, make_writable
from drl_jax.errors import UserError
from drl_jax.evaluation import inception, levels, pixels, reference, summary, weights
from drl_jax.evaluation.weights import Weights
from drl_jax.model import Model

log = logging.getLogger(__name__)

# Changes the configuration of a trained model, by what the command line says.
Revise = Callable[[ConfigDict], ConfigDict]

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
    (workdir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
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
