"""Statistics of sets of images in Inception features, and the metrics that compare them."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from drl_jax.metrics import frechet, scores
from drl_jax.metrics.frechet import Moments
from drl_jax.metrics.inception import FeatureFn

# KID needs the features themselves. They are stored for at most this many images, equally
# spaced in the set: 80 MB, and ten times the size of one of its subsets.
MAX_FEATURES = 10_000


class Summary(NamedTuple):
    """Statistics of a set of images in the features of the Inception network.

    Attributes:
      moments: moments of the '2048' features of all images.
      features: '2048' features of at most `MAX_FEATURES` images.
      score: inception score of all images together.
      score_of_splits: mean and standard deviation of the inception score over ten splits.
    """

    moments: Moments
    features: Float[np.ndarray, "k 2048"]
    score: float
    score_of_splits: tuple[float, float]


def summarise(
    extractor: FeatureFn, images: Iterable[UInt8[np.ndarray, "H W C"]], n: int
) -> Summary:
    """Computes the statistics of the first n images of a stream.

    Args:
      extractor: computes the features.
      images: stream of at least n images, read one batch at a time.
      n: number of images.
    """
    moments = frechet.zero_moments(2048)
    features, logits = [], []
    for batch in extractor(itertools.islice(images, n)):
        x = batch["2048"]
        indices = np.arange(moments.n, moments.n + len(x))
        # True for MAX_FEATURES equally spaced indices of n, or for all if n is smaller.
        features.append(x[indices * MAX_FEATURES % n < MAX_FEATURES])
        logits.append(batch["logits_unbiased"])
        moments = frechet.merge(moments, frechet.batch_moments(x))
    all_logits = np.concatenate(logits)
    return Summary(
        moments=moments,
        features=np.concatenate(features),
        score=scores.inception_score(all_logits, splits=1)[0],
        score_of_splits=scores.inception_score(all_logits),
    )


def compare(samples: Summary, data: Summary) -> dict[str, float]:
    """Returns FID, KID, and the inception scores of the samples and of the data.

    The inception score is given twice: of all samples together, as TF-GAN computes it, and as
    the mean of ten splits, as Salimans et al. (2016) do. The data's own inception score shows
    what value is attainable.

    Raises:
      UserError: if there are fewer than two samples or fewer than two data images.
    """
    distance = frechet.frechet_distance(
        frechet.to_normal(samples.moments), frechet.to_normal(data.moments)
    )
    kid, kid_std = scores.kernel_distance(samples.features, data.features)
    return {
        "fid": distance,
        "kid": kid,
        "kid_std": kid_std,
        "inception_score": samples.score,
        "inception_score_of_splits": samples.score_of_splits[0],
        "inception_score_of_splits_std": samples.score_of_splits[1],
        "inception_score_of_data": data.score,
        "num_samples": samples.moments.n,
        "num_data": data.moments.n,
    }
