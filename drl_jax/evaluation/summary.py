"""What is kept of a set of images, and how two sets are compared by it."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from drl_jax.evaluation import frechet, scores
from drl_jax.evaluation.frechet import Moments
from drl_jax.evaluation.inception import Extractor

# Of so many images, spread evenly over the set, the features themselves are kept, for KID:
# 80 MB, and ten times what one of its subsets takes.
KEPT = 10_000


class Summary(NamedTuple):
    """A set of images as the Inception network sees it.

    Attributes:
      moments: of the features '2048' of all images.
      features: of at most `KEPT` images.
      score: mean and standard deviation of the inception score.
    """

    moments: Moments
    features: Float[np.ndarray, "k 2048"]
    score: tuple[float, float]


def summarise(
    extractor: Extractor, images: Iterable[UInt8[np.ndarray, "H W C"]], n: int
) -> Summary:
    """Summarises the first n images of a stream that has as many; few are held at a time."""
    moments = frechet.no_moments(2048)
    features, logits = [], []
    for batch in extractor(itertools.islice(images, n)):
        x = batch["2048"]
        places = np.arange(moments.n, moments.n + len(x))
        features.append(x[places * KEPT % n < KEPT])  # KEPT of n at equal distances, or all
        logits.append(batch["logits_unbiased"])
        moments = frechet.merge(moments, frechet.moments(x))
    score = scores.inception_score(np.concatenate(logits))
    return Summary(moments, np.concatenate(features), score)


def compare(samples: Summary, data: Summary) -> dict[str, float]:
    """Returns FID, KID and the inception score, this also of the data, which scales it.

    Raises:
      UserError: of fewer than two samples or images of data.
    """
    distance = frechet.frechet_distance(
        frechet.normal(samples.moments), frechet.normal(data.moments)
    )
    kid, kid_std = scores.kernel_distance(samples.features, data.features)
    return {
        "fid": distance,
        "kid": kid,
        "kid_std": kid_std,
        "inception_score": samples.score[0],
        "inception_score_std": samples.score[1],
        "inception_score_of_data": data.score[0],
        "num_samples": samples.moments.n,
        "num_data": data.moments.n,
    }
