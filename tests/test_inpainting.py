import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from helpers.statistical import assert_mean, assert_variance

from drl_jax import diffusion, noise
from drl_jax.data import pipeline, sources
from drl_jax.errors import UserError
from drl_jax.mcmc import hmc, langevin, mala, normal_approximation
from drl_jax.sampling import inpainting, masks
from drl_jax.sampling.ladder import Conditionals, Sampler
from drl_jax.storage import runs

T = 6
SCHEDULE = diffusion.schedule(T)
A, SIGMA = np.float64(SCHEDULE.a), np.float64(SCHEDULE.sigma)
A_BAR, SIGMA_BAR = np.float64(SCHEDULE.a_bar), np.float64(SCHEDULE.sigma_bar)
MEAN, VARIANCE, RHO = 0.2, 0.25, 0.8  # of the data: two pixels and their correlation
COVARIANCE = VARIANCE * np.array([[1, RHO], [RHO, 1]])
KNOWN = jnp.array([True, False])
X = 0.8  # what is known


def level(t):
    """Covariance of x_t."""
    return A_BAR[t] ** 2 * COVARIANCE + SIGMA_BAR[t] ** 2 * np.eye(2)


PRECISION = jnp.stack(
    [
        jnp.asarray(np.linalg.inv(level(t)) / float(SCHEDULE.a_y(jnp.array(t))) ** 2)
        for t in range(T)
    ]
).astype(jnp.float32)


def F(y, t):
    """The log-density of y_t for data N(MEAN, COVARIANCE)."""
    mean = SCHEDULE.a_y(t) * SCHEDULE.a_bar[t] * MEAN
    r = y - noise.per_example(mean, y)
    return -jnp.einsum("bi,bij,bj->b", r, PRECISION[t], r) / 2


def spread_of_conditional():
    """Of each level: standard deviation of y_t's hidden pixel, given all that it is given."""
    pull = np.append(1 / SIGMA[1:T] ** 2, 0.0)
    return 1 / np.sqrt(np.float64(PRECISION[:, 1, 1]) + pull)


# Leaves the conditionals invariant exactly, and at this step goes through them in one
# trajectory: 5 steps of 0.3 are a quarter turn.
HMC = Sampler(
    hmc.init,
    hmc.kernel,
    {
        "step_size": jnp.asarray(0.3 * spread_of_conditional(), jnp.float32),
        "leapfrog": jnp.full(T, 5),
    },
    K=4,
)


@functools.cache
def inpainted(n, rounds, known_value=X):
    keys = noise.example_keys(jax.random.key(0), jnp.arange(n))
    x = jnp.broadcast_to(jnp.array([known_value, jnp.nan]), (n, 2))
    x = x.at[:, 1].set(-0.9)  # not the truth: it must not matter
    return np.asarray(_inpaint(keys, x, KNOWN, rounds))


@jax.jit
def _inpaint(keys, x, known, rounds):
    return inpainting.inpaint(keys, Conditionals(F, SCHEDULE, HMC), x, known, rounds)


def exact_moments(rounds):
    """Mean and variance of the hidden pixel after rounds of exact draws at every level.

    Each draw is affine in (known, hidden) of x_{t+1}, so their distribution stays normal.
    """
    centre = X - MEAN
    mean, cov = np.array([A_BAR[T] * centre, 0]), np.diag([SIGMA_BAR[T] ** 2, 1.0])
    mean[1] = -A_BAR[T] * MEAN  # x_T of the hidden pixel has mean 0
    for t in reversed(range(T)):
        # The bridge of the known pixel, k = w k_{t+1} + c x + sqrt(v) eps
        w = A[t + 1] * SIGMA_BAR[t] ** 2 / SIGMA_BAR[t + 1] ** 2
        c = A_BAR[t] * SIGMA[t + 1] ** 2 / SIGMA_BAR[t + 1] ** 2
        v = (SIGMA[t + 1] * SIGMA_BAR[t] / SIGMA_BAR[t + 1]) ** 2
        # The hidden one, u = of_k k + of_u u_{t+1} + sqrt(rest) eps: prior given k, and what
        # u_{t+1} says of it, but for the top level.
        S = level(t)
        slope, prior = S[0, 1] / S[0, 0], S[1, 1] - S[0, 1] ** 2 / S[0, 0]
        pull = 0.0 if t == T - 1 else (A[t + 1] / SIGMA[t + 1]) ** 2
        rest = 1 / (1 / prior + pull)
        of_k, of_u = rest / prior * slope, rest * pull / A[t + 1]
        draw = np.array([[w, 0], [of_k * w, of_u]])
        for i in range(rounds):
            if i:  # noise again
                mean = A[t + 1] * mean
                cov = A[t + 1] ** 2 * cov + SIGMA[t + 1] ** 2 * np.eye(2)
            mean = draw @ mean + c * centre * np.array([1, of_k])
            cov = draw @ cov @ draw.T + v * np.outer([1, of_k], [1, of_k])
            cov += np.diag([0, rest])
    return A_BAR[0] * MEAN + mean[1], cov[1, 1]


def true_moments():
    """Mean and variance of the hidden pixel with noise sigma_0, given the known one."""
    mean = A_BAR[0] * (MEAN + RHO * (X - MEAN))
    return mean, A_BAR[0] ** 2 * VARIANCE * (1 - RHO**2) + SIGMA_BAR[0] ** 2


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_hidden_pixel_of_two_has_the_exact_moments_of_the_method(rounds):
    x = inpainted(20_000, rounds)
    mean, variance = exact_moments(rounds)
    assert_mean(x[:, 1], mean, variance, of=2)
    assert_variance(x[:, 1], mean, variance, of=2)


def test_rounds_lead_to_the_true_conditional():
    """One round does not: with it the mean leans to what nothing known would give."""
    mean, variance = true_moments()
    x = inpainted(20_000, 20)[:, 1]
    assert_mean(x, mean, variance, of=2)
    assert_variance(x, mean, variance, of=2)
    one = inpainted(20_000, 1)[:, 1]
    assert 0.75 < (one.mean() - MEAN) / (mean - MEAN) < 0.82
    assert one.var() > 1.1 * variance


def test_what_is_known_moves_what_is_not_and_nothing_else_does():
    x = inpainted(2000, 3)
    other = inpainted(2000, 3, known_value=-X)
    assert x[:, 1].mean() - other[:, 1].mean() > 0.8 * RHO * 2 * X
    keys = noise.example_keys(jax.random.key(0), jnp.arange(2000))
    for hidden in (-5.0, 5.0):  # no leak of the truth
        again = _inpaint(keys, jnp.broadcast_to(jnp.array([X, hidden]), (2000, 2)), KNOWN, 3)
        np.testing.assert_array_equal(again[:, 1], x[:, 1])


def test_a_sample_depends_on_its_own_key_and_image_alone():
    keys = noise.example_keys(jax.random.key(0), jnp.arange(2000))[5:8]
    few = _inpaint(keys, jnp.full((3, 2), X), KNOWN, 3)
    np.testing.assert_allclose(few, inpainted(2000, 3)[5:8], rtol=1e-4, atol=1e-5)


ONE_STEP = {"step_size": jnp.asarray(spread_of_conditional(), jnp.float32)}
SIGMAS = {"step_size": SCHEDULE.sigma[1:]}
SAMPLERS = {
    "langevin": Sampler(langevin.init, langevin.kernel, ONE_STEP, 4),
    "mala": Sampler(mala.init, mala.kernel, ONE_STEP, 4),
    "hmc": HMC,
    "normal_approximation": Sampler(
        normal_approximation.init, normal_approximation.kernel, SIGMAS, 1
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_known_pixels_are_kept_to_the_bit_by_every_sampler(name):
    keys = noise.example_keys(jax.random.key(0), jnp.arange(500))
    x = jax.random.uniform(jax.random.key(1), (500, 2), minval=-1, maxval=1)
    known = jax.random.bernoulli(jax.random.key(2), 0.5, (500, 2))
    result = jax.jit(
        lambda x: inpainting.inpaint(
            keys, Conditionals(F, SCHEDULE, SAMPLERS[name]), x, known, rounds=2
        )
    )(x)
    np.testing.assert_array_equal(result == x, known)
    assert np.all(np.isfinite(result))
    # The hidden pixel of those with one known follows it.
    one = known[:, 0] & ~known[:, 1]
    assert np.corrcoef(x[one, 0], result[one, 1])[0, 1] > 0.3


def test_distances_of_draws_of_one_distribution_are_equal():
    rng = np.random.default_rng(0)
    known = masks.named("left", 4, jax.random.key(0))
    centre = rng.normal(size=(500, 1, 4, 4, 3))
    completions = centre + 0.5 * rng.normal(size=(500, 6, 4, 4, 3))
    truth = (centre + 0.5 * rng.normal(size=centre.shape))[:, 0]
    completions[..., 2:, :] = truth[:, None, :, 2:]  # what is known does not count
    samples = rng.normal(size=completions.shape) * np.sqrt(1.25)
    errors = inpainting.errors(completions, samples, truth, known)
    assert errors["completion_to_truth"] == pytest.approx(2 * 0.25, rel=0.05)
    assert errors["between_completions"] == pytest.approx(2 * 0.25, rel=0.05)
    assert errors["sample_to_truth"] == pytest.approx(2 * 1.25, rel=0.05)


@pytest.fixture(scope="module")
def run():
    return runs.load(tiny.trained())


def test_a_trained_model_keeps_what_is_known_and_completes_it_in_many_ways(run):
    source = sources.open_source(run.config)
    x = np.stack(list(pipeline.all_examples(run.config, source, limit=5)))
    known = masks.named("centre", 8, jax.random.key(0))
    completed = run.model.inpaint(jax.random.key(0), x, known, completions=3, rounds=2)
    assert completed.shape == (5, 3, 8, 8, 1)
    kept = np.broadcast_to(known, completed.shape)
    np.testing.assert_array_equal(completed[kept], np.repeat(x, 3, 0).reshape(kept.shape)[kept])
    hidden = completed[:, :, ~known[..., 0]]
    assert hidden.std(axis=1).min() > 1e-3
    spoilt = np.where(known, x, 0.5)
    program = run.model.programs.inpaint._cache_size()
    again = run.model.inpaint(jax.random.key(0), spoilt, known, completions=3, rounds=2)
    np.testing.assert_array_equal(again, completed)
    run.model.inpaint(jax.random.key(0), x, ~known, completions=3, rounds=3)
    assert run.model.programs.inpaint._cache_size() == program  # mask and rounds are data


@pytest.mark.parametrize(
    ("x", "known", "rounds", "words"),
    [
        (np.zeros((1, 8, 9, 1)), np.eye(8, dtype=bool)[..., None], 1, "1x8x9x1"),
        (np.full((1, 8, 8, 1), 1.5), np.eye(8, dtype=bool)[..., None], 1, r"in \[1.5, 1.5\]"),
        (np.zeros((1, 8, 8, 1)), np.eye(7, dtype=bool)[..., None], 1, "7x7x1"),
        (np.zeros((1, 8, 8, 1)), np.eye(8, dtype=bool)[..., None], 0, "rounds is 0"),
    ],
)
def test_what_cannot_be_completed_is_refused(run, x, known, rounds, words):
    with pytest.raises(UserError, match=words):
        run.model.inpaint(jax.random.key(0), x, known, rounds=rounds)
