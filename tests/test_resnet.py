import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drl_jax.errors import UserError
from drl_jax.networks import resnet


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "channels", "mult"), [(8, 1, (1, 2)), (16, 3, (1, 2, 2)), (4, 2, (1,))]
)
def test_f_is_one_finite_number_per_image_for_any_size_and_channel_count(size, channels, mult):
    energy = resnet.energy(size, channels, ch=8, mult=mult, N=1)
    params, vectors = energy.init(jax.random.key(0))
    params, _ = energy.normalise(params, vectors)
    x = jax.random.normal(jax.random.key(1), (5, size, size, channels))
    f = jax.jit(energy.f)(params, x, jnp.arange(5))
    assert f.shape == (5,)
    assert np.all(np.isfinite(f))
    assert len(np.unique(f)) == 5


@pytest.mark.slow
def test_f_of_an_example_does_not_depend_on_the_other_examples():
    energy = resnet.energy(8, 1, ch=8, mult=(1, 2), N=1)
    params, _ = energy.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (6, 8, 8, 1))
    t = jnp.arange(6)
    f = jax.jit(energy.f)
    together = f(params, x, t)
    apart = jnp.concatenate([f(params, x[i : i + 1], t[i : i + 1]) for i in range(6)])
    np.testing.assert_allclose(together, apart, rtol=1e-5)


def test_time_embedding_has_sines_in_the_first_half_and_cosines_in_the_second():
    t, ch = np.array([0, 3, 999]), 8
    frequencies = 10000.0 ** (-np.arange(4) / 3)
    angles = t[:, None] * frequencies
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    np.testing.assert_allclose(resnet.time_embedding(jnp.array(t), ch), expected, atol=2e-4)


@pytest.mark.slow
def test_mean_pool_averages_two_by_two_pixels():
    x = jax.random.normal(jax.random.key(0), (2, 6, 4, 3))
    expected = nn.avg_pool(x, (2, 2), strides=(2, 2))
    np.testing.assert_allclose(resnet.mean_pool(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_block_is_its_skip_connection_at_initialisation():
    block = resnet.Block(features=4)
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
    temb = jax.random.normal(jax.random.key(1), (2, 16))
    params = block.init(jax.random.key(2), x, temb)
    np.testing.assert_allclose(block.apply(params, x, temb), x, atol=1e-3)


@pytest.mark.slow
def test_every_kernel_but_the_head_is_spectrally_normalised():
    energy = resnet.energy(8, 3, ch=8, mult=(1, 2), N=2)
    params, vectors = energy.init(jax.random.key(0))
    kernels = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key == "kernel"
    }
    assert kernels - set(vectors) == {"head/kernel"}
    assert resnet.spectral_rule("level_0_block_1/conv2/kernel") == "clip"
    assert resnet.spectral_rule("level_1_block_0/skip/kernel") == "normalise"


def test_image_size_that_cannot_be_halved_raises():
    with pytest.raises(UserError, match=r"12x12 .* 3 times .* multiple of 8"):
        resnet.energy(12, 3, ch=8, mult=(1, 2, 2, 2), N=1)
