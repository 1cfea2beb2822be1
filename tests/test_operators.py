"""Operators against their formulas in NumPy, and the likelihood of an observation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, stats

from drl_jax import operators
from drl_jax.errors import UserError

X = np.random.default_rng(0).uniform(-1, 1, (2, 6, 8, 3)).astype(np.float32)
KNOWN = np.indices((6, 8)).sum(0)[..., None] % 3 > 0


def parse(text, shape=X.shape[1:], known=KNOWN):
    return operators.parse(text, shape, lambda name: known)


def test_hidden_pixels_are_zero():
    np.testing.assert_array_equal(parse("mask:a")[0](X), np.where(KNOWN, X, 0))


def test_downsampling_averages_blocks():
    wanted = np.stack(
        [X[:, i : i + 2, j : j + 2].mean((1, 2)) for i in (0, 2, 4) for j in (0, 2, 4, 6)], 1
    )
    found = parse("downsample:2")[0](X)
    np.testing.assert_allclose(found, wanted.reshape(2, 3, 4, 3), atol=1e-6)


def test_blurring_averages_pixels_inside_of_the_image():
    rows, columns = np.indices((6, 8))
    wanted = np.zeros_like(X)
    for i in range(6):
        for j in range(8):
            w = np.exp(-((rows - i) ** 2 + (columns - j) ** 2) / (2 * 1.5**2))
            wanted[:, i, j] = np.einsum("hw,nhwc->nc", w / w.sum(), X)
    np.testing.assert_allclose(parse("blur:1.5")[0](X), wanted, atol=1e-6)


def test_grey_is_luma_or_the_mean_of_the_channels():
    luma = X @ np.array([0.299, 0.587, 0.114], np.float32)
    np.testing.assert_allclose(parse("grayscale")[0](X)[..., 0], luma, atol=1e-6)
    two = X[..., :2]
    found = parse("grayscale", (6, 8, 2))[0](two)
    np.testing.assert_allclose(found[..., 0], two.mean(-1), atol=1e-6)


SIGNALS = np.random.default_rng(2).normal(size=(2, 60, 3)).astype(np.float32)
VOLUMES = np.random.default_rng(3).normal(size=(1, 24, 24, 24, 2)).astype(np.float32)


def test_steps_and_voxels_are_averaged_in_blocks():
    found = parse("downsample:4,noise:1", SIGNALS.shape[1:])[0](SIGNALS)
    wanted = [SIGNALS[:, i : i + 4].mean(axis=1) for i in range(0, 60, 4)]
    np.testing.assert_allclose(found, np.stack(wanted, axis=1), atol=1e-6)
    found = parse("downsample:12,noise:1", VOLUMES.shape[1:])[0](VOLUMES)
    assert found.shape == (1, 2, 2, 2, 2)
    wanted = VOLUMES[:, :12, 12:, :12].mean(axis=(1, 2, 3))
    np.testing.assert_allclose(found[:, 0, 1, 0], wanted, atol=1e-6)


@pytest.mark.parametrize("x", [SIGNALS, VOLUMES])
def test_blurring_is_a_gaussian_filter_along_each_axis_but_that_of_the_channels(x):
    """Compared away from the edges, where SciPy repeats the values inside."""
    wanted = np.float64(x)
    for axis in range(1, x.ndim - 1):
        wanted = ndimage.gaussian_filter1d(wanted, 1.3, axis, truncate=7)
    found = np.asarray(parse("blur:1.3,noise:1", x.shape[1:])[0](x))
    inside = (slice(None), *[slice(10, -10)] * (x.ndim - 2))
    np.testing.assert_allclose(found[inside], wanted[inside], atol=1e-5)
    constant = parse("blur:1.3,noise:1", x.shape[1:])[0](np.ones_like(x))
    np.testing.assert_allclose(constant, 1, atol=1e-5)  # also at the edges


@pytest.mark.parametrize("x", [SIGNALS[:, :, 0], SIGNALS, VOLUMES])
def test_hidden_features_steps_and_voxels_are_zero_and_channels_are_averaged(x):
    shape = x.shape[1:] if x.ndim == 2 else (*x.shape[1:-1], 1)
    known = np.random.default_rng(4).random(shape) < 0.5
    operator, std = parse("mask:a,noise:0.2", x.shape[1:], known)
    np.testing.assert_array_equal(operator(x), np.where(known, x, 0))
    assert std == 0.2
    if x.ndim > 2:
        grey = parse("grayscale,noise:1", x.shape[1:])[0](x)
        np.testing.assert_allclose(grey[..., 0], x.mean(-1), atol=1e-6)  # no weights of luma


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        ("blur:1,noise:1", (6,), "'blur:1': vectors have no axes; use mask:NAME"),
        ("downsample:2,noise:1", (6,), "'downsample:2': vectors have no axes"),
        ("grayscale,noise:1", (6,), "'grayscale': vectors have no axes"),
        ("mask:a", (6,), "'mask:a': add noise:S"),
        ("blur:1", (6, 2), "'blur:1': add noise:S, its standard deviation in the units"),
        ("blur:1", (6, 6, 6, 1), "'blur:1': add noise:S"),
        ("downsample:4,noise:1", (6, 2), "an example of 6 does not divide into blocks of 4"),
        ("downsample:4,noise:1", (6, 6, 6, 1), "of 6x6x6 does not divide .* 4x4x4"),
        ("downsample:2,mask:a,noise:1", (6, 2), "the mask is 6, the example 3"),
        ("mask:a,noise:1", (7,), "the mask is 6, the example 7"),
    ],
)
def test_operators_that_do_not_suit_the_kind_of_example_are_refused(text, shape, message):
    known = np.ones((6,) if len(shape) == 1 else (6, 1), bool)
    with pytest.raises(UserError, match=message):
        parse(text, shape, known)


def test_parts_act_from_left_to_right():
    operator, std = parse("mask:a,downsample:2,grayscale,noise:0.3")
    by_hand = operators.downsample(2)(operators.mask(KNOWN)(X))
    np.testing.assert_allclose(operator(X), operators.grayscale()(by_hand), atol=1e-6)
    assert std == 0.3
    assert parse("downsample:2,blur:1")[0](X).shape == (2, 3, 4, 3)
    assert parse("blur:1")[1] == operators.NOISE


def test_the_likelihood_is_that_of_normal_noise_at_known_pixels():
    operator = operators.mask(KNOWN)
    observed = np.random.default_rng(1).normal(size=X.shape[1:]).astype(np.float32)
    found = operators.likelihood(operator, observed, 0.3)(jnp.asarray(X))
    log_p = stats.norm.logpdf(observed, X, 0.3)
    known = np.broadcast_to(KNOWN, X.shape[1:])
    np.testing.assert_allclose(found, log_p[:, known].sum(-1), rtol=1e-5)
    changed = np.where(KNOWN, observed, 7.0)
    np.testing.assert_array_equal(
        operators.likelihood(operator, changed, 0.3)(jnp.asarray(X)), found
    )


@pytest.mark.parametrize("shape", [(3, 4, 1), (1, 1, 3), (6, 8, 3)])
def test_an_observation_of_another_shape_is_an_error(shape):
    likelihood = operators.likelihood(operators.downsample(2), jnp.zeros(shape), 0.3)
    with pytest.raises(UserError, match=r"shape \(\d, \d, \d\): this .* gives \(3, 4, 3\)"):
        likelihood(jnp.asarray(X))


def test_observations_have_noise_at_known_pixels_only():
    """With 128,000 numbers, a standard deviation is within 2% but once in 10^20 runs."""
    x = jnp.zeros((1000, 8, 16, 1))
    known = np.indices((8, 16)).sum(0)[..., None] % 2 > 0
    keys = jax.random.split(jax.random.key(0), 1000)
    observed = operators.observe(operators.mask(known), x, 0.4, keys)
    assert np.all(np.asarray(observed)[:, ~known[..., 0]] == 0)
    assert np.std(np.asarray(observed)[:, known[..., 0]]) == pytest.approx(0.4, rel=0.02)


def test_likelihoods_of_one_kind_share_a_program():
    compiled = jax.jit(lambda likelihood, x: likelihood(x))
    for seed, (std, width, factor) in enumerate([(0.1, 1.0, 2), (0.2, 2.0, 2)]):
        parts = operators.mask(KNOWN if seed else ~KNOWN), operators.blur(width)
        operator = operators.composition([*parts, operators.downsample(factor)])
        observed = np.full((3, 4, 3), seed, np.float32)
        compiled(operators.likelihood(operator, observed, std), X)
    assert compiled._cache_size() == 1


@pytest.mark.parametrize("text", ["blur:1e-6,noise:1e-6", "blur:1e6,noise:1e6"])
def test_the_smallest_and_the_largest_numbers_give_finite_likelihoods(text):
    """Fails at 1e-50."""
    operator, std = parse(text)
    log_likelihood = operators.likelihood(operator, jnp.zeros(X.shape[1:]), std)
    assert np.all(np.isfinite(log_likelihood(jnp.asarray(X))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "operator '' is unknown: use some of mask:NAME, downsample:N, blur:S"),
        ("sharpen", "operator 'sharpen' is unknown"),
        ("mask:", "operator 'mask:' is unknown"),
        ("grayscale:2", "operator 'grayscale:2' is unknown"),
        ("noise:0", "'noise:0': give a number from 1e-06 to 1e"),
        ("noise:-0.1", "'noise:-0.1': give a number from"),
        ("noise:1e-7", "'noise:1e-7': give a number from"),
        ("blur:nan", "'blur:nan': give a number from"),
        ("blur:inf", "'blur:inf': give a number from"),
        ("blur", "'blur': give a number from .*, as in blur:2"),
        ("downsample:-2", "'downsample:-2': give a whole number above 0, as in"),
        ("downsample:1.5", "'downsample:1.5': give a whole number above 0, as in downsample:2"),
        ("downsample:4", "6x8 does not divide into blocks of 4x4"),
        ("noise:0.1,blur:1", "noise must be the last part"),
        ("downsample:2,mask:a", "the mask is 6x8, the example 3x4"),
    ],
)
def test_bad_operators_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse(text)
