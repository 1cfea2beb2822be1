"""Bounds of log Z and log-likelihoods of models whose log Z is known.

Sampled quantities must be within `statistical.limit` standard errors of their true values,
which correct code fails with probability 1e-6: log-weights that vary as little as here are
close to normal.
"""

import math

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
from drl_jax.model import Model
from drl_jax.sampling.annealing import PASSES
from drl_jax.tasks import likelihood

CORRELATED = mixtures.gaussian(
    np.linspace(-0.3, 0.4, 8), 0.02 * np.eye(8) + 0.1 * np.outer(*[np.linspace(0, 1, 8)] * 2)
)
LOG_Z = 7.3  # of all exact models in this file


def points(data, n, seed=0):
    return np.asarray(data.sample(noise.example_keys(jax.random.key(seed), jnp.arange(n))))


def complete(model, key, x, budget):
    """Returns the completed annealing."""
    annealing = density.begin(model, key, x, budget)
    for state in density.annealed(model, key, annealing, budget):
        annealing = state
    return annealing


def test_thousands_of_log_weights_are_summed_exactly():
    """Each is about 1e4 nats, as at level 0 of T6. Fails in float32, by tenths of a nat."""
    rng = np.random.default_rng(0)
    log_weights = np.float32(1e4 * rng.standard_normal((50, 6000)))
    state = density.unmoved(np.zeros((50, 2)))._replace(log_weights=log_weights)
    expected = [math.fsum(row) for row in log_weights.tolist()]
    np.testing.assert_allclose(state.log_weight, expected, rtol=0, atol=1e-7)


def test_starting_points_are_compared_after_the_moves_on_level_0():
    """Before these moves, all chains from data start elsewhere than those from the model."""
    rng, n, burn_in = np.random.default_rng(0), 64, 3
    passes = {}
    for name in PASSES:
        moved = np.float32(rng.standard_normal((n, burn_in + 2)))
        moved[:, :burn_in] -= 100 * (name == "from_data")
        log_weights = np.float32(0.1 * rng.standard_normal((n, burn_in + 2)))
        passes[name] = density.unmoved(np.zeros((n, 2)))._replace(
            log_weights=log_weights, log_density=moved
        )
    annealing = density.Annealing(np.ones(6), np.ones(50), passes)
    assert annealing.partition(burn_in).agreement.log_density > 0.01
    assert annealing.partition(burn_in - 1).agreement.log_density < 1e-9


CASES = [
    (mixtures.PLANAR_SHAPES["blobs"](), 1000),
    (CORRELATED, 6),
]


@pytest.mark.slow
@pytest.mark.parametrize(("data", "T"), CASES, ids=["blobs1k", "8d6"])
def test_the_default_budget_bounds_log_Z_within_0_05_nats(data, T):
    """The energies are exact up to a constant, so log Z must lie between the bounds.

    Fails (each tried) if the log-weights are computed after the transitions instead of before
    or have the wrong sign, if log Z of white noise is left out, and if the transitions leave
    the previous distribution invariant instead of the next one.
    """
    model = exact.model(data, T, LOG_Z)
    found = density.log_partition(model, jax.random.key(1), points(data, 256))
    for name, sign in (("levels", -1), ("tempered", -1), ("from_data", 1), ("from_model", 1)):
        bound = getattr(found, name)
        assert abs(bound.log_Z - LOG_Z) < (0.1 if name == "tempered" else 0.05)
        assert sign * (bound.log_Z - LOG_Z) > -limit(4) * bound.std_error
        assert bound.effective_sample_size > (100 if name == "tempered" else 200)
        assert bound.reliable
    assert found.agreement.rejected == []
    assert found.detectable < 0.3


def with_hidden_mode(data, T, mode, log_mass):
    """Returns the exact model of the data, except that level 0 has a second mode.

    This is a copy of the data at `mode`, with exp(log_mass) times their probability.
    """
    model = exact.model(data, T)
    energy = model.method.energy

    def f(params, x, t):
        f_0 = energy.f(params, x, t)
        copy = energy.f(params, x - jnp.asarray(mode), t) + log_mass
        return jnp.where(t == 0, jnp.logaddexp(f_0, copy), f_0)

    method = model.method._replace(energy=energy._replace(f=f))
    return Model.create(method, {}, model.mesh)


@pytest.mark.slow
def test_a_mode_that_only_level_0_has_is_found_and_refutes_the_upper_bound():
    """It has 99% of the probability, and no chain through the levels or from data reaches it.

    log Z is log 100 = 4.605. The bounds of the chains through the levels alone agree with each
    other at log Z = 0. Fails without the tempered pass, and if it starts from white noise.
    """
    data = mixtures.gaussian(np.zeros(2), 0.09 * np.eye(2))
    model = with_hidden_mode(data, 1000, mode=[10.0, 10.0], log_mass=np.log(99))
    budget = density.DEFAULT._replace(transitions=2)
    found = density.log_partition(model, jax.random.key(9), points(data, 256), budget)
    assert abs(found.levels.log_Z) < 0.05
    assert abs(found.from_data.log_Z) < 0.05
    assert found.from_data.effective_sample_size > 200
    assert abs(found.tempered.log_Z - np.log(100)) < 0.5
    assert found.from_model.log_Z > np.log(100) - 2  # only a few chains carry its weight
    assert found.agreement.rejected == ["order", "log_density", "log_weight"]
    with pytest.raises(UserError, match=r"log Z is at least 4.* but the chains .* give less"):
        likelihood.require_usable(found, budget, D=2, T=1000)


@pytest.fixture(scope="module")
def pilot():
    """Returns a function: data -> the pilot's bounds of log Z.

    The model is a mixture of a common and a rare mode. The chains are few and short.
    """
    common = mixtures.gaussian(np.zeros(2), 0.01 * np.eye(2))
    both = mixtures.isotropic(
        np.array([[0.0, 0.0], [1.2, 1.2]]), 0.1, np.array([1 - 1e-14, 1e-14])
    )
    rare = mixtures.gaussian(np.array([1.2, 1.2]), 0.01 * np.eye(2))
    model, key = exact.model(both, 6, LOG_Z), jax.random.key(8)
    budget = density.DEFAULT._replace(distributions=100, transitions=2, burn_in=10, chains=16)

    def bounds(data):
        begun = density.begin(model, key, points(data, 16), budget)
        return density.pilot(model, key, begun, budget), budget

    return {"common": bounds(common), "rare": bounds(rare)}


@pytest.mark.slow
def test_the_pilot_accepts_data_from_where_the_probability_is(pilot):
    """Both bounds are close to log Z, which is known."""
    (lower, upper), budget = pilot["common"]
    for bound in (lower, upper):
        assert abs(bound.log_Z - LOG_Z) < 0.5
        assert bound.chains == 16
    likelihood.require_consistent(lower, upper, budget)


@pytest.mark.slow
def test_the_pilot_refuses_data_from_a_region_of_hardly_any_probability(pilot):
    """The chains from data start in a region of probability 1e-14, and miss all others.

    Fails if the pilot's upper bound has the wrong sign, or if both passes start alike.
    """
    (lower, upper), budget = pilot["rare"]
    assert abs(lower.log_Z - LOG_Z) < 0.5
    assert LOG_Z + np.log(1e-14) - 1 < upper.log_Z < LOG_Z - 15
    pattern = r"at least 7\.\d nats, but chains from data give -1\d\.\d .*burn_in \(now 10\)"
    with pytest.raises(UserError, match=f"^[^\n]*{pattern}[^\n]*$"):
        likelihood.require_consistent(lower, upper, budget)


@pytest.mark.slow
def test_weights_are_unbiased_and_their_logarithms_are_bounds():
    """E[w] is Z down and 1 / Z up, although E[log w] is off by more than ten standard errors.

    There are so few intermediate distributions that the weights vary. Fails (each tried) if
    the transitions come before the log-weight, and if steps 10% too long are always accepted.
    """
    budget = density.DEFAULT._replace(
        distributions=80, transitions=1, leapfrog=1, chains=20_000, burn_in=0
    )
    data = mixtures.PLANAR_SHAPES["ellipse"]()
    model = exact.model(data, 6, LOG_Z)
    annealing = complete(model, jax.random.key(2), points(data, budget.chains), budget)
    for name, sign in (("levels", 1), ("from_data", -1)):
        excess = annealing.passes[name].log_weight - sign * LOG_Z
        w, n = np.exp(excess), len(excess)
        assert 0.2 < np.std(excess) < 1.5
        assert abs(np.mean(w) - 1) < limit(2) * np.std(w) / np.sqrt(n)
        assert np.mean(excess) < -10 * np.std(excess) / np.sqrt(n)


@pytest.mark.slow
def test_the_warm_up_reaches_the_target_acceptance_on_every_marginal():
    model = exact.model(CORRELATED, 6)
    budget = density.DEFAULT._replace(
        chains=512, distributions=60, burn_in=0, transitions=2, warmup_steps=300
    )
    annealing = complete(model, jax.random.key(3), points(CORRELATED, 512), budget)
    acceptance = annealing.passes["levels"].acceptance
    np.testing.assert_allclose(np.mean(acceptance), budget.target_acceptance, atol=0.05)
    np.testing.assert_allclose(acceptance, budget.target_acceptance, atol=0.15)


@pytest.mark.slow
def test_an_annealing_that_is_saved_and_continued_gives_the_same_bits():
    """Saved with `to_arrays` after the first segment, and in the middle of a later pass."""
    model = exact.model(mixtures.PLANAR_SHAPES["ellipse"](), 6)
    budget = density.DEFAULT._replace(chains=5, distributions=130, burn_in=7, transitions=1)
    key, x = jax.random.key(4), points(mixtures.PLANAR_SHAPES["ellipse"](), 3)
    begun = density.begin(model, key, x, budget)
    states = list(density.annealed(model, key, begun, budget))
    moves_done = [state.moves_done for state in states]
    assert moves_done[-1] == density.moves(model.method.schedule, budget)
    assert np.all(np.diff(moves_done) > 0)
    for stop in (0, len(states) * 5 // 8):
        saved = density.from_arrays(density.to_arrays(states[stop]))
        *_, end = density.annealed(model, key, saved, budget)
        jax.tree.map(np.testing.assert_array_equal, end, states[-1])


@pytest.mark.slow
def test_the_history_of_every_pass_starts_and_ends_at_the_bounds():
    """Log Z is 0 at the Gaussian and the bound at level 0, for every pass."""
    data = mixtures.PLANAR_SHAPES["ellipse"]()
    model = exact.model(data, 6, LOG_Z)
    budget = density.DEFAULT._replace(chains=64, distributions=60, burn_in=3, transitions=1)
    annealing = complete(model, jax.random.key(7), points(data, 64), budget)
    schedule = model.method.schedule
    history = density.history(annealing, schedule, budget)
    bounds = annealing.partition(budget.burn_in)
    assert history.keys() == set(PASSES)
    for name, course in history.items():
        ends = np.asarray(schedule.sigma_bar)[[-1, 0]]
        if name == "tempered":
            ends[0] = budget.tempered_std
        np.testing.assert_allclose(course.width[[0, -1]], ends, rtol=1e-5)
        assert np.all(np.diff(course.width) < 0)
        # The burn-in adds nothing to the log-weights.
        log_Z = getattr(bounds, name).log_Z
        np.testing.assert_allclose(course.log_Z[[0, -1]], [0, log_Z], atol=1e-9)
        sizes = course.effective_sample_size
        assert np.all((sizes > 0) & (sizes <= 1 + 1e-9))
        assert len(sizes) == len(course.acceptance) == len(course.width)


@pytest.mark.slow
def test_the_log_likelihood_of_points_is_their_log_density_at_level_0():
    data = mixtures.PLANAR_SHAPES["ellipse"]()
    model, x = exact.model(data, 6, LOG_Z), points(data, 4000)
    log_q, log_P = density.log_likelihood(model, jax.random.key(5), x)
    assert log_P is None
    schedule = model.method.schedule
    _, covariance = mixtures.marginal(data, 0, schedule).mean_and_covariance()
    entropy = np.linalg.slogdet(2 * np.pi * np.e * np.float64(covariance))[1] / 2
    # The log-density of a Gaussian in D dimensions has variance D / 2.
    assert abs(np.mean(log_q) - LOG_Z + entropy) < limit(1) / np.sqrt(len(x))


def test_the_probability_of_a_discrete_image_with_uniform_pixels_is_correct():
    """Two pixels with three possible values each, in images slightly off these values.

    Fails without rounding to the values, and with the wrong sign of the log-volume.
    """
    values = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), axis=-1).reshape(-1, 2)
    data = mixtures.isotropic(values.astype(float), std=1e-5)
    model = exact.model(data, 6, LOG_Z, shape=(1, 2, 1))
    x = np.clip(values + 0.1, -1, 1).reshape(-1, 1, 2, 1)
    log_q, log_P = density.log_likelihood(model, jax.random.key(6), x, values=3)
    np.testing.assert_allclose(log_P, LOG_Z - 2 * np.log(3), atol=2e-3)
    # log q_0 has variance 1 here; without the rounding it would be dozens of nats lower.
    expected = LOG_Z - 2 * np.log(3) - np.log(2 * np.pi * np.e * 0.01**2)
    assert abs(np.mean(log_q) - expected) < limit(1) / np.sqrt(len(x))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.zeros((2, 8, 8, 1), np.uint8), "uint8"),
        (np.full((2, 8, 8, 1), 255.0), r"\[255, 255\]"),
        (np.full((2, 8, 8, 1), np.nan), "nan"),
        (np.zeros((2, 9, 8, 1)), "2x9x8x1.* nx8x8x1"),
    ],
)
def test_images_that_do_not_fit_the_model_give_an_error_of_one_line(x, words):
    with pytest.raises(UserError, match=f"^[^\n]*{words}[^\n]*$"):
        density.log_likelihood(drl_jax.load("digits_t6"), jax.random.key(0), x, values=17)
