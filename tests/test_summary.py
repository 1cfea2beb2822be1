import numpy as np
import pytest
from helpers.random_inception import vectors

from drl_jax.errors import UserError
from drl_jax.metrics import frechet, scores, summary
from drl_jax.metrics.summary import Summary


def random_images(n):
    return np.random.default_rng(0).integers(0, 256, (n, 2, 2, 3), np.uint8)


def test_a_summary_contains_the_moments_score_and_features_of_all_images():
    images = random_images(25)
    found = summary.summarise(vectors, iter(images), 25)
    pixels = images[:, 0, 0]
    assert found.moments.n == 25
    np.testing.assert_allclose(found.moments.mean[:3], pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(
        frechet.covariance(found.moments)[:3, :3], np.cov(pixels, rowvar=False), rtol=1e-10
    )
    np.testing.assert_array_equal(found.features[:, :3], pixels)
    logits = np.float32(pixels)
    assert found.score == pytest.approx(scores.inception_score(logits, splits=1)[0], rel=1e-6)
    assert found.score_of_splits == pytest.approx(scores.inception_score(logits), rel=1e-6)


def test_a_summary_reads_n_images_and_leaves_the_rest_of_the_stream():
    images = iter(random_images(10))
    assert summary.summarise(vectors, images, 7).moments.n == 7
    assert len(list(images)) == 3


@pytest.mark.parametrize(("n", "stored"), [(7, 7), (8, 8), (9, 8), (29, 8), (80, 8)])
def test_stored_features_are_equally_spaced(monkeypatch, n, stored):
    monkeypatch.setattr(summary, "MAX_FEATURES", 8)
    images = [np.full((1, 1, 3), i, np.uint8) for i in range(n)]
    indices = summary.summarise(vectors, images, n).features[:, 0]
    assert len(indices) == stored
    assert indices[0] == 0
    assert set(np.diff(indices)) <= {n // stored, -(-n // stored)}


def summary_of(x, score):
    return Summary(frechet.batch_moments(x), x, score, (score - 1, 0.1))


def test_sets_are_compared_by_the_distances_between_their_features():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 4)), rng.normal(size=(40, 4)) + 1
    found = summary.compare(summary_of(a, 5.0), summary_of(b, 9.0))
    expected = frechet.frechet_distance(frechet.fit(a), frechet.fit(b))
    assert found["fid"] == pytest.approx(expected, rel=1e-9)
    assert (found["kid"], found["kid_std"]) == scores.kernel_distance(a, b)
    assert (found["inception_score"], found["inception_score_of_data"]) == (5.0, 9.0)
    assert found["inception_score_of_splits"] == 4.0
    assert found["inception_score_of_splits_std"] == 0.1
    assert (found["num_samples"], found["num_data"]) == (50, 40)


def test_a_single_sample_is_rejected():
    x = np.zeros((5, 3))
    with pytest.raises(UserError, match="number of images is 1"):
        summary.compare(summary_of(x[:1], 1.0), summary_of(x, 1.0))
