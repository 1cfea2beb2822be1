"""Models of standardised data, whose densities in the units of the data have closed forms."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import exact, tiny
from helpers.examples import one_line
from helpers.statistical import assert_mean, assert_variance
from jax.tree_util import Partial
from scipy import stats

import drl_jax
from drl_jax import standardisation
from drl_jax.data import mixtures
from drl_jax.errors import UserError
from drl_jax.metrics import anomaly, density, levels, ood
from drl_jax.model import Model
from drl_jax.standardisation import Standardisation, with_standardisation
from drl_jax.storage import exported

MEAN, STD = np.float32([100.0, -3.0]), np.float32([20.0, 0.1])
CORRELATION = 0.8
COVARIANCE = np.array([[1, CORRELATION], [CORRELATION, 1]]) * STD[:, None] * STD
T, N = 100, 4000
KEY = jax.random.key(0)


@functools.cache
def model():
    """The exact model of correlated Gaussian data with the mean MEAN and the deviations STD."""
    data = mixtures.gaussian(np.zeros(2), np.array([[1, CORRELATION], [CORRELATION, 1]]))
    plain = exact.model(data, T)
    params = with_standardisation(plain.params, Standardisation(MEAN, STD))
    plain = plain.with_sampler("mala", K=5)
    return plain.with_params(params)


def level_0():
    """Returns the covariance of level 0 in the units of the data."""
    noise = float(model().method.schedule.sigma_bar[0]) ** 2
    a = float(model().method.schedule.a_bar[0]) ** 2
    return a * COVARIANCE + noise * np.diag(STD**2)


def data(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.multivariate_normal(MEAN, COVARIANCE, n).astype(np.float32)


# The map


def test_a_fit_is_that_of_all_examples_also_with_a_large_mean():
    """Fails if squares are summed without shifting, or a batch is weighted by its number."""
    x = 1e6 + np.random.default_rng(0).normal(size=(1000, 7, 3)) * [0.01, 1, 100]
    found = standardisation.fit(np.split(x, [10, 500]))
    rows = x.reshape(-1, 3)
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-7)
    np.testing.assert_allclose(found.std, rows.std(axis=0), rtol=1e-6)
    assert found.mean.dtype == found.std.dtype == np.float32


def test_the_map_is_inverted_and_its_volume_is_that_of_an_example():
    z = np.random.default_rng(0).normal(size=(5, 7, 2))
    there = Standardisation(MEAN, STD)
    np.testing.assert_allclose(there.apply(there.invert(z)), z, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(there.invert(z)[2, 3], MEAN + STD * z[2, 3])
    assert there.log_volume((7, 2)) == pytest.approx(7 * np.log(STD).sum(), rel=1e-6)
    assert standardisation.IDENTITY.invert(z) is z
    assert standardisation.IDENTITY.log_volume((7, 2)) == 0


def test_a_constant_feature_is_one_line():
    with pytest.raises(UserError) as error:
        standardisation.fit([np.array([[1.0, 2.0], [3.0, 2.0]])])
    assert "feature 1 of the training examples is constant (2)" in one_line(error)


# The model


def test_samples_have_the_moments_of_the_data():
    x = model().sample(KEY, N)
    C = level_0()
    assert_mean(x, MEAN, np.diag(C), of=2)
    assert_variance(x, MEAN, np.diag(C), of=2)
    assert np.corrcoef(x.T)[0, 1] == pytest.approx(
        C[0, 1] / math.sqrt(C[0, 0] * C[1, 1]), abs=0.04
    )


def test_log_densities_differ_as_those_of_the_data_do():
    x = data(50)
    schedule = model().method.schedule
    a = float(schedule.y_scale(jnp.int32(0)))
    y = MEAN + a * (
        x - MEAN
    )  # the variable of the energy, y = a x_0 in the units of the levels
    expected = stats.multivariate_normal(MEAN, level_0()).logpdf(x)
    for found in (
        model().log_density(y, np.zeros(50, int)),
        jax.vmap(model().log_density_fn(0))(x),
        jax.jit(model().log_density)(y, np.zeros(50, int)),
    ):
        difference = np.asarray(found, np.float64) - expected
        np.testing.assert_allclose(difference, difference.mean(), atol=2e-3)


def test_the_log_likelihood_is_in_the_units_of_the_data():
    """Fails without the volume, with its sign flipped, and if x is not standardised.

    The model is normalised, log Z = 0, except for the factor a of y, which log p contains.
    """
    x = data(N)
    log_q, log_P = density.log_likelihood(model(), KEY, x)
    assert log_P is None
    C = level_0()
    schedule = model().method.schedule
    entropy = stats.multivariate_normal(np.zeros(2), C).entropy()
    volume = 2 * math.log(float(schedule.y_scale(jnp.int32(0))))
    mean = float(np.mean(log_q)) + volume
    assert mean == pytest.approx(-entropy, abs=6 * 1.0 / math.sqrt(N))  # log p has variance 1


def test_completions_keep_the_known_values_exactly_and_have_the_conditional_moments():
    x = np.repeat(data(1), N // 4, axis=0)
    completed = model().inpaint(KEY, x, np.array([True, False]), completions=1, rounds=20)[:, 0]
    np.testing.assert_array_equal(completed[:, 0], x[:, 0])
    C = level_0()
    mean = MEAN[1] + C[1, 0] / C[0, 0] * (x[0, 0] - MEAN[0])
    variance = C[1, 1] - C[1, 0] ** 2 / C[0, 0]
    assert_variance(completed[:, 1], mean, variance * 1.02, of=1)


def test_the_posterior_has_the_moments_of_the_closed_form():
    """Fails if the likelihood gets standardised examples, or samples are standardised."""
    observed, std = 118.0, 10.0

    def log_likelihood(observed, x):
        return -jnp.square((observed - x[:, 0]) / std) / 2

    likelihood = Partial(log_likelihood, jnp.float32(observed))
    x = model().posterior(KEY, likelihood, 512, particles=4096, width=0.5)
    C = level_0()
    gain = C[:, 0] / (C[0, 0] + std**2)
    mean = MEAN + gain * (observed - MEAN[0])
    variance = np.diag(C) - gain * C[0]
    assert_mean(x, mean, variance, of=1)


def test_interpolations_end_near_the_given_examples_and_paths_are_in_the_units_of_the_data():
    first, last = data(3), data(3, seed=1)
    strips = model().interpolate_images(KEY, first, last, frames=5, level=1)
    assert strips.shape == (3, 5, 2)
    noise = np.sqrt(np.diag(level_0())) * 6 * 0.05
    assert np.all(np.abs(strips[:, 0] - first) < 1 * STD + noise)
    assert np.all(np.abs(strips[:, -1] - last) < 1 * STD + noise)
    assert np.all(np.abs(model().interpolate(KEY, 2, 3) - MEAN) < 6 * STD)


def test_combinations_keep_the_standardisation_and_refuse_another_one():
    total = 0.5 * model() + 0.5 * model()
    x = data(5)
    np.testing.assert_allclose(
        total.log_density(x, np.zeros(5, int)),
        model().log_density(x, np.zeros(5, int)),
        rtol=1e-4,
    )
    other = model().with_params(
        with_standardisation(model().params, Standardisation(MEAN, 2 * STD))
    )
    with pytest.raises(UserError) as error:
        Model.product([model(), other])
    assert "different standardisations" in one_line(error)


def test_scores_at_data_are_those_of_the_plain_model_at_standardised_data():
    """Fails if one of the programs gets data that are not standardised, or twice."""
    z = np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)
    x = MEAN + STD * z
    plain = model().with_params({})
    for found, expected in zip(
        ood.Scorer(model())(KEY, x), ood.Scorer(plain)(KEY, z), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    found, expected = (
        next(anomaly.Meter(m, 16)(KEY, examples)) for m, examples in ((model(), x), (plain, z))
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3)
    found, expected = (
        levels.level_statistics(m, KEY, examples) for m, examples in ((model(), x), (plain, z))
    )
    for name in ("f_data", "displacement", "acceptance"):
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.full((2, 2), np.nan, np.float32), ["example 0", "not finite"]),
        (np.zeros((2, 2), int), ["int64"]),
        (np.zeros((2, 3), np.float32), ["2x3", "nx2"]),
    ],
)
def test_examples_that_do_not_fit_are_one_line(x, words):
    with pytest.raises(UserError) as error:
        model().inpaint(KEY, x, np.array([True, False]))
    message = one_line(error)
    assert all(word in message for word in words)


# Whole runs


def test_a_run_standardises_by_its_training_examples_and_keeps_the_numbers(tmp_path):
    """Fails if the numbers are averaged, trained, fitted to test data, or rounded on export."""
    x = np.concatenate([data(200), 1e3 + data(50)])
    np.savez(tmp_path / "a.npz", x=x[:200], x_test=x[200:])
    workdir = tmp_path / "run"
    changes = {
        "data.name": f"npz:{tmp_path / 'a.npz'}",
        "data.channels": 2,
        "data.flip": False,
        "data.standardise": True,
        "energy.network": "mlp",
        "energy.ch": 8,
        "energy.N": 1,
        "energy.parameterisation": "unit",
        "train.batch_size": 16,
        "train.num_steps": 60,
        "mcmc.K": 2,
        "evaluation.num_samples": 50,
    }
    flags = [f"--config.{field}={value}" for field, value in changes.items()]
    assert tiny.main(f"--config={tiny.DIGITS}", f"--workdir={workdir}", *flags) == 0
    loaded = drl_jax.load(workdir)
    expected = standardisation.fit([x[:200]])
    for found, value in zip(loaded.standardisation, expected, strict=True):
        np.testing.assert_array_equal(found, value)
    samples = loaded.sample(KEY, 200)
    assert np.all(np.abs(samples.mean(axis=0) - MEAN) < STD)
    error = json.loads((workdir / "metrics.json").read_text())["error_of_mean"]
    assert error[0] < -900 / (1.5 * STD[0])  # the samples are compared with the test data
    assert tiny.main("--mode=export", f"--workdir={workdir}", "--dtype=float16") == 0
    (file,) = workdir.glob("*.npz")
    np.testing.assert_array_equal(
        exported.read(drl_jax.storage.runs.epath.Path(file)).params["standardisation"]["mean"],
        expected.mean,
    )
