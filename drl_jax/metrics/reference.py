"""Inception statistics of the data, computed once and cached in a file."""

import hashlib
import json
import logging

from etils import epath
from ml_collections import ConfigDict

from drl_jax.data import pipeline
from drl_jax.data.sources import Source
from drl_jax.errors import UserError
from drl_jax.metrics.frechet import Moments
from drl_jax.metrics.inception import FeatureFn
from drl_jax.metrics.summary import Summary, summarise
from drl_jax.runtime import progress
from drl_jax.storage import npz
from drl_jax.storage.atomic import write_atomically

log = logging.getLogger(__name__)


def of_data(
    config: ConfigDict, source: Source, extractor: FeatureFn, network: str, workdir: epath.Path
) -> Summary:
    """Returns the summary of the first config.evaluation.num_data images of the data.

    The summary is read from a cache file if there is one, and otherwise computed and written
    there. The file is next to the folder that contains the data, or in the work directory if
    that place does not exist or cannot be written to. Its name contains a hash of the source's
    identity, the number of images, their preparation and the network. Replacing images in a
    folder by others with the same names is not detected.

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
    preparation = [config.data.image_size, config.data.crop, config.data.channels]
    key = json.dumps([source.identity, n, *preparation, network])
    name = f"inception-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    files = [workdir / name]
    if source.folder is not None:
        files.insert(0, source.folder.parent / f"{source.folder.name}.{name}")
    for file in files:
        summary = read(file)
        if summary is not None:
            log.info("read the Inception statistics of the data from %s", file)
            return summary
    log.info("computing the Inception statistics of the data, once, from %d images", n)
    stream = (pipeline.to_uint8(x) for x in pipeline.all_examples(config, source, limit=n))
    bar = progress.bar(iterable=stream, total=n, unit="image")
    summary = summarise(
        extractor, iter(bar), n
    )  # a bar has a length, but can be read only once
    for file in files:
        try:
            write(file, summary)
        except UserError as error:
            log.info("cannot cache the Inception statistics of the data: %s", error)
        else:
            log.info("cached the Inception statistics of the data in %s", file)
            break
    return summary


def write(file: epath.Path, summary: Summary) -> None:
    """Writes a summary in one step, so that no reader sees an incomplete file.

    Raises:
      UserError: if the file cannot be written.
    """
    arrays = summary.moments._asdict() | {
        "features": summary.features,
        "score": summary.score,
        "score_of_splits": summary.score_of_splits,
    }
    write_atomically(file, npz.encode(arrays))


def read(file: epath.Path) -> Summary | None:
    """Returns the summary in a file, or None if the file is missing or damaged."""
    try:
        arrays = npz.decode(file.read_bytes())
        moments = Moments(int(arrays["n"]), arrays["mean"], arrays["scatter"])
        mean, std = arrays["score_of_splits"]
        return Summary(
            moments=moments,
            features=arrays["features"],
            score=float(arrays["score"]),
            score_of_splits=(float(mean), float(std)),
        )
    except FileNotFoundError:
        return None
    except Exception as error:  # local disks, buckets and damaged files raise many classes
        log.warning("cannot read %s (%s); its content is computed again", file, error)
        return None
