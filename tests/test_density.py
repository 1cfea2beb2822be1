"""Annealed models against normalisers that are known, and the mode that anneals.

Of a sampled quantity a test asks that it be within `statistical.limit` of its standard errors,
which correct code fails with probability 1e-6: weights are nearly normal where they vary as
little as here.
"""


import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import exact
from helpers.statistical import limit

import drl_jax
from drl_jax import noise
from drl_jax.data import mixtures
from drl_jax.errors import UserError
from drl_jax.metrics import density

CORRELATED = mixtures.gaussian(
    np.linspace(-0.3, 0.4, 8), 0.02 * np.eye(8) + 0.1 * np.outer(*[np.linspace(0, 1, 8)] * 2)
)
LOG_Z = 7.3  # of all exact models here


def points(data, n, seed=0):
    return np.asarray(data.sample(noise.example_keys(jax.random.key(seed), jnp.arange(n))))


CASES = [
    (mixtures.PLANE["blobs"](), 6),
    (mixtures.PLANE["blobs"](), 1000),
    (CORRELATED, 6),
    (CORRELATED, 1000),
]


@pytest.mark.slow
@pytest.mark.parametrize(("data", "T"), CASES, ids=["blobs6", "blobs1k", "8d6", "8d1k"])
def test_the_default_budget_bounds_log_Z_within_0_05_nats(data, T):
    """Of energies that are right up to a constant. The truth lies between the bounds, as far
    as their stated errors tell.

    Fails (each tried) with gains taken after the transitions instead of before, with gains
    the wrong way round, with log Z of white noise left out, and if the transitions target the
    rung that is left instead of the one that is entered.
    """
    model = exact.model(data, T, LOG_Z)
    found = density.log_partition(model, jax.random.key(1), points(data, 256))
    for bound, way in ((found.lower, -1), (found.upper, 1)):
        assert abs(bound.log_Z - LOG_Z) < 0.05
        assert way * (bound.log_Z - LOG_Z) > -limit(2) * bound.std_error
        assert bound.effective_sample_size > 200
        assert bound.meaningful


FEW = density.DEFAULT._replace(rungs=80, transitions=1, leapfrog=1, chains=20_000, burn_in=0)


@pytest.fixture(scope="module")
def few_rungs():
    """Log-weights of both ways along a ladder so short that they vary."""
    data = mixtures.PLANE["ellipse"]()
    model = exact.model(data, 6, LOG_Z)
    key, x = jax.random.key(2), points(data, FEW.chains)
    annealing = density.begin(model, key, x, FEW)
    for later in density.annealed(model, key, annealing, FEW):
        annealing = later
    return [np.float64(d.gains).sum(axis=1) for d in (annealing.down, annealing.up)]


def test_weights_are_unbiased_and_their_logarithms_are_bounds(few_rungs):
    """E[w] = Z down and 1 / Z up, although E[log w] misses by ten standard errors and more.

    Fails (each tried) if transitions come before the gain, and if a step 10% too long is
    accepted whatever it does.
    """
    for log_w, sign in zip(few_rungs, (1, -1), strict=True):
        excess = log_w - sign * LOG_Z
        w, n = np.exp(excess), len(log_w)
        assert 0.2 < np.std(excess) < 1.5
        assert abs(np.mean(w) - 1) < limit(2) * np.std(w) / np.sqrt(n)
        assert np.mean(excess) < -10 * np.std(excess) / np.sqrt(n)


def test_the_warm_up_finds_the_steps_of_the_target_acceptance_on_every_marginal():
    model = exact.model(CORRELATED, 6)
    budget = density.DEFAULT._replace(
        chains=512, rungs=60, burn_in=0, transitions=2, warmup_steps=300
    )
    key = jax.random.key(3)
    annealing = density.begin(model, key, points(CORRELATED, 512), budget)
    for later in density.annealed(model, key, annealing, budget):
        annealing = later
    acceptance = annealing.down.acceptance
    np.testing.assert_allclose(np.mean(acceptance), budget.target_acceptance, atol=0.05)
    np.testing.assert_allclose(acceptance, budget.target_acceptance, atol=0.15)


def test_an_annealing_that_is_stopped_goes_on_to_the_same_bits():
    """Through `to_arrays` and back, in the middle of either way."""
    model = exact.model(mixtures.PLANE["ellipse"](), 6)
    budget = density.DEFAULT._replace(chains=5, rungs=130, burn_in=7, transitions=1)
    key, x = jax.random.key(4), points(mixtures.PLANE["ellipse"](), 3)
    begun = density.begin(model, key, x, budget)
    whole = list(density.annealed(model, key, begun, budget))
    made = [annealing.made for annealing in whole]
    assert made[-1] == density.moves(model.method.schedule, budget)
    assert np.all(np.diff(made) > 0)
    for stop in (0, len(whole) // 4, 3 * len(whole) // 4):
        kept = density.from_arrays(density.to_arrays(whole[stop]))
        *_, end = density.annealed(model, key, kept, budget)
        jax.tree.map(np.testing.assert_array_equal, end, whole[-1])


def test_the_density_of_points_is_that_of_their_level_0():
    data = mixtures.PLANE["ellipse"]()
    model, x = exact.model(data, 6, LOG_Z), points(data, 4000)
    log_q, log_P = density.log_likelihood(model, jax.random.key(5), x)
    assert log_P is None
    schedule = model.method.schedule
    _, covariance = mixtures.marginal(data, 0, schedule).mean_and_covariance()
    entropy = np.linalg.slogdet(2 * np.pi * np.e * np.float64(covariance))[1] / 2
    # The log-density of a Gaussian in D dimensions varies by D / 2 nats².
    assert abs(np.mean(log_q) - LOG_Z + entropy) < limit(1) / np.sqrt(len(x))


def test_the_probability_of_a_discrete_image_is_known_where_its_pixels_are_uniform():
    """Two pixels of three values each, and images a little off these values.

    Fails without the rounding, and with the volume's sign turned.
    """
    values = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), axis=-1).reshape(-1, 2)
    data = mixtures.isotropic(values.astype(float), std=1e-5)
    model = exact.model(data, 6, LOG_Z, shape=(1, 2, 1))
    x = np.clip(values + 0.1, -1, 1).reshape(-1, 1, 2, 1)
    log_q, log_P = density.log_likelihood(model, jax.random.key(6), x, values=3)
    np.testing.assert_allclose(log_P, LOG_Z - 2 * np.log(3), atol=2e-3)
    # log q_0 varies by one nat here; off the values it would be dozens lower.
    expected = LOG_Z - 2 * np.log(3) - np.log(2 * np.pi * np.e * 0.01**2)
    assert abs(np.mean(log_q) - expected) < limit(1) / np.sqrt(len(x))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.zeros((2, 8, 8, 1), np.uint8), "dtype uint8: give floating-point"),
        (np.full((2, 8, 8, 1), 255.0), r"pixels lie in \[255, 255\]"),
        (np.full((2, 8, 8, 1), np.nan), "pixels lie in"),
        (np.zeros((2, 9, 8, 1)), "2x9x8x1: give one or more of 8x8x1"),
    ],
)
def test_data_that_are_no_images_of_the_model_are_one_clear_line(x, words):
    with pytest.raises(UserError, match=f"^[^\n]*{words}[^\n]*$"):
        density.log_likelihood(drl_jax.load("digits"), jax.random.key(0), x, values=17)
