import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drl_jax.errors import UserError
from drl_jax.networks import resnet

LEVELS = jnp.array([3.0, 500.0, 990.0])


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
@pytest.mark.parametrize("lengths", [(6,), (6, 4), (2, 6, 4)])
def test_mean_pool_averages_two_pixels_along_every_axis(lengths):
    x = jax.random.normal(jax.random.key(0), (2, *lengths, 3))
    expected = nn.avg_pool(x, (2,) * len(lengths), strides=(2,) * len(lengths))
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


def test_lengths_that_cannot_be_halved_raise_with_the_next_length_that_can():
    words = (
        r"^examples of length 42 cannot be halved 2 times for mult = \(1, 2, 2\); use a "
        r"multiple of 4, such as 44, or fewer multipliers$"
    )
    for axes in (1, 2, 3):
        with pytest.raises(UserError, match=words):
            resnet.energy(42, 3, ch=8, mult=(1, 2, 2), N=1, axes=axes)
    with pytest.raises(UserError, match=r"length 7 .* halved once .* of 2, such as 8, or"):
        resnet.require_divisible(7, (1, 1))


def paths(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_the_names_of_parameters_stay_those_of_stored_checkpoints():
    """CDRL's network has the same, but no bias in its head, and a layer for labels."""
    layers = ["conv_in", "head", "temb_0", "temb_1"]
    blocks = {"level_0_block_0": (), "level_1_block_0": ("skip",)}
    for block, more in blocks.items():
        layers += [f"{block}/{layer}" for layer in ("conv1", "conv2", "dense", *more)]
    expected = {f"{layer}/{leaf}" for layer in layers for leaf in ("kernel", "bias")}
    expected |= {f"{block}/conv2/g" for block in blocks}
    paper = resnet.energy(8, 3, ch=8, mult=(1, 2), N=1)
    params, _ = jax.eval_shape(paper.init, jax.random.key(0))
    assert paths(params).keys() == expected
    cdrl = resnet.cdrl_energy(8, 3, ch=8, mult=(1, 2), N=1, levels=LEVELS, classes=5)
    params, _ = jax.eval_shape(cdrl.init, jax.random.key(0))
    expected |= {"y_map/kernel", "y_map/bias"}
    assert paths(params).keys() == expected - {"head/bias"}


@pytest.fixture(scope="module")
def cdrl():
    """CDRL's network for 4 classes, its raw and normalised parameters, and its vectors."""
    energy = resnet.cdrl_energy(4, 1, ch=8, mult=(1, 2), N=1, levels=LEVELS, classes=4)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def init(key):
        params, vectors = energy.init(key)
        return params, *energy.normalise(params, vectors)

    return energy, *init(jax.random.key(0))


@pytest.mark.slow
def test_every_kernel_of_cdrls_network_but_the_heads_has_spectral_norm_one(cdrl):
    """Fails if the second convolution of a block is only ever scaled down."""
    energy, params, _, vectors = cdrl
    params = jax.tree.map(lambda leaf: 0.1 * leaf, params)  # gains too
    normalise = jax.jit(energy.normalise)
    for _ in range(200):
        normalised, vectors = normalise(params, vectors)
    kernels = {name for name in paths(params) if name.endswith("kernel")}
    assert kernels - vectors.keys() == {"head/kernel"}
    for name in vectors:
        W = np.asarray(paths(normalised)[name])
        norm = np.linalg.norm(W.reshape(-1, W.shape[-1]), ord=2)
        np.testing.assert_allclose(norm, 0.1 if "conv2" in name else 1, rtol=0.02)


@pytest.mark.slow
def test_gains_of_cdrls_network_start_at_one_and_its_kernels_at_one_scale(cdrl):
    """Fails if the second convolution is initialised close to zero."""
    _, params, _, _ = cdrl
    first, second = (params["level_0_block_0"][conv] for conv in ("conv1", "conv2"))
    np.testing.assert_array_equal(second["g"], 1)
    assert 0.8 < np.std(second["kernel"]) / np.std(first["kernel"]) < 1.25


@pytest.mark.slow
def test_cdrls_network_reads_a_level_and_a_label_per_image(cdrl):
    """No label is label 0. Fails if labels 0 and 1 are the same, or t is read for its level."""
    energy, _, params, _ = cdrl
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (1, 4, 4, 1)), (5, 4, 4, 1))
    f = jax.jit(energy.f)
    t, label = jnp.zeros(5, jnp.int32), jnp.arange(5)
    labelled = f(params, x, t, label=label)
    assert len(np.unique(labelled)) == 5
    np.testing.assert_allclose(f(params, x, t, label=label[::-1]), labelled[::-1], rtol=1e-5)
    np.testing.assert_allclose(f(params, x, t), jnp.repeat(labelled[0], 5), rtol=1e-5)
    by_level = f(params, x[:3], jnp.arange(3))
    network = resnet.ResNet(ch=8, mult=(1, 2), N=1, cdrl=True, classes=4)
    expected = network.apply({"params": params}, x[:3], LEVELS)
    np.testing.assert_allclose(by_level, expected, rtol=1e-5)
    assert len(np.unique(by_level)) == 3


def test_labels_for_the_papers_network_raise():
    x, t = jnp.zeros((2, 4, 4, 1)), jnp.zeros(2, jnp.int32)
    energy = resnet.energy(4, 1, ch=8, mult=(1,), N=1)
    network = resnet.ResNet(ch=8, mult=(1,), N=1)
    params, _ = jax.eval_shape(energy.init, jax.random.key(0))
    for f in (
        lambda params: energy.f(params, x, t, label=t),
        lambda params: network.apply({"params": params}, x, t, t),
    ):
        with pytest.raises(UserError, match=r"labels are given to a ResNet without classes"):
            jax.eval_shape(f, params)


def test_image_size_that_cdrls_network_cannot_halve_raises():
    with pytest.raises(UserError, match=r"length 12 .* 3 times .* multiple of 8"):
        resnet.cdrl_energy(12, 3, ch=8, mult=(1, 2, 2, 2), N=1, levels=LEVELS)
