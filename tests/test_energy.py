import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drl_jax.networks.energy import from_image_to_image, from_network, inner_product, with_dtype


class Linear(nn.Module):
    """f(x, t) = (t + 1) (w · x)."""

    @nn.compact
    def __call__(self, x, t):
        return (t + 1) * nn.Dense(1, use_bias=False, name="dense", dtype=x.dtype)(x)[:, 0]


@pytest.fixture
def energy():
    return from_network(Linear(), shape=(3,), rule={"dense/kernel": "normalise"}.get)


def test_f_of_a_network_applies_its_normalised_parameters(energy):
    params, vectors = energy.init(jax.random.key(0))
    normalised, _ = energy.normalise(params, vectors)
    w = np.asarray(params["dense"]["kernel"])[:, 0]
    x, t = jax.random.normal(jax.random.key(1), (4, 3)), jnp.arange(4)
    expected = (t + 1) * (x @ (w / np.linalg.norm(w)))
    np.testing.assert_allclose(energy.f(normalised, x, t), expected, rtol=1e-5)


def test_computed_in_rounds_images_to_a_dtype_and_returns_results_in_theirs(energy):
    params, _ = energy.init(jax.random.key(0))
    x, t = jax.random.normal(jax.random.key(1), (4, 3)), jnp.arange(4)
    half = with_dtype(jnp.bfloat16, energy)
    f, vjp = jax.vjp(lambda params, x: half.f(params, x, t), params, x)
    assert f.dtype == jnp.float32
    for gradient in jax.tree.leaves(vjp(jnp.ones_like(f))):
        assert gradient.dtype == jnp.float32
    exact = energy.f(params, x.astype(jnp.bfloat16), t).astype(jnp.float32)
    np.testing.assert_array_equal(f, exact)
    assert np.any(f != energy.f(params, x, t))


class Level(nn.Module):
    """U(x, level) = level x."""

    @nn.compact
    def __call__(self, x, level, keys):
        return level[:, None] * x


def test_levels_are_not_rounded_to_the_dtype_of_the_images():
    """Fails if the levels become bfloat16, in which 998 and 999 are 1000."""
    levels = jnp.array([998.0, 999.0, 1000.0])
    energy = from_image_to_image(Level(), (1,), inner_product, levels)
    half = with_dtype(jnp.bfloat16, energy)
    f = half.f({}, jnp.ones((3, 1)), jnp.arange(3))
    np.testing.assert_array_equal(f, levels)
