import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from helpers.statistical import assert_mean, assert_variance

from drl_jax import diffusion, noise
from drl_jax.data import pipeline, sources
from drl_jax.errors import UserError
from drl_jax.mcmc import hmc, langevin, mala
from drl_jax.sampling import inpainting, ladder, masks
from drl_jax.sampling.ladder import Conditionals, Sampler
from drl_jax.storage import runs

T = 6
SCHEDULE = diffusion.schedule(T)
A, SIGMA = np.float64(SCHEDULE.a), np.float64(SCHEDULE.sigma)
A_BAR, SIGMA_BAR = np.float64(SCHEDULE.a_bar), np.float64(SCHEDULE.sigma_bar)
# The data: two pixels with equal means and variances, and their correlation.
MEAN, VARIANCE, RHO = 0.2, 0.25, 0.8
COVARIANCE = VARIANCE * np.array([[1, RHO], [RHO, 1]])
KNOWN = jnp.array([True, False])
X = 0.8  # value of the known pixel


def covariance(t):
    """Returns the covariance of x_t."""
    return A_BAR[t] ** 2 * COVARIANCE + SIGMA_BAR[t] ** 2 * np.eye(2)


PRECISION = jnp.stack(
    [
        jnp.asarray(np.linalg.inv(covariance(t)) / float(SCHEDULE.y_scale(jnp.array(t))) ** 2)
        for t in range(T)
    ]
).astype(jnp.float32)


def F(y, t):
    """Returns the log-density of y_t for data N(MEAN, COVARIANCE)."""
    mean = SCHEDULE.y_scale(t) * SCHEDULE.a_bar[t] * MEAN
    residual = y - noise.per_example(mean, y)
    return -jnp.einsum("bi,bij,bj->b", residual, PRECISION[t], residual) / 2


def conditional_std():
    """Returns the std of y_t's hidden pixel at each level, given the known one and x_tilde."""
    noise_precision = np.append(1 / SIGMA[1:T] ** 2, 0.0)
    return 1 / np.sqrt(np.float64(PRECISION[:, 1, 1]) + noise_precision)


# One draw per level, and no chain.
ANCESTRAL = Sampler(langevin.init, langevin.kernel, {}, K=0, start=ladder.start_from_posterior)
# HMC leaves the conditionals exactly invariant. A trajectory of 5 steps, each 0.3 standard
# deviations long, is a quarter of a turn in phase space and crosses the conditional.
HMC = Sampler(
    hmc.init,
    hmc.kernel,
    {
        "step_size": jnp.asarray(0.3 * conditional_std(), jnp.float32),
        "leapfrog": jnp.full(T, 5),
    },
    K=4,
)


@functools.cache
def inpainted(n, rounds, known_value=X, level=0, ancestral=False):
    keys = noise.example_keys(jax.random.key(0), jnp.arange(n))
    hidden_value = -0.9  # has no effect
    x = jnp.broadcast_to(jnp.array([known_value, hidden_value]), (n, 2))
    return np.asarray(inpaint(keys, x, rounds, level, ancestral))


@functools.partial(jax.jit, static_argnames="ancestral")
def inpaint(keys, x, rounds, level=0, ancestral=False):
    """Inpaints as far down as a level, whose hidden pixels it returns."""
    descend = ladder.descend

    def stop_at_level(keys, conditionals, x, top, bottom, recover):
        return descend(keys, conditionals, x, top, bottom + level, recover)

    known = jnp.broadcast_to(KNOWN, x.shape)
    conditionals = Conditionals(F, SCHEDULE, ANCESTRAL if ancestral else HMC)
    with mock.patch.object(ladder, "descend", stop_at_level):
        return inpainting.inpaint(keys, conditionals, x, known, rounds)


def exact_moments(rounds, level, ancestral=False):
    """Returns the mean and variance of a level's hidden pixel after rounds of draws.

    The draws are exact or, if `ancestral`, from the approximate posterior. Each is affine in
    the two pixels of x_{t+1}, so their distribution stays normal.
    """
    centre = X - MEAN
    mean, cov = np.array([A_BAR[T] * centre, 0]), np.diag([SIGMA_BAR[T] ** 2, 1.0])
    mean[1] = -A_BAR[T] * MEAN  # x_T of the hidden pixel has mean 0
    for t in reversed(range(level, T)):
        # q(x_t | x_{t+1}, x) of the known pixel k: k_t = w k_{t+1} + c x + sqrt(v) eps
        w = A[t + 1] * SIGMA_BAR[t] ** 2 / SIGMA_BAR[t + 1] ** 2
        c = A_BAR[t] * SIGMA[t + 1] ** 2 / SIGMA_BAR[t + 1] ** 2
        v = (SIGMA[t + 1] * SIGMA_BAR[t] / SIGMA_BAR[t + 1]) ** 2
        # The hidden pixel given k_t and, below the top, u_{t+1}:
        # u_t = of_k k_t + of_u u_{t+1} + sqrt(posterior) eps
        S = covariance(t)
        slope, prior = S[0, 1] / S[0, 0], S[1, 1] - S[0, 1] ** 2 / S[0, 0]
        noise_precision = 0.0 if t == T - 1 else (A[t + 1] / SIGMA[t + 1]) ** 2
        posterior = 1 / (1 / prior + noise_precision)
        of_k, of_u = posterior / prior * slope, posterior * noise_precision / A[t + 1]
        draw = np.array([[w, 0], [of_k * w, of_u]])
        shift = 0.0
        if (
            ancestral and t < T - 1
        ):  # u_t = (u_{t+1} - sigma² (S_{t+1}^-1 x_{t+1})_u) / a + noise
            score = -np.linalg.inv(covariance(t + 1))[1]
            draw[1] = (np.array([0, 1]) + SIGMA[t + 1] ** 2 * score) / A[t + 1]
            of_k, posterior = 0.0, v
        elif ancestral:
            draw[1], of_k, posterior = (0, 1), 0.0, 0.0
            shift = (A_BAR[T] - A_BAR[T - 1]) * MEAN  # white noise has mean 0 at both levels
        for i in range(rounds):
            if i:  # diffuse back to level t + 1
                mean = A[t + 1] * mean
                cov = A[t + 1] ** 2 * cov + SIGMA[t + 1] ** 2 * np.eye(2)
            mean = draw @ mean + c * centre * np.array([1, of_k]) + np.array([0, shift])
            cov = draw @ cov @ draw.T + v * np.outer([1, of_k], [1, of_k])
            cov += np.diag([0, posterior])
    return A_BAR[level] * MEAN + mean[1], cov[1, 1]


def true_moments():
    """Returns the mean and variance of the hidden pixel of x_0, given the known one of x."""
    mean = A_BAR[0] * (MEAN + RHO * (X - MEAN))
    return mean, A_BAR[0] ** 2 * VARIANCE * (1 - RHO**2) + SIGMA_BAR[0] ** 2


@pytest.mark.slow
@pytest.mark.parametrize(("rounds", "ancestral"), [(1, False), (3, False), (3, True)])
def test_the_hidden_one_of_two_pixels_has_the_exact_moments_of_the_method(rounds, ancestral):
    """At every level, because at level 0 the rounds hide errors of the levels above.

    Fails if x_t is diffused back with the noise of the level below, or the starting points use
    the known pixels of x_t in place of those of x_{t+1}.
    """
    for level in range(T):
        x = inpainted(20_000, rounds, level=level, ancestral=ancestral)
        mean, variance = exact_moments(rounds, level, ancestral)
        assert_mean(x[:, 1], mean, variance, of=2 * T)
        assert_variance(x[:, 1], mean, variance, of=2 * T)


@pytest.mark.slow
def test_many_rounds_converge_to_the_true_conditional():
    """After one round the mean is still biased towards the unconditional mean."""
    mean, variance = true_moments()
    x = inpainted(20_000, 20)[:, 1]
    assert_mean(x, mean, variance, of=2)
    assert_variance(x, mean, variance, of=2)
    one = inpainted(20_000, 1)[:, 1]
    assert 0.75 < (one.mean() - MEAN) / (mean - MEAN) < 0.82
    assert one.var() > 1.1 * variance


@pytest.mark.slow
def test_a_hidden_pixel_depends_on_the_known_pixel_and_not_on_its_own_value():
    x = inpainted(2000, 3)
    other = inpainted(2000, 3, known_value=-X)
    assert x[:, 1].mean() - other[:, 1].mean() > 0.8 * RHO * 2 * X
    keys = noise.example_keys(jax.random.key(0), jnp.arange(2000))
    for hidden in (-5.0, 5.0):
        again = inpaint(keys, jnp.broadcast_to(jnp.array([X, hidden]), (2000, 2)), 3)
        np.testing.assert_array_equal(again[:, 1], x[:, 1])


@pytest.mark.slow
def test_a_sample_depends_only_on_its_own_key_and_image():
    keys = noise.example_keys(jax.random.key(0), jnp.arange(2000))[5:8]
    few = inpaint(keys, jnp.full((3, 2), X), 3)
    np.testing.assert_allclose(few, inpainted(2000, 3)[5:8], rtol=1e-4, atol=1e-5)


TUNING = {"step_size": jnp.asarray(conditional_std(), jnp.float32)}
SAMPLERS = {
    "langevin": Sampler(langevin.init, langevin.kernel, TUNING, 4),
    "mala": Sampler(mala.init, mala.kernel, TUNING, 4),
    "hmc": HMC,
    "ancestral": ANCESTRAL,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_keeps_known_pixels_bit_for_bit_and_changes_the_others(name):
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
    # A hidden pixel is correlated with a known one.
    first_only = known[:, 0] & ~known[:, 1]
    assert np.corrcoef(x[first_only, 0], result[first_only, 1])[0, 1] > 0.3


def test_errors_are_equal_for_draws_from_one_distribution():
    rng = np.random.default_rng(0)
    known = masks.named("left", 4, jax.random.key(0))
    centre = rng.normal(size=(500, 1, 4, 4, 3))
    completions = centre + 0.5 * rng.normal(size=(500, 6, 4, 4, 3))
    truth = (centre + 0.5 * rng.normal(size=centre.shape))[:, 0]
    completions[..., 2:, :] = truth[:, None, :, 2:]  # known pixels do not count
    samples = rng.normal(size=completions.shape) * np.sqrt(1.25)
    errors = inpainting.errors(completions, samples, truth, known)
    assert errors["completion_to_truth"] == pytest.approx(2 * 0.25, rel=0.05)
    assert errors["between_completions"] == pytest.approx(2 * 0.25, rel=0.05)
    assert errors["sample_to_truth"] == pytest.approx(2 * 1.25, rel=0.05)


@pytest.fixture(scope="module")
def run():
    return runs.load(tiny.trained())


@pytest.mark.slow
def test_a_trained_model_keeps_known_pixels_and_completes_an_image_in_different_ways(run):
    source = sources.open_source(run.config)
    x = np.stack(list(pipeline.all_examples(run.config, source, limit=5)))
    known = masks.named("centre", 8, jax.random.key(0))
    completed = run.model.inpaint(jax.random.key(0), x, known, completions=3, rounds=2)
    assert completed.shape == (5, 3, 8, 8, 1)
    known_pixels = np.broadcast_to(known, completed.shape)
    repeated = np.repeat(x, 3, 0).reshape(completed.shape)
    np.testing.assert_array_equal(completed[known_pixels], repeated[known_pixels])
    hidden = completed[:, :, ~known[..., 0]]
    assert hidden.std(axis=1).min() > 1e-3
    other_hidden = np.where(known, x, 0.5)
    programs = run.model.programs.inpaint._cache_size()
    again = run.model.inpaint(jax.random.key(0), other_hidden, known, completions=3, rounds=2)
    np.testing.assert_array_equal(again, completed)
    # The mask and the number of rounds are traced values.
    run.model.inpaint(jax.random.key(0), x, ~known, completions=3, rounds=3)
    assert run.model.programs.inpaint._cache_size() == programs


@pytest.mark.parametrize(
    ("x", "known", "rounds", "words"),
    [
        (np.zeros((1, 8, 9, 1)), np.eye(8, dtype=bool)[..., None], 1, "1x8x9x1"),
        (np.full((1, 8, 8, 1), 1.5), np.eye(8, dtype=bool)[..., None], 1, r"\[1\.5, 1\.5\]"),
        (np.zeros((1, 8, 8, 1)), np.eye(7, dtype=bool)[..., None], 1, "7x7x1"),
        (np.zeros((1, 8, 8, 1)), np.eye(8, dtype=bool)[..., None], 0, "rounds is 0"),
    ],
)
def test_images_masks_and_rounds_that_do_not_fit_are_errors(run, x, known, rounds, words):
    with pytest.raises(UserError, match=words):
        run.model.inpaint(jax.random.key(0), x, known, rounds=rounds)
