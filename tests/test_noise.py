import jax
import jax.numpy as jnp
import numpy as np
from helpers.statistical import assert_mean, assert_variance

from drl_jax import noise


def test_noise_of_an_example_depends_only_on_its_index():
    key = jax.random.key(3)
    alone = noise.normal(noise.example_keys(key, jnp.array([5])), (4, 4, 1))
    among = noise.normal(noise.example_keys(key, jnp.arange(9)), (4, 4, 1))
    np.testing.assert_array_equal(alone[0], among[5])


def test_noise_differs_between_folded_numbers_and_between_examples():
    keys = noise.example_keys(jax.random.key(0), jnp.arange(50))
    draws = [noise.normal(noise.fold(keys, d), (3,)).ravel() for d in range(50)]
    assert len(np.unique(np.concatenate(draws))) > 7490  # of 7500; some float32 values coincide


def test_noise_is_standard_normal():
    x = noise.normal(noise.example_keys(jax.random.key(1), jnp.arange(200_000)), (2,))
    assert_mean(x, 0.0, 1.0, of=2)
    assert_variance(x, 0.0, 1.0, of=2)


def test_per_example_broadcasts_one_value_to_each_example():
    x = jnp.ones((2, 3, 3, 1))
    scaled = noise.per_example(jnp.array([2.0, 5.0]), x) * x
    np.testing.assert_array_equal(scaled.sum((1, 2, 3)), [18, 45])
