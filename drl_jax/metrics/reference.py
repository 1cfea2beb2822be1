"""Inception statistics of the data, computed once and cached in a file."""

import logging

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from drl_jax.data import pipeline
from drl_jax.data.sources import Source
from drl_jax.metrics import cache
from drl_jax.metrics.frechet import Moments
from drl_jax.metrics.inception import FeatureFn
from drl_jax.metrics.summary import Summary, summarise
from drl_jax.runtime import progress

log = logging.getLogger(__name__)

# Fields of config.data on which the pixels of prepared images depend.
PREPARATION = ("image_size", "crop", "channels", "background")


def of_data(
    config: ConfigDict, source: Source, extractor: FeatureFn, network: str, workdir: epath.Path
) -> Summary:
    """Returns the summary of the first config.evaluation.num_data images of the data.

    It is computed once and cached (`cache.of_data`), by the number of images, their preparation
    and the network.

    Args:
      config: its fields data and evaluation.num_data are used.
      source: the data.
      extractor: computes Inception features.
      network: string that identifies the extractor: its weights and how it scales images.
      workdir: work directory of the run.

    Raises:
      UserError: if an image cannot be read.
    """
    n = min(len(source), config.evaluation.num_data)

    def compute() -> cache.Arrays:
        log.info("computing the Inception statistics of the data, once, from %d images", n)
        stream = (pipeline.to_uint8(x) for x in pipeline.all_examples(config, source, limit=n))
        bar = progress.bar(iterable=stream, total=n, unit="image")
        # A bar has a length, but can be read only once.
        return _to_arrays(summarise(extractor, iter(bar), n))

    arrays = cache.of_data(
        kind="inception",
        description="the Inception statistics of the data",
        key=[*(config.data[name] for name in PREPARATION), network],
        source=source,
        n=n,
        workdir=workdir,
        compute=compute,
    )
    return _from_arrays(arrays)


def _to_arrays(summary: Summary) -> cache.Arrays:
    """Returns the fields of a summary as arrays."""
    fields = summary.moments._asdict() | {
        "features": summary.features,
        "score": summary.score,
        "score_of_splits": summary.score_of_splits,
    }
    return {name: np.asarray(value) for name, value in fields.items()}


def _from_arrays(arrays: cache.Arrays) -> Summary:
    """Returns the summary of which `_to_arrays` returned the fields."""
    mean, std = arrays["score_of_splits"]
    return Summary(
        moments=Moments(int(arrays["n"]), arrays["mean"], arrays["scatter"]),
        features=arrays["features"],
        score=float(arrays["score"]),
        score_of_splits=(float(mean), float(std)),
    )
