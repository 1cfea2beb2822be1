"""The metrics of a trained model, and a picture of its samples."""

import itertools
import logging
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from drl_jax import data, figures, images, noise, sampling, testbeds
from drl_jax import model as model_lib
from drl_jax.evaluation import (
    inception,
    levels,
    pixels,
    plane,
    reference,
    summary,
    weights,
)
from drl_jax.evaluation.weights import Weights
from drl_jax.files import make_writable
from drl_jax.model import Model
from drl_jax.modes import parts
from drl_jax.modes.parts import Revise

log = logging.getLogger(__name__)

STATISTICS = 256  # images on which the levels' statistics are computed
HELD = 10_000  # images at most that are held in memory, for the distance of raw pixels
TESTED = 2000  # points at most in the two-sample test, whose time grows with their square
STOPS = 60  # on the way down, at most, at which points are seen


def run(workdir: epath.Path, revise: Revise) -> None:
    """Computes the metrics of the newest checkpoint: metrics.json and samples.png.

    Of points toy2d.png besides, which shows all levels.

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

    Points are compared by quadrature, and written as toy2d.png too (`measure_points`). Images
    are compared as raw pixels, `HELD` of them at most, and all of them as the
    Inception network perceives them, if there are weights for it.
    """
    key, levels_key = jax.random.split(jax.random.key(config.seed))
    if images.are_points(model.method.energy.shape):
        measure_points(config, model, step, workdir, key)
        return
    wanted = config.evaluation.num_samples
    num_held = min(wanted, HELD)
    sheet = images.shown(model.method.energy.shape, parts.COLUMNS)
    batches = parts.draw(model, key, max(wanted if perception else num_held, sheet))
    held = []
    for batch in batches:
        held.append(batch)
        if sum(map(len, held)) > HELD:
            break
    samples = np.concatenate(held)
    images.write_png(workdir / "samples.png", images.picture(samples, parts.COLUMNS))
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


def measure_points(
    config: ConfigDict, model: Model, step: int, workdir: epath.Path, key: Key[Array, ""]
) -> None:
    """Compares each shown level's energy with the true one, and samples with the data.

    Writes samples.png, toy2d.png and metrics.json: log Z, KL(q ‖ p) and the mass along the
    grid's edge of the levels that are shown (`plane.compare`), and the p-value of the samples'
    coming from the true density of level 0 (`plane.two_sample_test`).
    """
    schedule = model.method.schedule
    truth = testbeds.PLANE[config.data.name]()
    shown = plane.shown_levels(schedule, figures.LEVELS)
    samples_key, truth_key = jax.random.split(key)
    n = min(config.evaluation.num_samples, TESTED)
    keys = noise.example_keys(samples_key, jnp.arange(n))
    x = np.asarray(sampling.white_noise(keys, model.method.energy.shape, schedule))
    stops = sorted({*shown, *plane.shown_levels(schedule, STOPS)}, reverse=True)
    on_the_way = {schedule.T: x}
    for top, bottom in itertools.pairwise([schedule.T, *stops]):
        on_the_way[bottom] = model.descend(samples_key, on_the_way[top], top, bottom)
    samples = on_the_way[0]
    fresh = testbeds.marginal(truth, 0, schedule).sample(jax.random.split(truth_key, n))
    p_value = plane.two_sample_test(
        np.random.default_rng(config.seed), samples, np.asarray(fresh)
    )
    grid = plane.square()
    exact = jax.jit(testbeds.exact_F(truth, schedule))
    known = {t: plane.compare(model.log_density, exact, t, grid) for t in shown}
    metrics: dict[str, Any] = {"step": step, "num_samples": n, "two_sample_p_value": p_value}
    metrics["levels"] = {
        "level": shown,
        "log_Z": [known[t].log_normaliser for t in shown],
        "kl": [known[t].kl for t in shown],
        "edge_mass": [known[t].edge for t in shown],
    }
    images.write_png(workdir / "samples.png", images.picture(samples, parts.COLUMNS))
    figures.write_levels(workdir / "toy2d.png", known, on_the_way, grid)
    parts.write_json(workdir / "metrics.json", metrics)
    if max(metrics["levels"]["edge_mass"]) > plane.EDGE_MASS:
        log.warning(
            "much of a learned density lies along the edge of the grid, %s: its KL is too "
            "small, there is mass beyond",
            metrics["levels"]["edge_mass"],
        )
    log.info(
        "KL(data || model) at level 0: %.4f nats; two-sample p-value of %d samples: %.3f",
        *(known[0].kl, n, p_value),
    )
    log.info("toy2d.png, samples.png and metrics.json are in %s", workdir)


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
