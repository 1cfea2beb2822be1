"""The summary of the data, computed once and kept beside them."""

import hashlib
import io
import json
import logging

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from drl_jax import data, images
from drl_jax.errors import UserError
from drl_jax.evaluation.frechet import Moments
from drl_jax.evaluation.inception import Extractor
from drl_jax.evaluation.summary import Summary, summarise
from drl_jax.files import write_whole

log = logging.getLogger(__name__)


def of_data(
    config: ConfigDict, extractor: Extractor, sha256: str, workdir: epath.Path
) -> Summary:
    """Returns the summary of the data's first config.evaluation.num_data images.

    It is read from its file if there is one: next to the folder that holds the data, or in
    the work directory where that place does not exist or cannot be written to. The file's
    name is a digest of which images, how many, how prepared, and `sha256`, of the weights.
    Images that were replaced in a folder by others of the same names are not noticed.

    Raises:
      UserError: where an image is unreadable.
    """
    source = data.open_source(config)
    n = min(len(source), config.evaluation.num_data)
    prepared = [config.data.image_size, config.data.crop, config.data.channels]
    key = json.dumps([source.identity, n, *prepared, sha256])
    name = f"inception-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    files = [workdir / name]
    if source.folder is not None:
        files.insert(0, source.folder.parent / f"{source.folder.name}.{name}")
    for file in files:
        summary = read(file)
        if summary is not None:
            log.info("the data's Inception statistics were read from %s", file)
            return summary
    log.info("the data's Inception statistics are computed, once, from %d images", n)
    stream = (images.to_uint8(x) for x in data.all_images(config, limit=n))
    bar = tqdm(stream, total=n, unit="image", disable=None)
    summary = summarise(extractor, bar, n)
    for file in files:
        try:
            write(file, summary)
        except UserError as error:
            log.info("the data's Inception statistics cannot be kept: %s", error)
        else:
            log.info("the data's Inception statistics are kept in %s", file)
            break
    return summary


def write(file: epath.Path, summary: Summary) -> None:
    """Writes a summary, so that the file is never there in part.

    Raises:
      UserError: if it cannot be written.
    """
    encoded = io.BytesIO()
    np.savez(
        encoded,
        features=summary.features,
        score=summary.score,
        **summary.moments._asdict(),
    )
    write_whole(file, encoded.getvalue())


def read(file: epath.Path) -> Summary | None:
    """Returns a summary that was written, or None where there is none or it is damaged."""
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
            moments = Moments(int(arrays["n"]), arrays["mean"], arrays["scatter"])
            mean, std = arrays["score"]
            return Summary(moments, arrays["features"], (float(mean), float(std)))
    except FileNotFoundError:
        return None
    except Exception as error:  # of many classes: the disk's, zipfile's, numpy's
        log.warning("%s cannot be read (%s)", file, error)
        return None
