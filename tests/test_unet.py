"""The U-Net, and the energies <x, U(x)> and (|x|² - |x - U(x)|²) / 2 of it.

"Fails" in a docstring names bugs that were introduced on purpose to see the test fail.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drl_jax import noise
from drl_jax.errors import UserError
from drl_jax.networks import unet

# Compiles in half the time of `jax.jit`, to slower programs.
FAST = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

FORMS = {
    "inner_product": lambda x, U: jnp.sum(x * U, axis=(1, 2, 3)),
    "squared_distance": lambda x, U: jnp.sum(x**2 - (x - U) ** 2, axis=(1, 2, 3)) / 2,
}


def shapes(network, size, channels):
    """Returns the shapes of the parameters and of the result for 2 images."""
    x, level = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32), jnp.zeros(2)
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(network.init, key, x, level)
    return variables["params"], jax.eval_shape(network.apply, variables, x, level).shape


def randomised(params, dtype=jnp.float32):
    """Returns random parameters: kernels of order inputs^-1/2, the others of order 0.1."""
    rng = np.random.default_rng(1)

    def draw(leaf):
        scale = leaf[..., 0].size ** -0.5 if leaf.ndim > 1 else 0.1
        return jnp.asarray(leaf + rng.normal(scale=scale, size=leaf.shape), dtype)

    return jax.tree.map(draw, params)


@pytest.fixture(scope="module")
def tiny():
    """A network with every kind of layer, its parameters, and three images and levels."""
    network = unet.network(4, ch=4, mult=(1, 2), N=1, attention=(2,), dropout=0.3, groups=2)
    x = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
    level = jnp.array([3.0, 500.0, 990.0])
    params = FAST(network.init)(jax.random.key(1), x, level)["params"]
    apply = FAST(
        lambda params, x, level, keys: network.apply({"params": params}, x, level, keys)
    )
    return network, params, apply, x, level


@pytest.mark.parametrize(
    ("size", "channels", "mult", "N", "attention"),
    [(8, 1, (1, 2), 1, ()), (12, 3, (1, 1, 2), 2, (3, 12)), (1, 2, (1,), 1, (1,))],
)
def test_the_result_has_the_shape_of_the_images(size, channels, mult, N, attention):
    network = unet.network(size, ch=8, mult=mult, N=N, attention=attention)
    _, shape = shapes(network, size, channels)
    assert shape == (2, size, size, channels)


def test_the_number_of_parameters_counted_by_hand():
    """Width 32 at 32, 16 and 8 pixels, and attention at 16 and 8.

    The way down has 1 block per resolution, two of them with attention, and 2 blocks that
    halve; the middle has 2 blocks and attention. The way up has 2 blocks of 64 channels per
    resolution, four of them with attention, and 2 blocks that double.
    """
    network = unet.network(32, ch=32, mult=(1, 1, 1), N=1, attention=(16, 8), groups=32)
    params, _ = shapes(network, 32, 3)
    conv, time = 9 * 32 * 32 + 32, 128 * 64 + 64
    block = 2 * 32 + conv + time + 2 * 32 + conv
    concatenated = 2 * 64 + conv + 9 * 32 * 32 + time + 2 * 32 + conv + 64 * 32 + 32
    attention = 2 * 32 + 4 * (32 * 32 + 32)
    ends = (9 * 3 * 32 + 32) + 2 * 32 + (9 * 32 * 3 + 3)
    embedding = 32 * 128 + 128 + 128 * 128 + 128
    expected = embedding + ends + (3 + 2 + 2 + 2) * block + 6 * concatenated + 7 * attention
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected == 523_939


def test_the_result_is_zero_at_initialisation(tiny):
    _, params, apply, x, level = tiny
    np.testing.assert_array_equal(apply(params, x, level, None), jnp.zeros_like(x))


def test_the_result_is_bounded_however_large_the_images_are(tiny):
    """The last convolution reads normalised features, of mean square 1 in each group.

    Fails without the last normalisation.
    """
    _, params, apply, x, level = tiny
    params = randomised(params)
    # Of n features with mean square one, each is at most sqrt(n) in size; silu only shrinks it.
    n = 4 * 4 * 4 // 2
    norm = params["norm_out"]
    features = jnp.abs(norm["scale"]) * n**0.5 + jnp.abs(norm["bias"])
    conv = params["conv_out"]
    bound = jnp.einsum("hwio,i->o", jnp.abs(conv["kernel"]), features) + jnp.abs(conv["bias"])
    ordinary = apply(params, x, level, None)
    for scale in (1.0, 1e3, 1e6):
        U = apply(params, scale * x, level, None)
        assert np.all(np.abs(U) <= bound)
    assert np.abs(U).max() < 5 * np.abs(ordinary).max()


def test_every_image_has_its_own_level_and_is_independent_of_the_others(tiny):
    _, params, apply, x, level = tiny
    params = randomised(params)
    together = apply(params, x, level, None)
    for i in range(3):
        other = x.at[:i].set(0.0).at[i + 1 :].set(5.0)
        alone = apply(params, other, level.at[i - 1].set(1.0), None)[i]
        np.testing.assert_allclose(alone, together[i], rtol=1e-4, atol=1e-5)
    assert np.abs(apply(params, x, level + 10, None) - together).max() > 0.01


def test_dropout_depends_on_the_key_of_the_example_alone(tiny):
    """A batch in another order gives the same results; other keys give others."""
    _, params, apply, x, level = tiny
    params = randomised(params)
    keys = noise.example_keys(jax.random.key(3), jnp.arange(3))
    order = np.array([2, 0, 1])
    dropped = apply(params, x, level, keys)
    reordered = apply(params, x[order], level[order], keys[order])
    np.testing.assert_allclose(reordered, dropped[order], rtol=1e-4, atol=1e-5)
    same = apply(params, x[:1].repeat(3, 0), level[:1].repeat(3), keys)
    kept = apply(params, x, level, None)
    for a, b in ((same[0], same[1]), (same[1], same[2]), (kept, dropped)):
        assert np.abs(a - b).max() > 0.01


@pytest.fixture
def block():
    """A block from 4 to 6 channels, whose second convolution is the identity."""
    module = unet.Block(features=6, groups=2, dropout=0.25)
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 4))
    temb = jax.random.normal(jax.random.key(1), (2, 5))
    params = FAST(module.init)(jax.random.key(2), x, temb, None)["params"]
    params = randomised(params)
    identity = jnp.zeros((3, 3, 6, 6)).at[1, 1].set(jnp.eye(6))
    params["conv2"] = {"kernel": identity, "bias": jnp.zeros(6)}
    apply = FAST(lambda params, x, temb, keys: module.apply({"params": params}, x, temb, keys))
    return params, apply, x, temb


@FAST
def by_hand(params, x, temb):
    """Returns the skip connection and what `conv2` reads, with flax's layers."""

    def group_norm(name, h):
        return nn.GroupNorm(2, epsilon=1e-6).apply({"params": params[name]}, h)

    h = nn.Conv(6, (3, 3)).apply({"params": params["conv1"]}, nn.silu(group_norm("norm1", x)))
    dense = nn.Dense(12).apply({"params": params["dense"]}, nn.silu(temb))[:, None, None]
    h = (1 + dense[..., :6]) * group_norm("norm2", h) + dense[..., 6:]
    return x @ params["skip"]["kernel"] + params["skip"]["bias"], nn.silu(h)


def test_a_block_is_normalised_scaled_and_shifted_as_specified(block):
    """Fails with scale in place of 1 + scale, shift and scale swapped, or one normalisation
    for all channels.
    """
    params, apply, x, temb = block
    skip, h = by_hand(params, x, temb)
    actual = apply(params, x, temb, None)
    np.testing.assert_allclose(actual, skip + h, rtol=1e-4, atol=1e-4)


def test_dropout_sets_a_quarter_of_the_activations_to_zero_and_scales_the_others(block):
    """A share of 3072: five standard deviations are 0.039, and 1e-6 of draws fail."""
    params, apply, x, temb = block
    skip, h = by_hand(params, x, temb)
    keys = noise.example_keys(jax.random.key(3), jnp.arange(2))
    actual = apply(params, x, temb, keys) - skip
    dropped = np.abs(actual) < 1e-6
    assert abs(dropped.mean() - 0.25) < 0.04
    expected = np.where(dropped, 0.0, h / 0.75)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_block_resamples_after_the_first_activation_and_on_the_skip_connection():
    module = unet.Block(features=4, groups=2, dropout=0.0, resample=unet.mean_pool)
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
    temb = jnp.ones((2, 5))
    params = FAST(module.init)(jax.random.key(2), x, temb, None)["params"]
    apply = FAST(lambda params: module.apply({"params": params}, x, temb, None))
    pooled = nn.avg_pool(x, (2, 2), (2, 2))
    result = apply(params)
    np.testing.assert_allclose(result, pooled, rtol=1e-5, atol=1e-6)
    params["conv1"]["kernel"] = jnp.zeros((3, 3, 4, 4)).at[1, 1].set(jnp.eye(4))
    params["conv2"]["kernel"] = params["conv1"]["kernel"]
    result = apply(params) - pooled
    normalise = nn.GroupNorm(2, epsilon=1e-6, use_scale=False, use_bias=False)
    h = nn.avg_pool(nn.silu(normalise.apply({}, x)), (2, 2), (2, 2))
    scale, shift = jnp.split(nn.silu(temb) @ params["dense"]["kernel"], 2, axis=1)
    h = (1 + scale[:, None, None]) * normalise.apply({}, h) + shift[:, None, None]
    np.testing.assert_allclose(result, nn.silu(h), rtol=1e-4, atol=1e-4)


def test_doubling_repeats_every_pixel_in_a_square():
    x = jax.random.normal(jax.random.key(0), (2, 3, 2, 5))
    expected = np.repeat(np.repeat(x, 2, axis=1), 2, axis=2)
    np.testing.assert_array_equal(unet.double(x), expected)


def test_attention_is_the_weighted_mean_of_all_pixels():
    module = unet.Attention(groups=2)
    x = jax.random.normal(jax.random.key(0), (2, 3, 3, 4))
    params = randomised(FAST(module.init)(jax.random.key(1), x)["params"])
    h = nn.GroupNorm(2, epsilon=1e-6).apply({"params": params["norm"]}, x)
    q, k, v = np.split(h @ params["qkv"]["kernel"] + params["qkv"]["bias"], 3, axis=3)
    weights = np.exp(np.einsum("bhwc,byxc->bhwyx", q, k) / 2)
    weights /= weights.sum((3, 4), keepdims=True)
    mean = np.einsum("bhwyx,byxc->bhwc", weights, v)
    expected = x + mean @ params["out"]["kernel"] + params["out"]["bias"]
    actual = module.apply({"params": params}, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def energy():
    """A random network in float64 as f(form, params, x), and its parameters and images."""
    with jax.enable_x64(True):
        network = unet.network(2, ch=4, mult=(1, 2), N=0, attention=(1, 2), groups=2)
        x = jax.random.normal(jax.random.key(0), (2, 2, 2, 1), jnp.float64)
        level = jnp.array([3.0, 500.0])
        params = FAST(network.init)(jax.random.key(1), x, level)["params"]
        params = randomised(params, jnp.float64)

        def f(form, params, x):
            return jnp.sum(FORMS[form](x, network.apply({"params": params}, x, level)))

        yield f, params, x


def difference(function, a, direction, h=1e-4):
    """Returns the central difference of a function of a tree, to fourth order in h."""

    def along(steps):
        return function(jax.tree.map(lambda leaf, d: leaf + steps * h * d, a, direction))

    return (8 * (along(1) - along(-1)) - (along(2) - along(-2))) / (12 * h)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_the_score_is_the_gradient_of_f_and_conservative(form, energy):
    """The Jacobian of the gradient is symmetric, though that of U is not."""
    f, params, x = energy
    with jax.enable_x64(True):
        compiled = FAST(jax.value_and_grad(functools.partial(f, form, params)))
        directions = np.eye(x.size).reshape(-1, *x.shape)
        expected = [difference(lambda x: compiled(x)[0], x, d) for d in directions]
        np.testing.assert_allclose(compiled(x)[1].ravel(), expected, rtol=1e-6, atol=1e-8)
        jacobian = [difference(lambda x: compiled(x)[1].ravel(), x, d) for d in directions]
        np.testing.assert_allclose(jacobian, np.transpose(jacobian), atol=1e-8)
        assert np.abs(jacobian).max() > 0.1


@pytest.mark.slow
def test_the_gradient_of_a_function_of_the_score_is_a_finite_difference(energy):
    """Fails if the gradient stops at the statistics of a normalisation's gradient."""
    f, params, x = energy

    def squared_error(arguments):
        params, x = arguments
        score = jax.grad(functools.partial(f, "inner_product", params))(x)
        return jnp.sum((score + 0.3) ** 2)

    with jax.enable_x64(True):
        compiled = FAST(jax.value_and_grad(squared_error))
        rng = np.random.default_rng(2)
        d = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), (params, x))
        expected = difference(lambda a: compiled(a)[0], (params, x), d)
        _, gradient = compiled((params, x))
        products = jax.tree.map(lambda a, b: jnp.sum(a * b), gradient, d)
        np.testing.assert_allclose(sum(jax.tree.leaves(products)), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_result_and_the_gradients_have_the_dtypes_of_the_images_and_parameters(dtype, tiny):
    network, params, _, x, level = tiny

    def total(params, x):
        U = network.apply({"params": params}, x, level)
        assert U.dtype == dtype
        return jnp.sum(U.astype(jnp.float32))

    params_grad, x_grad = jax.eval_shape(jax.grad(total, (0, 1)), params, x.astype(dtype))
    assert x_grad.dtype == dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(params_grad)} == {jnp.dtype(jnp.float32)}


def test_sizes_that_do_not_fit_raise():
    with pytest.raises(UserError, match=r"12x12 .* 3 times .* multiple of 8"):
        unet.network(12, ch=8, mult=(1, 2, 2, 2), N=1)
    with pytest.raises(UserError, match=r"attention at \(16, 5\): .* sizes \[16, 8\]"):
        unet.network(16, ch=8, mult=(1, 2), N=1, attention=(16, 5))
