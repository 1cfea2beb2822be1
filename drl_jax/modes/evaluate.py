"""The metrics of a trained model, and its samples on a sheet."""

import itertools
import logging
from collections.abc import Iterable

import jax
import numpy as np
from etils import epath
from jaxtyping import Float
from ml_collections import ConfigDict

from drl_jax import data, images
from drl_jax import model as model_lib
from drl_jax.evaluation import inception, levels, pixels, reference, summary, weights
from drl_jax.evaluation.weights import Weights
from drl_jax.files import make_writable
from drl_jax.model import Model
from drl_jax.modes import parts
from drl_jax.modes.parts import Revise

log = logging.getLogger(__name__)

STATISTICS = 256  # images on which the levels' statistics are computed
HELD = 10_000  # images at most that are held in memory, for the distance of raw pixels


def run(workdir: epath.Path, revise: Revise) -> None:
    """Computes the metrics of the newest checkpoint: metrics.json and samples.png.

    Raises:
      UserError: if there is no checkpoint, no data, no such file of Inception weights, or
        the folder cannot be written to.
    """
    config, model, step = model_lib.load_run(workdir, revise)
    data.open_source(config)
    perception = named_weights(config)
    make_writable(workdir)
    parts.adapt(config, model)
    measure(config, model, step, workdir, perception)


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
    batches = parts.draw(model, key, max(wanted if perception else num_held, parts.SHEET))
    held = []
    for batch in batches:
        held.append(batch)
        if sum(map(len, held)) > HELD:
            break
    samples = np.concatenate(held)
    images.write_png(workdir / "samples.png", images.grid(samples[: parts.SHEET], columns=10))
    limit = min(config.evaluation.num_data, HELD)
    truth = np.stack(list(data.all_images(config, limit)))
    metrics = {"step": step, **pixels.pixel_metrics(samples[:num_held], truth)}
    metrics["levels"] = levels.level_statistics(model, levels_key, truth[:STATISTICS])
    if perception:
        all_batches = itertools.chain(held, batches)
        metrics["inception"] = perceived(config, model, all_batches, workdir, perception)
    parts.write_json(workdir / "metrics.json", metrics)
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
