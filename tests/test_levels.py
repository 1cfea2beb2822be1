"""Level statistics of a network and a sampler whose results are known."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.statistical import limit

from drl_jax import diffusion, noise, recovery
from drl_jax.method import Method
from drl_jax.metrics import levels
from drl_jax.model import Model
from drl_jax.networks.energy import Energy
from drl_jax.recovery import Parameterisation
from drl_jax.runtime import sharding
from drl_jax.sampling.ladder import Sampler

SHAPE = (3, 2, 1)
SHIFT, K, ACCEPTANCE = 0.1, 4, 0.25


class State(NamedTuple):
    position: jax.Array


class Info(NamedTuple):
    acceptance: jax.Array


def shift(keys, state, log_density_fn, step_size):
    """Moves every coordinate by the step size, with a constant acceptance."""
    position = state.position + noise.per_example(step_size, state.position)
    return State(position), Info(jnp.full(keys.shape, ACCEPTANCE))


def total(x, t):
    return t + jnp.sum(x, axis=(1, 2, 3))


def model_of(T, batch_size=256, f=total, kernel=shift):
    """Returns a model with this f(x, t), and a sampler that by default only shifts x."""
    schedule = diffusion.schedule(T)
    energy = Energy(None, None, lambda params, x, t: f(x, t), SHAPE)
    sampler = Sampler(
        init=lambda position, log_density_fn: State(position),
        kernel=kernel,
        tuning={"step_size": jnp.full(T, SHIFT)},
        K=K,
    )
    parameterisation = Parameterisation(jnp.full(T, 2.0), recovery.white_noise)
    method = Method(energy, schedule, parameterisation, sampler)
    return Model.create(method, {}, sharding.make_mesh(), batch_size)


def diffused(x, key, t, schedule):
    """Returns y and x_tilde of level t in float64, given the noise that the data meet."""
    keys = noise.fold(noise.example_keys(jax.random.fold_in(key, t), jnp.arange(len(x))), 0)
    level = jnp.full(len(x), t)
    x_t, x_tilde = map(np.float64, diffusion.diffuse_pair(keys, x, level, schedule))
    return np.float64(schedule.y_scale(level))[0] * x_t, x_tilde


@pytest.mark.parametrize("batch_size", [4, 256])
def test_statistics_are_means_over_the_data_and_the_ends_of_their_chains(batch_size):
    """Fails if f is evaluated on x_t instead of y, or F is taken for f (both tried)."""
    model, key = model_of(6, batch_size), jax.random.key(0)
    temperature = 2.0
    x = np.random.default_rng(0).uniform(-1, 1, (10, *SHAPE)).astype(np.float32)
    found = levels.level_statistics(model, key, x)
    assert found["level"] == [0, 1, 2, 3, 4, 5]
    for t in range(6):
        y, x_tilde = diffused(x, key, t, model.method.schedule)
        end = x_tilde + K * SHIFT
        f, f_end = (t + np.sum(z, axis=(1, 2, 3)) for z in (y, end))
        f_data, f_chain = np.mean(f), np.mean(f_end)
        spacing = np.median(np.spacing(np.abs(np.float32(f))))
        assert found["resolution"][t] == pytest.approx(spacing / temperature)
        assert found["f_data"][t] == pytest.approx(f_data, abs=1e-5)
        assert found["f_chain"][t] == pytest.approx(f_chain, abs=1e-5)
    np.testing.assert_allclose(found["displacement"], K * SHIFT * np.sqrt(6), rtol=1e-5)
    np.testing.assert_allclose(found["acceptance"], ACCEPTANCE)


def test_the_noise_of_the_chains_is_independent_of_the_noise_in_the_data():
    """Then the variances of K + 1 white noises add up, and x_tilde of data 0 is one of them.

    Fails if the keys that diffuse the data are those of the chains.
    """

    def add_noise(keys, state, log_density_fn, step_size):
        moved = state.position + noise.normal(keys, SHAPE)
        return State(moved), Info(jnp.ones(keys.shape))

    n = 20_000
    model = model_of(6, n, lambda x, t: jnp.sum(x**2, axis=(1, 2, 3)), add_noise)
    found = levels.level_statistics(model, jax.random.key(0), np.zeros((n, *SHAPE), np.float32))
    variance = K + np.float64(model.method.schedule.sigma_bar[1:]) ** 2
    # The square of a normal number has variance 2 v².
    z = (np.array(found["f_chain"]) / 6 / variance - 1) / np.sqrt(2 / (6 * n))
    assert np.abs(z).max() < limit(6)


def test_ten_of_many_levels_are_evaluated():
    x = np.zeros((1, *SHAPE), np.float32)
    found = levels.level_statistics(model_of(1000), jax.random.key(0), x)
    assert found["level"] == [*range(0, 1000, 100)]
    assert {len(values) for values in found.values()} == {10}


def test_resolution_is_the_smallest_change_of_F_in_float32():
    """At |f| = 100 one unit in the last place of f is 2^-17."""
    temperature, f = np.float32(2e-5), np.full(9, -100.0, np.float32)
    F, next_F = (np.float64(v) / temperature for v in (f, np.nextafter(f, np.float32(0))))
    found = levels.resolution(f, temperature)
    assert found == pytest.approx(next_F[0] - F[0])
    assert found == pytest.approx(2.0**-17 / 2e-5)


def test_a_warning_names_the_level_with_the_coarsest_F(caplog):
    levels.warn_of_rounding([0.0, 5.0], [0.09, 0.1])
    assert not caplog.messages
    levels.warn_of_rounding([0.0, 5.0, 6.0], [0.2, 0.381, 0.3])
    (message,) = caplog.messages
    assert re.search(r"level 5 .*0\.38 nats", message)
