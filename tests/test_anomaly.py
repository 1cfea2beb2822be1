"""Detectors of anomalous images and pixels, with densities that are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import exact
from helpers.statistical import RATE
from scipy import stats

from drl_jax import noise
from drl_jax.data import mixtures
from drl_jax.errors import UserError
from drl_jax.metrics import anomaly, ood

T = 6
SHAPE = 3, 4, 2
D = 24
MEAN = np.linspace(-0.5, 0.5, D)
FACTOR = np.random.default_rng(0).normal(size=(D, D)) * np.linspace(0.02, 0.15, D)
COVARIANCE = FACTOR @ FACTOR.T + 0.01 * np.eye(D)


@functools.cache
def gaussian():
    """Returns the exact model of a Gaussian with correlated pixels."""
    return exact.model(mixtures.gaussian(MEAN, COVARIANCE), T, shape=SHAPE)


def images(n, seed):
    """Draws images from the density of the model."""
    x = np.random.default_rng(seed).multivariate_normal(MEAN, COVARIANCE, size=n)
    return x.reshape(n, *SHAPE).astype(np.float32)


def fit(fitted=300, calibration=400, seed=0):
    return anomaly.fit(
        gaussian(), jax.random.key(seed), images(fitted, 2 * seed), images(calibration, 1)
    )


detector = functools.cache(fit)


def test_statistics_are_those_of_the_closed_form():
    """In float64, for x_t with the covariance V = a_bar² C + sigma_bar² I.

    The gradient is -V⁻¹ (x_t - a_bar m) / a with a = a_{t+1}, and E[x | x_t] =
    m + a_bar C V⁻¹ (x_t - a_bar m). Fails if the gradient is that of x_t and not of y, if
    channels are not combined, if all draws have the same noise, and if the top level is scaled.
    """
    x, key, schedule = images(5, 3), jax.random.key(4), gaussian().method.schedule
    meter = anomaly.Meter(gaussian(), batch_size=5)
    ((mean, variance),) = meter(key, x)
    assert meter.levels == [*range(T)]
    for t in range(T):
        a_bar, sigma_bar = float(schedule.a_bar[t]), float(schedule.sigma_bar[t])
        a = 1.0 if t == T - 1 else float(schedule.a[t + 1])
        inverse = np.linalg.inv(a_bar**2 * COVARIANCE + sigma_bar**2 * np.eye(D))
        gradients, residuals, log_p = [], [], []
        for draw in range(anomaly.DRAWS):
            level_key = jax.random.fold_in(jax.random.fold_in(key, draw), t)
            keys = noise.example_keys(level_key, jnp.arange(5))
            eps = np.float64(noise.normal(noise.fold(keys, 0), SHAPE)).reshape(5, D)
            x_t = a_bar * np.float64(x).reshape(5, D) + sigma_bar * eps
            whitened = (x_t - a_bar * MEAN) @ inverse
            log_p.append(-np.sum((x_t - a_bar * MEAN) * whitened, axis=1) / 2)
            gradients.append(-whitened / a)
            residuals.append(MEAN + a_bar * whitened @ COVARIANCE - x.reshape(5, D))
        pixels = [
            np.linalg.norm(np.reshape(v, (anomaly.DRAWS, 5, *SHAPE)), axis=-1)
            for v in (gradients, residuals)
        ]
        found = mean.log_density[:, t] - mean.log_density[0, t]  # without the constant
        wanted = np.mean(log_p, axis=0)
        np.testing.assert_allclose(found, wanted - wanted[0], rtol=1e-3, atol=1e-2)
        norms = np.linalg.norm(gradients, axis=-1)
        np.testing.assert_allclose(mean.score_norm[:, t], norms.mean(0), rtol=1e-3)
        for name, values in zip(("gradient", "residual"), pixels, strict=True):
            found = getattr(mean, name)[:, t], getattr(variance, name)[:, t]
            np.testing.assert_allclose(found[0], values.mean(0), rtol=2e-3, atol=1e-4)
            expected = values.var(0, ddof=1) / anomaly.DRAWS
            np.testing.assert_allclose(found[1], expected, rtol=1e-2, atol=1e-6)


def test_pixels_have_the_norm_over_channels_and_features_their_absolute_value():
    v = jnp.array([[3.0, -4.0], [0.0, -1.0]])
    np.testing.assert_array_equal(anomaly.over_channels(v), [[3, 4], [0, 1]])
    for axes in (1, 2, 3):
        shape = (2, *[1] * axes)
        found = anomaly.over_channels(v.reshape(*shape, 2))
        np.testing.assert_allclose(found, np.reshape([5, 1], shape), rtol=1e-6)


def test_new_inliers_are_about_standard_normal_and_z_scores_are_standardised():
    """With 300 and 400 images for the fit, and 1000 new ones.

    The standard error of a mean is at most sqrt(1/300 + 1/1000) = 0.066, and of a standard
    deviation about 0.05; the bounds are five of them. Fails if a sum is not standardised.
    """
    n, found = 1000, list(detector()(images(1000, 5)))
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)
    assert (whole.score.shape, whole.map.shape) == ((n,), (n, *SHAPE[:2]))
    for values in (whole.score, whole.map):
        assert abs(values.mean()) < 0.33
        assert abs(values.std() - 1) < 0.25
    for name, z in whole.z._asdict().items():
        assert np.abs(z.mean(axis=0)).max() < 0.4, name
        assert np.abs(z.std(axis=0) - 1).max() < 0.5, name


def test_weights_are_the_share_of_the_variance_that_is_due_to_the_image():
    """At the lowest level, nearly all of the gradient's; the residual's there is noise.

    Fails if variances over images and draws are exchanged, or draws are not averaged.
    """
    found = detector()
    for weights in found.weights.values():
        assert np.all((weights >= 0) & (weights <= 1))
    assert found.weights["log_density"][0] > 0.9
    assert found.weights["residual"][0] < 0.3
    assert found.weights["gradient"][-1] < 0.2
    x, key = images(300, 11), jax.random.key(8)
    meter = anomaly.Meter(gaussian(), batch_size=300)
    one, other = (next(meter(k, x))[0].residual[:, 2] for k in jax.random.split(key))
    centred = [v - v.mean(axis=0) for v in (one, other)]
    # The correlation of two independent measurements is the reliability.
    reliability = np.mean(centred[0] * centred[1]) / np.mean(centred[0] ** 2)
    assert abs(found.weights["residual"][2] - reliability) < 0.1


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_new_inliers_exceed_the_threshold_at_the_chosen_rate(rate):
    """The number of n new images above the k-th of m scores is beta-binomial.

    Their parameters are m + 1 - k and k. False alarms of this test: RATE. Fails if the scores
    of the first set are used, or the threshold is one of the low quantiles.
    """
    n, m = 4000, 400
    scores = detector().scores(images(n, 6))
    k = np.ceil((m + 1) * (1 - rate))
    count = np.sum(scores > detector().threshold(rate))
    low, high = stats.betabinom.ppf([RATE / 2, 1 - RATE / 2], n, m + 1 - k, k)
    assert low <= count <= high
    assert len(detector().calibration) == m


@pytest.mark.parametrize(("n", "expected"), [(19, 1 / 20), (20, 1 / 21)])
def test_a_threshold_of_few_images_holds_on_average(n, expected):
    """For a rate of 0.05, the threshold of 19 or 20 images is the largest score.

    20,000 repetitions; the standard error is at most 0.0016. Fails for the empirical quantile,
    whose rate is 2/21 for 20 images, and if the rate of 19 is said to be too low.
    """
    scores = np.sort(np.random.default_rng(0).normal(size=(20_000, n)), axis=1)
    new = np.random.default_rng(1).normal(size=20_000)
    thresholds = [anomaly.conformal_threshold(row, 0.05) for row in scores]
    assert abs(np.mean(new > thresholds) - expected) < 5 * 0.0016
    assert (
        anomaly.conformal_threshold(scores[0], 0.5) == scores[0, int(np.ceil((n + 1) / 2)) - 1]
    )


def test_a_damaged_pixel_is_found():
    """A pixel is shifted by 1.5. Fails if a sign is wrong, or the map is of another image."""
    x, place = images(200, 7), (1, 2)
    damaged = x.copy()
    damaged[:, *place] += 1.5
    found = detector()
    maps = found.maps(damaged)
    assert np.mean(maps.reshape(200, -1).argmax(axis=1) == 1 * 4 + 2) > 0.9
    assert ood.auroc(-found.scores(x), -found.scores(damaged)) > 0.95
    swapped = np.concatenate([damaged[:1], x[1:]])
    np.testing.assert_array_equal(found.maps(swapped)[:1], maps[:1])


def test_other_images_need_no_compilation_and_are_read_as_a_stream():
    """At most three batches are read before the first result. Fails without padding."""
    found, read = fit(fitted=30, calibration=47), []
    size = found._meter._engine.batch_size

    def stream():
        for i, x in enumerate(images(10 * size, 8)):
            read.append(i)
            yield x

    results = found(stream())
    next(results)
    assert len(read) <= 3 * size
    found.threshold(0.1)
    found.scores(images(3, 9))
    assert found._meter._compiled._cache_size() == 1


def test_results_do_not_depend_on_the_other_images():
    found, x = detector(), images(40, 10)
    np.testing.assert_array_equal(found.scores(x[:7]), found.scores(x)[:7])


def test_images_of_another_shape_or_of_integers_are_an_error():
    """Fails without a check: 8-bit images had scores, and others a traceback."""
    x = images(2, 3)
    for wrong, words in (
        (x[..., 0], "2x3x4: give nx3x4x2"),
        (np.uint8(x), "dtype uint8"),
        (np.where(x == x[1, 0, 0, 0], np.nan, x), "pixels that are not finite"),
    ):
        with pytest.raises(UserError, match=words):
            detector().scores(image for image in wrong)


@pytest.mark.parametrize(("fitted", "calibration"), [(19, 30), (30, 19), (0, 30), (30, 0)])
def test_too_few_images_are_an_error(fitted, calibration):
    number = min(fitted, calibration)
    with pytest.raises(
        UserError, match=rf"^a detector needs .* of 20 or more .* has {number}:"
    ):
        fit(fitted, calibration)


def test_the_threshold_of_a_rate_of_nearly_1_is_the_lowest_score():
    assert anomaly.conformal_threshold(np.arange(20.0), 1 - 1e-13) == 0


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, np.nan])
def test_rates_that_are_no_probabilities_are_an_error(rate):
    with pytest.raises(UserError, match=r"^the false-alarm rate is .*: give a number between"):
        detector().threshold(rate)


def test_a_rate_that_needs_more_images_is_an_error():
    with pytest.raises(UserError, match=r"^a false-alarm rate of 0.001 needs 999 .* are 400:"):
        detector().threshold(0.001)
