"""The task `evaluate`: measures a trained model against its data."""

import itertools
import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from drl_jax import config as config_lib
from drl_jax import noise
from drl_jax.data import mixtures, pipeline, sources
from drl_jax.data.sources import Source
from drl_jax.errors import UserError
from drl_jax.method import METROPOLIS
from drl_jax.metrics import (
    distances,
    energy_classifier,
    inception,
    labelled,
    levels,
    pixels,
    plane,
    reference,
    summary,
    weights,
)
from drl_jax.metrics.labelled import MAX_IN_MEMORY
from drl_jax.metrics.weights import Weights
from drl_jax.model import Model
from drl_jax.plots import figures, images
from drl_jax.sampling import ladder
from drl_jax.storage import data_record, results
from drl_jax.storage.atomic import finite_or_none, make_writable, write_json
from drl_jax.storage.runs import Run
from drl_jax.tasks import common

log = logging.getLogger(__name__)

LEVEL_IMAGES = 256  # images from which the statistics of the levels are computed
LABEL_IMAGES = 1000  # images that are classified by the energies, of each split
MAX_TEST_POINTS = 2000  # points in the two-sample test, whose cost is quadratic
MAX_PATH_LEVELS = 60  # levels at which the paths of points are recorded for the figure
PUBLISHED_SAMPLES = 50_000  # samples from which published values of FID are computed


class Protocol(NamedTuple):
    """How samples become the input of the Inception network.

    Attributes:
      truncate: whether pixel values are rounded down to bytes, instead of to the nearest byte.
      centre: pixel value that becomes 0 in the network's input (`inception.prepare`).
    """

    truncate: bool
    centre: float


# Protocol by value of --protocol. The authors' program truncates (ruiqigao/recovery_likelihood,
# datasets.py, `data_postprocess`). `table.PAPER` lists the settings of the paper's protocol.
PROTOCOLS = {
    "default": Protocol(truncate=False, centre=inception.CENTRE),
    "paper": Protocol(truncate=True, centre=inception.CENTRE_OF_PAPER),
}


def run(
    run: Run,
    workdir: epath.Path,
    protocol: str,
    label: str | None,
    guidance: float,
) -> None:
    """Measures how well a trained model fits its data, and shows samples.

    Uses `config.evaluation.num_samples` samples, generated with the seed of the run, and the
    first `config.evaluation.num_data` examples of the data.

    Writes to `workdir`:
      settings.json: how the samples were drawn and compared.
      samples.png: a grid of samples, a histogram of points, or samples beside data.
      toy2d.png: for points in the plane, the learned and the true density at several levels.
      metrics.json: the fields of `measure_images`, `measure_points` or `measure_vectors`. It is
        written last, so that next to it all other files belong to it. A number that is
        undefined is null.

    Args:
      run: the trained model.
      workdir: where the results go.
      protocol: one of `PROTOCOLS`, for FID.
      label: class of the samples, or 0 for none; 'all': each class in turn; None: 'all', if the
        model has classes.
      guidance: weight of guidance (`Model.given`).

    Raises:
      UserError: if the model has no such class, the data or the Inception weights cannot be
        used, the folder cannot be written to, there are no weights for the paper's protocol, or
        a sample is not finite.
    """
    label = common.label_of_samples(run.model, label, guidance)
    run = common.given(run, label, guidance)
    source = sources.open_source(run.config)
    data_record.warn_if_changed(workdir, source)
    require_comparable(run.config, source)
    inception_weights = load_inception_weights(run.config)
    if protocol == "paper" and not inception_weights:
        raise UserError(
            "--protocol=paper computes FID and needs the weights of the Inception network: "
            f"{weights.DOWNLOAD_HINT}"
        )
    make_writable(workdir)
    measure(
        run=common.adapted(run, guidance if label == "all" else 0.0),
        source=source,
        workdir=workdir,
        inception_weights=inception_weights,
        protocol=protocol,
        label=label,
        guidance=guidance,
    )


def require_comparable(config: ConfigDict, source: Source) -> None:
    """Checks that there are enough examples to compare samples with, by reading the first ones.

    Raises:
      UserError: if fewer than the least value of `config.evaluation.num_data` can be read.
    """
    least = config_lib.MINIMUM["evaluation.num_data"]
    pipeline.load_examples(config, source, limit=least, least=least)


def load_inception_weights(config: ConfigDict) -> Weights | None:
    """Loads the weights in `config.evaluation.inception_weights`; returns None if it is ''.

    In that case it logs where to get them, if the images are ones that FID suits: in colour,
    and 32 or more pixels wide.

    Raises:
      UserError: if the weights cannot be used.
    """
    if config.evaluation.inception_weights:
        return weights.load(config.evaluation.inception_weights)
    if config.data.channels == 3 and config.data.image_size >= 32:
        log.info(
            "skipping FID, KID and the inception score; to compute them, %s",
            weights.DOWNLOAD_HINT,
        )
    return None


def measure(
    run: Run,
    source: Source,
    workdir: epath.Path,
    inception_weights: Weights | None,
    protocol: str = "default",
    label: str | None = None,
    guidance: float = 0.0,
) -> dict[str, Any]:
    """Samples the model, compares with the data, and writes the results (see `run`).

    Returns:
      the content of metrics.json.

    Args:
      run: the trained model, of the class `label`, with adapted step sizes.
      source: the data.
      workdir: where the results go.
      inception_weights: for FID, KID and the inception score; None skips these.
      protocol: one of `PROTOCOLS`, for the same metrics.
      label: class of the samples (`run`).
      guidance: weight of guidance.
    """
    label = common.label_of_samples(run.model, label, guidance)
    key, levels_key = jax.random.split(common.task_key("evaluate", run.config.seed))
    if run.config.data.name in mixtures.PLANAR_SHAPES:
        return measure_points(run, workdir, key)
    if not images.are_images(run.model.shape):
        return measure_arrays(run, source, workdir, key, levels_key, label, guidance)
    return measure_images(
        run, source, workdir, key, levels_key, inception_weights, protocol, label, guidance
    )


def begin_results(
    run: Run, workdir: epath.Path, label: str | None = None, guidance: float = 0.0
) -> None:
    """Writes settings.json, and removes metrics.json until it is written last.

    Raises:
      UserError: if a file cannot be removed or written.
    """
    evaluation = common.resume_settings(run.config, ("evaluation.",))
    evaluation |= common.condition(label, guidance)
    settings = common.result_settings(run, "evaluate", run.config.seed, **evaluation)
    results.begin(workdir, settings, last="metrics.json")


def measure_images(
    run: Run,
    source: Source,
    workdir: epath.Path,
    key: Key[Array, ""],
    levels_key: Key[Array, ""],
    inception_weights: Weights | None,
    protocol: str,
    label: str | None,
    guidance: float,
) -> dict[str, Any]:
    """Compares generated images with the data, and returns the content of metrics.json.

    Writes to `workdir`:
      samples.png: a grid of samples.
      metrics.json, with the fields:
        step: training steps of the model.
        pixel_frechet, ..., num_data: see `pixels.pixel_metrics`; computed from at most
          `MAX_IN_MEMORY` samples and as many images of the data.
        levels: see `levels.level_statistics`.
        classifier: what a classifier of the data says (`classifier_metrics`), if the data have
          labels; computed from the same samples.
        inception: FID, KID and the inception score (`inception_metrics`), if there are
          weights; computed from all samples, of which few are in memory at a time.
        labels: what the energy says about labels (`label_metrics`), if it takes them.

    Args:
      run: the trained model.
      source: the data.
      workdir: where the results go.
      key: for the samples.
      levels_key: for the statistics of the levels.
      inception_weights: of the Inception network, or None.
      protocol: one of `PROTOCOLS`.
      label: class of the samples, or 0 for none; 'all': each class in turn; None: no labels.
      guidance: weight of guidance.
    """
    config, model = run.config, run.model
    num_samples = config.evaluation.num_samples
    num_pixel_samples = min(num_samples, MAX_IN_MEMORY)
    grid_size = images.grid_size(model.shape, common.COLUMNS)
    num_drawn = max(num_samples if inception_weights else num_pixel_samples, grid_size)
    batches = common.draw(model, key, num_drawn, guidance if label == "all" else 0.0)
    in_memory = []
    for batch in batches:
        in_memory.append(batch)
        if sum(map(len, in_memory)) > MAX_IN_MEMORY:
            break
    samples = np.concatenate(in_memory)
    limit = min(config.evaluation.num_data, MAX_IN_MEMORY)
    data = pipeline.load_examples(config, source, limit)
    metrics = {"step": run.step, **pixels.pixel_metrics(samples[:num_pixel_samples], data)}
    by_level = levels.level_statistics(model, levels_key, data[:LEVEL_IMAGES])
    metrics["levels"] = by_level
    if config.mcmc.sampler in METROPOLIS:
        levels.warn_of_rounding(by_level["level"], by_level["resolution"])
    labels = model.each_label(num_pixel_samples) if label == "all" else None
    if label not in (None, "all") and int(label):
        labels = np.full(num_pixel_samples, int(label))
    compared = classifier_metrics(config, source, samples[:num_pixel_samples], workdir, labels)
    if compared:
        metrics["classifier"] = compared
    if model.classes and source.classes == model.classes:
        metrics["labels"] = label_metrics(config, source, model, levels_key)
    if inception_weights:
        all_batches = itertools.chain(in_memory, batches)
        metrics["inception"] = inception_metrics(
            config, source, model, all_batches, workdir, inception_weights, protocol
        )
    metrics = finite_or_none(metrics)
    begin_results(run, workdir, label, guidance)
    images.write_png(workdir / "samples.png", images.picture(samples, common.COLUMNS))
    write_json(workdir / "metrics.json", metrics)
    log.info(
        "pixel Fréchet distance %.3f (between two halves of the data: %.3f); pixel values "
        "from %.2f to %.2f; samples with a pixel beyond ±%g: %d of %d",
        metrics["pixel_frechet"],
        metrics["pixel_frechet_of_data_halves"],
        metrics["pixel_min"],
        metrics["pixel_max"],
        pixels.FAR,
        metrics["num_outside"],
        metrics["num_samples"],
    )
    log.info("wrote samples.png and metrics.json to %s", workdir)
    return metrics


def classifier_metrics(
    config: ConfigDict,
    source: Source,
    samples: Float[np.ndarray, "n *D"],
    workdir: epath.Path,
    labels: Int[np.ndarray, "n"] | None = None,
) -> dict[str, Any] | None:
    """Compares samples with labelled data, by a classifier that was trained on the data.

    Returns:
      The fields of `Classifier.metrics`, and
        accuracy_of_test: share of the test images that are classified correctly.
        held_out: whether the model is known not to have been trained on the test images.
        label_agreement: share of the samples whose most probable class is their label, if they
          have labels.
      None if there are no labels, or too few images (`labelled.load`).

    Args:
      config: uses `data` and `evaluation.num_data`.
      source: the training data.
      samples: images drawn from the model.
      workdir: keeps the classifier if the folder of the data cannot (`classifier.of_data`).
      labels: labels of the samples, from 1.
    """
    data = labelled.load(config, source, len(samples), workdir)
    if data is None:
        return None
    metrics = data.classifier.metrics(samples, data.train, data.test) | {
        "accuracy_of_test": data.classifier.accuracy(data.test, data.test_labels),
        "held_out": data.held_out,
    }
    if labels is not None:
        agreement = data.classifier.accuracy(samples, labels - 1)
        metrics["label_agreement"] = agreement
        log.info("the classifier finds the label of %.3f of the samples", agreement)
    log.info(
        "according to a classifier of the data, %(num_samples)d samples (in brackets: as many "
        "test images) have the feature Fréchet distance %(feature_frechet).3f "
        "(%(feature_frechet_of_test).3f), precision %(precision).3f (%(precision_of_test).3f), "
        "recall %(recall).3f (%(recall_of_test).3f), and a confident class in %(confident).3f "
        "(%(confident_of_test).3f) of cases; their distance to the nearest training image is "
        "%(median_ratio).2f (median) and %(percentile_5_ratio).2f (5th percentile) times that "
        "of test images",
        metrics | metrics["nearest"],
    )
    return metrics


def label_metrics(
    config: ConfigDict, source: Source, model: Model, key: Key[Array, ""]
) -> dict[str, Any]:
    """Classifies test images by the energies of the classes.

    Returns:
      the fields of `energy_classifier.compare`, for at most `LABEL_IMAGES` random images each
      to fit and to test, and held_out: whether the model is known not to have been trained on
      the latter.

    Args:
      config: uses `data` and `evaluation`.
      source: the training data.
      model: a model with classes.
      key: random key of the noise.
    """
    test = sources.open_held_out(config)
    (x, own), (x_test, own_test) = (
        pipeline.load_labelled(config, sources.random_part(part, LABEL_IMAGES), LABEL_IMAGES)
        for part in (source, test)
    )
    metrics = energy_classifier.compare(model, key, x, own, x_test, own_test)
    log.info(
        "the energies of level %(level)d find the label of %(accuracy_of_test).3f of "
        "%(num_test)d test images",
        metrics,
    )
    return metrics | {"held_out": test.held_out}


def measure_points(run: Run, workdir: epath.Path, key: Key[Array, ""]) -> dict[str, Any]:
    """Compares densities in the plane with the true ones, and samples with exact samples.

    Returns the content of metrics.json.

    Writes to `workdir`:
      samples.png: a histogram of the samples.
      toy2d.png: the learned and the true density and the samples at the shown levels.
      metrics.json, with the fields:
        step: training steps of the model.
        num_samples: number of samples, at most `MAX_TEST_POINTS`.
        two_sample_p_value: p-value of the hypothesis that the samples follow the true
          density of level 0 (`distances.two_sample_test`).
        levels: for each shown level, from the highest to level 0: level, log_Z [nats],
          kl = KL(true ‖ learned) [nats], and edge_mass, the learned mass along the edge of
          the grid of integration (`plane.compare`).

    Args:
      run: the trained model.
      workdir: where the results go.
      key: for the samples and the exact samples.
    """
    config, model = run.config, run.model
    schedule = model.method.schedule
    data = mixtures.PLANAR_SHAPES[config.data.name]()
    shown = plane.shown_levels(schedule, figures.LEVELS)
    samples_key, data_key = jax.random.split(key)
    n = min(config.evaluation.num_samples, MAX_TEST_POINTS)
    keys = noise.example_keys(samples_key, jnp.arange(n))
    x_T = np.asarray(ladder.white_noise(keys, model.shape, schedule))
    stops = sorted({*shown, *plane.shown_levels(schedule, MAX_PATH_LEVELS)}, reverse=True)
    x = {schedule.T: x_T}  # by level
    for top, bottom in itertools.pairwise([schedule.T, *stops]):
        x[bottom] = model.descend(samples_key, x[top], top, bottom)
    samples = x[0]
    common.require_finite(samples, "samples")
    exact = mixtures.marginal(data, 0, schedule).sample(jax.random.split(data_key, n))
    rng = np.random.default_rng(config.seed)
    p_value = distances.two_sample_test(
        rng, samples, np.asarray(exact), bandwidths=plane.BANDWIDTHS
    )
    grid = plane.square_grid()
    compared = plane.compare(model, mixtures.exact_F(data, schedule), shown, grid)
    metrics: dict[str, Any] = {
        "step": run.step,
        "num_samples": n,
        "two_sample_p_value": p_value,
        "levels": {
            "level": shown,
            "log_Z": [compared[t].log_Z for t in shown],
            "kl": [compared[t].kl for t in shown],
            "edge_mass": [compared[t].edge_mass for t in shown],
        },
    }
    metrics = finite_or_none(metrics)
    begin_results(run, workdir)
    images.write_png(workdir / "samples.png", images.picture(samples, common.COLUMNS))
    figures.write_levels(workdir / "toy2d.png", compared, x, grid)
    write_json(workdir / "metrics.json", metrics)
    if max(metrics["levels"]["edge_mass"]) > plane.EDGE_MASS:
        log.warning(
            "up to %.2g of the mass of a learned density is along the edge of the grid: there "
            "is also mass outside the grid, and the KL divergences are too small",
            max(metrics["levels"]["edge_mass"]),
        )
    log.info(
        "KL(data || model) at level 0: %.4f nats; two-sample p-value of %d samples: %.3f",
        compared[0].kl,
        n,
        p_value,
    )
    log.info("wrote toy2d.png, samples.png and metrics.json to %s", workdir)
    return metrics


def measure_arrays(
    run: Run,
    source: Source,
    workdir: epath.Path,
    key: Key[Array, ""],
    levels_key: Key[Array, ""],
    label: str | None,
    guidance: float,
) -> dict[str, Any]:
    """Compares samples with data whose density is not known: vectors, signals or volumes.

    The data are held out from training, if there are such. They get the noise of level 0, as
    samples have it, unless these are denoised.

    Returns the content of metrics.json.

    Writes to `workdir`:
      samples.png: samples beside data (`images.picture`).
      metrics.json, with the fields:
        step: training steps of the model.
        num_samples: number of samples, at most `MAX_TEST_POINTS`, and as many as data.
        held_out: whether training is known not to have used the data.
        two_sample_p_value: p-value of the hypothesis that samples and data have the same
          distribution (`distances.two_sample_test`).
        sliced_wasserstein, energy_distance, c2st_accuracy, correlation_error,
          largest_correlation_error, each also with _of_data_halves; and error_of_mean and
          error_of_std, with one number per value of an example: see `distances.compare`.
        classifier, labels: as for images (`measure_images`); not for vectors without labels.

    Args:
      run: the trained model.
      source: the training data.
      workdir: where the results go.
      key: for the samples and the noise of the data.
      levels_key: for the accuracy of the energies as a classifier.
      label: class of the samples, or 0 for none; 'all': each class in turn; None: no labels.
      guidance: weight of guidance.
    """
    config, model = run.config, run.model
    one_class = label is not None and label != "all" and int(label) > 0
    held_out = sources.open_held_out(config)
    compared = common.of_label(held_out, label if one_class else None)
    n = min(config.evaluation.num_samples, config.evaluation.num_data, MAX_TEST_POINTS)
    n = min(n, len(compared))
    data = pipeline.load_examples(config, sources.random_part(compared, n))
    samples_key, data_key = jax.random.split(key)
    samples = np.concatenate(
        list(common.draw(model, samples_key, n, guidance if label == "all" else 0.0))
    )
    if not model.method.sampler.denoise:
        data = common.with_noise_of_level_0(model, data_key, data)
    rng = np.random.default_rng(config.seed)
    metrics: dict[str, Any] = {
        "step": run.step,
        "num_samples": n,
        "held_out": held_out.held_out,
        "two_sample_p_value": distances.two_sample_test(rng, samples, data),
        **distances.compare(samples, data),
    }
    names = held_out.columns if isinstance(held_out, sources.Arrays) else ()
    picture = images.picture(samples, common.COLUMNS, data, names)
    log.info(
        "%(num_samples)d samples and as many data (in brackets: two halves of the data) have "
        "the sliced Wasserstein distance %(sliced_wasserstein).3f "
        "(%(sliced_wasserstein_of_data_halves).3f), energy distance %(energy_distance).3f "
        "(%(energy_distance_of_data_halves).3f), error of correlations %(correlation_error).3f "
        "(%(correlation_error_of_data_halves).3f), and a classifier separates them with "
        "accuracy %(c2st_accuracy).3f (%(c2st_accuracy_of_data_halves).3f); two-sample p-value "
        "%(two_sample_p_value).3f; the data: %(split)s",
        metrics | {"split": held_out.described_split()},
    )
    labels = model.each_label(n) if label == "all" else None
    if label is not None and one_class:
        labels = np.full(n, int(label))
    if classified := classifier_metrics(config, source, samples, workdir, labels):
        metrics["classifier"] = classified
    if model.classes and source.classes == model.classes:
        metrics["labels"] = label_metrics(config, source, model, levels_key)
    metrics = finite_or_none(metrics)
    begin_results(run, workdir, label, guidance)
    images.write_png(workdir / "samples.png", picture)
    write_json(workdir / "metrics.json", metrics)
    log.info("wrote samples.png and metrics.json to %s", workdir)
    return metrics


def inception_metrics(
    config: ConfigDict,
    source: Source,
    model: Model,
    batches: Iterable[Float[np.ndarray, "B H W C"]],
    workdir: epath.Path,
    inception_weights: Weights,
    protocol: str,
) -> dict[str, Any]:
    """Returns FID, KID and the inception score of samples, compared with the data.

    The fields are those of `summary.compare`, and protocol, with the fields:
      name: the protocol.
      sampler, K, start, noise_scale, denoise: how the samples were drawn (`config.mcmc`).
      data: identity of the data.
      pixels: whether the samples' pixel values were rounded or truncated to bytes.
      network_input: how the network's input is computed from a pixel value x.
      comparable: whether there are at least `PUBLISHED_SAMPLES` samples, and the data are all
        images of the split 'train', as for published values.

    Args:
      config: uses `evaluation` and the preparation of `data`.
      source: the data.
      model: its engine runs the Inception network too.
      batches: at least `config.evaluation.num_samples` samples in [-1, 1], in batches.
      workdir: keeps the data's statistics if their own folder cannot (`reference.of_data`).
      inception_weights: of the Inception network.
      protocol: one of `PROTOCOLS`.
    """
    truncate, centre = PROTOCOLS[protocol]
    extractor = inception.Extractor(inception_weights.variables, model.engine, centre)
    network = f"{inception_weights.sha256}, {centre}"
    data = reference.of_data(config, source, extractor, network, workdir)
    stream = (image for batch in batches for image in pipeline.to_uint8(batch, truncate))
    samples = summary.summarise(extractor, stream, config.evaluation.num_samples)
    metrics = summary.compare(samples, data)
    followed = {
        "name": protocol,
        "sampler": config.mcmc.sampler,
        "K": config.mcmc.K,
        "start": config.mcmc.start,
        "noise_scale": config.mcmc.noise_scale,
        "denoise": config.mcmc.denoise,
        "data": source.identity,
        "pixels": "truncated" if truncate else "rounded",
        "network_input": f"(x - {centre:g}) / {centre:g}",
        "comparable": metrics["num_samples"] >= PUBLISHED_SAMPLES
        and metrics["num_data"] == len(source)
        and source.split == "train",
    }
    warning = (
        f"; not comparable with published values, which use {PUBLISHED_SAMPLES:,} samples and "
        "all training images"
    )
    log.info(
        "FID %(fid).3f, KID %(kid).3g, inception score %(inception_score).2f (mean of ten "
        "splits: %(inception_score_of_splits).2f; of the data: %(inception_score_of_data).2f); "
        "protocol %(name)r: %(num_samples)d samples by %(sampler)s, noise scaled by "
        "%(noise_scale)g, %(num_data)d images of %(data)s, pixels %(pixels)s, network input "
        "%(network_input)s%(warning)s",
        metrics | followed | {"warning": "" if followed["comparable"] else warning},
    )
    return metrics | {"protocol": followed}
