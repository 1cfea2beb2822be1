import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.statistical import assert_mean, assert_variance

from drl_jax import noise


def test_noise_of_an_example_depends_only_on_its_index():
    key = jax.random.key(3)
    alone = noise.normal(noise.example_keys(key, jnp.array([5])), (4, 4, 1))
    among = noise.normal(noise.example_keys(key, jnp.arange(9)), (4, 4, 1))
    np.testing.assert_array_equal(alone[0], among[5])


def test_a_raw_key_gives_the_same_example_keys_as_a_typed_one():
    raw, key = jax.random.PRNGKey(3), jax.random.key(3)
    assert jnp.all(
        noise.example_keys(raw, jnp.arange(4)) == noise.example_keys(key, jnp.arange(4))
    )


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


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_dropout_keeps_the_mean_and_drops_the_given_share(rate):
    keys = noise.example_keys(jax.random.key(2), jnp.arange(100_000))
    dropped = noise.dropout(keys, jnp.full((100_000, 2), 3.0), rate)
    kept = np.asarray(dropped) != 0
    assert_mean(kept, 1 - rate, rate * (1 - rate), of=4)
    np.testing.assert_allclose(dropped[kept], 3 / (1 - rate), rtol=1e-6)


def test_dropout_of_an_example_depends_only_on_its_key():
    keys = noise.example_keys(jax.random.key(2), jnp.arange(6))
    h = jnp.ones((6, 50))
    together = noise.dropout(keys, h, 0.5)
    apart = jnp.concatenate(
        [noise.dropout(keys[:2], h[:2], 0.5), noise.dropout(keys[2:], h[2:], 0.5)]
    )
    np.testing.assert_array_equal(together, apart)
    assert len(np.unique(together, axis=0)) == 6


def test_dropout_is_the_same_in_float64():
    """Fails if the probability has the default dtype of floats, and with it the draws."""
    keys = noise.example_keys(jax.random.key(2), jnp.arange(6))
    expected = noise.dropout(keys, jnp.ones((6, 50)), 0.5)
    with jax.enable_x64(True):
        actual = noise.dropout(keys, jnp.ones((6, 50), jnp.float64), 0.5)
    np.testing.assert_array_equal(actual, expected)
