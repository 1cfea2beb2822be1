import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drl_jax.errors import UserError
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


class Labelled(nn.Module):
    """f(x, t, label) = label (t + 1), or U(x, level, keys, label) = label level x."""

    classes: int = 0
    is_image: bool = False

    @nn.compact
    def __call__(self, x, t, keys=None, label=None):
        label = jnp.zeros(len(x), jnp.int32) if label is None else label
        return (label * t)[:, None] * x if self.is_image else label * (t + 1.0)


def labelled(is_image, classes):
    network = Labelled(classes, is_image)
    if is_image:
        return from_image_to_image(network, (1,), inner_product, jnp.array([1.0, 2.0, 3.0]))
    return from_network(network, (1,), rule=lambda path: None)


@pytest.mark.parametrize("is_image", [False, True])
@pytest.mark.parametrize("wrap", [lambda energy: energy, lambda e: with_dtype(jnp.bfloat16, e)])
def test_labels_are_passed_to_the_network_if_they_are_given(is_image, wrap):
    """Fails if `with_dtype` drops them."""
    energy = wrap(labelled(is_image, classes=9))
    x, t, label = jnp.ones((3, 1)), jnp.arange(3), jnp.array([1, 0, 5])
    f = energy.f({}, x, t, label=label)
    np.testing.assert_array_equal(f, [1, 0, 15])
    np.testing.assert_array_equal(energy.f({}, x, t), 0)


@pytest.mark.parametrize("is_image", [False, True])
def test_labels_for_a_network_without_classes_raise(is_image):
    energy = with_dtype(jnp.bfloat16, labelled(is_image, classes=0))
    with pytest.raises(UserError, match=r"labels are given to a Labelled without classes"):
        energy.f({}, jnp.ones((3, 1)), jnp.arange(3), label=jnp.zeros(3, jnp.int32))


def test_a_network_of_one_number_can_read_noise_levels():
    """Fails if it reads t, or levels in the dtype of the images."""
    levels = jnp.array([998.0, 999.0, 1000.0])
    energy = from_network(Linear(), (3,), {"dense/kernel": "normalise"}.get, levels)
    params, _ = energy.init(jax.random.key(0))
    half = with_dtype(jnp.bfloat16, energy)
    x = jnp.ones((3, 3))
    ratio = half.f(params, x, jnp.arange(3)) / energy.f(params, x, jnp.arange(3))
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-2)
    f = np.asarray(energy.f(params, x, jnp.array([2, 0, 1])))
    np.testing.assert_allclose(f[1:] / f[0], np.array([999, 1000]) / 1001, rtol=1e-6)
