"""The U-Net, and the energy that it defines.

"Fails" in a docstring names bugs that were introduced on purpose to see the test fail.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drl_jax import config as config_lib
from drl_jax import diffusion, method, noise
from drl_jax.errors import UserError
from drl_jax.networks import unet

# Compiles in half the time of `jax.jit`, to slower programs.
FAST = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
KEY = jax.eval_shape(lambda: jax.random.key(0))


def images(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def shapes(network, size, channels):
    """Returns the shapes of the parameters and of the result for 2 images."""
    x, level = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32), jnp.zeros(2)
    U, variables = jax.eval_shape(network.init_with_output, KEY, x, level)
    return variables["params"], U.shape


def randomised(params, dtype=np.float32):
    """Returns random parameters of the given shapes.

    Kernels are of order inputs^-1/2, biases of order 0.1, scales of normalisations about one.
    """
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        scale = np.prod(leaf.shape[:-1]) ** -0.5 if len(leaf.shape) > 1 else 0.1
        value = rng.normal(scale=scale, size=leaf.shape) + (path[-1].key == "scale")
        return value.astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, params)


def random_parameters(module, *arguments):
    return randomised(jax.eval_shape(module.init, KEY, *arguments)["params"])


@pytest.fixture(scope="module")
def tiny():
    """A network with every kind of layer, its parameters, and three images and levels."""
    network = unet.network(4, ch=4, mult=(1, 2), N=0, attention=(2,), groups=2)
    x = images(3, 4, 4, 2)
    level = np.float32([3, 500, 990])

    @FAST
    def apply(params, x, level):
        return network.apply({"params": params}, x, level)

    return network, random_parameters(network, x, level), apply, x, level


@pytest.mark.parametrize(
    ("size", "channels", "mult", "N", "attention"),
    [(8, 1, (1, 2), 1, ()), (12, 3, (1, 1, 2), 2, (3, 12)), (1, 2, (1,), 1, (1,))],
)
def test_the_result_has_the_shape_of_the_images(size, channels, mult, N, attention):
    network = unet.network(size, ch=8, mult=mult, N=N, attention=attention)
    _, shape = shapes(network, size, channels)
    assert shape == (2, size, size, channels)


@pytest.mark.parametrize("counts", [(3,), (2, 3), (1, 3, 2)])
def test_patches_are_intervals_squares_or_cubes_of_pixels(counts):
    """Fails if rows and columns are swapped."""
    x = images(2, *(2 * count for count in counts), 3)
    patches = np.asarray(unet.to_patches(jnp.asarray(x), 2))
    assert patches.shape == (2, *counts, 3 * 2 ** len(counts))
    for index in np.ndindex(counts):
        square = x[:, *(slice(2 * i, 2 * i + 2) for i in index)]
        np.testing.assert_array_equal(patches[:, *index], square.reshape(2, -1))
    np.testing.assert_array_equal(unet.from_patches(jnp.asarray(patches), 2), x)


def test_a_network_of_patches_is_that_of_images_of_patches():
    """With two outputs, U has an axis for them."""
    x, level = images(3, 4, 4, 1), np.float32([3, 500, 990])
    network = unet.network(4, ch=4, mult=(1,), N=0, groups=2, patch=2, outputs=2)
    params = random_parameters(network, x, level)
    inner = unet.network(2, ch=4, mult=(1,), N=0, groups=2, outputs=2)

    @FAST
    def both(x):
        patches = unet.to_patches(x, 2)
        u = inner.apply({"params": params}, patches, level)
        return network.apply({"params": params}, x, level), u

    u, patches = both(x)
    assert u.shape == (3, 2, 4, 4, 1)
    for i in range(2):
        np.testing.assert_allclose(unet.from_patches(patches[:, i], 2), u[:, i], rtol=1e-5)
    assert np.abs(u[:, 0] - u[:, 1]).max() > 0.01


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


def test_the_last_layers_of_the_network_and_of_every_addition_are_zero_at_initialisation(tiny):
    network, _, _, x, level = tiny

    @FAST  # XLA leaves out the layers whose parameters are not returned
    def last_layers(key):
        params = network.init(key, x, level)["params"]
        blocks = [params[name]["conv2"] for name in params if "conv2" in params[name]]
        attention = [params[name]["out"] for name in params if "out" in params[name]]
        return [*blocks, *attention, params["conv_out"]]

    layers = last_layers(jax.random.key(1))
    assert len(layers) == 6 + 2 + 1
    for leaf in jax.tree.leaves(layers):
        np.testing.assert_array_equal(leaf, 0)


def test_the_result_is_bounded_however_large_the_images_are(tiny):
    """The last convolution reads normalised features, of mean square 1 in each group.

    Fails without the last normalisation.
    """
    _, params, apply, x, level = tiny
    # Of n features with mean square one, each is at most sqrt(n) in size; silu only shrinks it.
    n = 4 * 4 * 4 // 2
    norm = params["norm_out"]
    features = np.abs(norm["scale"]) * n**0.5 + np.abs(norm["bias"])
    conv = params["conv_out"]
    bound = np.einsum("hwio,i->o", np.abs(conv["kernel"]), features) + np.abs(conv["bias"])
    ordinary = apply(params, x, level)
    for scale in (1.0, 1e3, 1e6):
        U = apply(params, scale * x, level)
        assert np.all(np.abs(U) <= bound)
    assert np.abs(U).max() < 5 * np.abs(ordinary).max()


def test_every_image_has_its_own_level_and_is_independent_of_the_others(tiny):
    """Fails if a normalisation includes all images, or the level of the first is used."""
    _, params, apply, x, level = tiny
    together = apply(params, x, level)
    for i in range(3):
        other, other_level = np.full_like(x, 5.0), np.full_like(level, 1.0)
        other[i], other_level[i] = x[i], level[i]
        alone = apply(params, other, other_level)[i]
        np.testing.assert_allclose(alone, together[i], rtol=1e-4, atol=1e-5)
    changes = np.abs(apply(params, x, level + 10) - together).max(axis=(1, 2, 3))
    assert changes.min() > 0.01


@pytest.mark.slow
def test_a_network_with_classes_reads_a_label_per_image(tiny):
    """No label is label 0; a label acts like a change of the time embedding's bias.

    Fails if labels are added after the activation that follows the time embedding.
    """
    _, params, apply, x, level = tiny
    network = unet.network(4, ch=4, mult=(1, 2), N=0, attention=(2,), groups=2, classes=4)
    labelled = random_parameters(network, x, level)
    assert labelled.keys() - params.keys() == {"y_map"}
    assert labelled["y_map"]["kernel"].shape == (5, 16)
    x, level = x[:1].repeat(5, 0), level[:1].repeat(5, 0)

    @FAST
    def apply_labelled(params, label):
        return network.apply({"params": params}, x, level, label=label)

    label = np.arange(5)
    U = apply_labelled(labelled, label)
    distances = np.abs(U[:, None] - U[None]).max((2, 3, 4))
    assert np.min(distances + np.eye(5)) > 0.01
    np.testing.assert_allclose(apply_labelled(labelled, label[::-1]), U[::-1], 1e-4, 1e-5)
    none = apply_labelled(labelled, None)
    np.testing.assert_allclose(none, np.repeat(U[:1], 5, 0), rtol=1e-4, atol=1e-5)
    y_map, temb = labelled.pop("y_map"), labelled["temb_1"]
    bias = temb["bias"] + y_map["kernel"][3] + y_map["bias"]
    expected = apply(labelled | {"temb_1": temb | {"bias": bias}}, x[:3], level[:3])
    np.testing.assert_allclose(U[3], expected[0], rtol=1e-4, atol=1e-5)


def test_labels_for_a_network_without_classes_raise(tiny):
    network, params, _, x, level = tiny
    with pytest.raises(UserError, match=r"labels are given to a UNet without classes"):
        network.apply({"params": params}, x, level, label=jnp.zeros(3, jnp.int32))


def test_dropout_depends_on_the_key_of_the_example_alone():
    """A batch in another order gives the same results; other keys give others.

    Fails if the index in the batch is folded into the keys, or the first key is used.
    """
    network = unet.network(4, ch=4, mult=(1,), N=0, dropout=0.3, groups=2)
    x, level = images(3, 4, 4, 1), np.float32([3, 500, 990])
    params = random_parameters(network, x, level)
    apply = FAST(lambda x, level, keys: network.apply({"params": params}, x, level, keys))
    keys = noise.example_keys(jax.random.key(3), jnp.arange(3))
    order = np.array([2, 0, 1])
    dropped = apply(x, level, keys)
    reordered = apply(x[order], level[order], keys[order])
    np.testing.assert_allclose(reordered, dropped[order], rtol=1e-4, atol=1e-5)
    same = apply(x[:1].repeat(3, 0), level[:1].repeat(3), keys)
    for a, b in ((same[0], same[1]), (same[1], same[2])):
        assert np.abs(a - b).max() > 0.01


@pytest.fixture(scope="module")
def block():
    """What the convolutions of two blocks read, by flax's layers and by ours.

    A block from 4 to 6 channels, without and with dropout, and one that halves the resolution.
    The second convolution of each is the identity.

    Returns:
      for both blocks, the skip connection, the activations by flax's layers, and the block's
      result; and for the first, the result with dropout.
    """

    def random_block(resample, width):
        module = unet.Block(features=width, groups=2, dropout=0.25, resample=resample)
        params = random_parameters(module, x, temb, None)
        kernel = np.zeros((3, 3, width, width), np.float32)
        kernel[1, 1] = np.eye(width)
        params["conv2"] = {"kernel": kernel, "bias": np.zeros(width, np.float32)}
        return module, params

    def by_hand(params, pool, width):
        def group_norm(name, h):
            return nn.GroupNorm(2, epsilon=1e-6).apply({"params": params[name]}, h)

        h = pool(nn.silu(group_norm("norm1", x)))
        h = nn.Conv(width, (3, 3)).apply({"params": params["conv1"]}, h)
        dense = nn.silu(temb) @ params["dense"]["kernel"] + params["dense"]["bias"]
        scale, shift = jnp.split(dense[:, None, None], 2, axis=3)
        h = nn.silu((1 + scale) * group_norm("norm2", h) + shift)
        if "skip" in params:
            return x @ params["skip"]["kernel"] + params["skip"]["bias"], h
        return pool(x), h

    x = images(2, 16, 16, 4)
    temb = images(2, 5)
    keys = noise.example_keys(jax.random.key(3), jnp.arange(2))
    wide, wide_params = random_block(None, 6)
    pooled, pooled_params = random_block(unet.mean_pool, 4)
    average = functools.partial(nn.avg_pool, window_shape=(2, 2), strides=(2, 2))

    @FAST
    def results(params, pooled_params):
        return {
            "wide": (
                *by_hand(params, lambda x: x, 6),
                wide.apply({"params": params}, x, temb, None),
            ),
            "pooled": (
                *by_hand(pooled_params, average, 4),
                pooled.apply({"params": pooled_params}, x, temb, None),
            ),
            "dropped": wide.apply({"params": params}, x, temb, keys),
        }

    return results(wide_params, pooled_params)


def test_a_block_is_normalised_scaled_and_shifted_as_specified(block):
    """Fails with scale in place of 1 + scale, shift and scale swapped, or one normalisation
    for all channels.
    """
    skip, h, actual = block["wide"]
    np.testing.assert_allclose(actual, skip + h, rtol=1e-4, atol=1e-4)


def test_dropout_sets_a_quarter_of_the_activations_to_zero_and_scales_the_others(block):
    """A share of 3072: five standard deviations are 0.039, and 1e-6 of draws fail."""
    skip, h, _ = block["wide"]
    actual = block["dropped"] - skip
    dropped = np.abs(actual) < 1e-6
    assert abs(dropped.mean() - 0.25) < 0.04
    expected = np.where(dropped, 0.0, h / 0.75)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_block_resamples_after_the_first_activation_and_on_the_skip_connection(block):
    """Fails if the images are resampled before the normalisation, or after the convolution."""
    skip, h, actual = block["pooled"]
    np.testing.assert_allclose(actual, skip + h, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [(3,), (3, 2), (3, 2, 4)])
def test_doubling_repeats_every_pixel_along_every_axis(lengths):
    expected = x = images(2, *lengths, 5)
    for axis in range(1, 1 + len(lengths)):
        expected = np.repeat(expected, 2, axis=axis)
    np.testing.assert_array_equal(unet.double(jnp.asarray(x)), expected)


def test_attention_is_the_weighted_mean_of_all_pixels():
    """Fails if queries and keys are swapped, or without the division by the square root."""
    module = unet.Attention(groups=2)
    x = images(2, 3, 3, 4)
    params = random_parameters(module, x)

    @FAST
    def results(params, x):
        h = nn.GroupNorm(2, epsilon=1e-6).apply({"params": params["norm"]}, x)
        return h, module.apply({"params": params}, x)

    h, actual = jax.tree.map(np.asarray, results(params, x))
    params = jax.tree.map(np.asarray, params)
    q, k, v = np.split(h @ params["qkv"]["kernel"] + params["qkv"]["bias"], 3, axis=3)
    weights = np.exp(np.einsum("bhwc,byxc->bhwyx", q, k) / 2)
    weights /= weights.sum((3, 4), keepdims=True)
    mean = np.einsum("bhwyx,byxc->bhwc", weights, v)
    expected = x + mean @ params["out"]["kernel"] + params["out"]["bias"]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def energy():
    """A random energy in float64, as the function `evaluate`, and its parameters and images.

    evaluate(params, x) returns the sum of f, the score ∇f, a function of the score, and the
    gradient of this function with respect to (params, x).
    """
    config = config_lib.default()
    config.diffusion.T, config.data.image_size, config.data.channels = 6, 2, 1
    config.energy.update(network="unet", ch=4, mult=(1,), N=0, attention=(2,))
    config.energy.form = "squared_distance"
    with jax.enable_x64(True):
        energy = method.make_energy(config, diffusion.schedule(6), "float32")
        x = np.random.default_rng(0).normal(size=(1, 2, 2, 1))
        t = jnp.array([3])
        params, _ = jax.eval_shape(energy.init, KEY)
        params = randomised(params, np.float64)

        def squared_error(arguments):
            params, x = arguments
            total, score = jax.value_and_grad(lambda x: jnp.sum(energy.f(params, x, t)))(x)
            return jnp.sum((score + 0.3) ** 2), (total, score)

        @FAST
        def evaluate(params, x):
            error, gradient = jax.value_and_grad(squared_error, has_aux=True)((params, x))
            error, (total, score) = error
            return total, score, error, gradient

        def evaluate_to_numpy(params, x):
            return jax.tree.map(np.asarray, evaluate(params, x))

        yield evaluate_to_numpy, params, x


def difference(function, a, direction, h=1e-5):
    """Returns the central difference of a function of a tree, to fourth order in h."""

    def along(steps):
        return function(*jax.tree.map(lambda leaf, d: leaf + steps * h * d, a, direction))

    return (8 * (along(1) - along(-1)) - (along(2) - along(-2))) / (12 * h)


@pytest.mark.slow
def test_the_score_is_the_gradient_of_f_and_conservative(energy):
    """The Jacobian of the score is symmetric, though that of U is not.

    Fails if the gradient stops at a skip connection or at the statistics of a normalisation.
    """
    evaluate, params, x = energy
    with jax.enable_x64(True):
        directions = np.eye(x.size).reshape(-1, *x.shape)
        score = evaluate(params, x)[1].ravel()
        evaluate_x = functools.partial(evaluate, params)
        expected = [difference(lambda x: evaluate_x(x)[0], (x,), (d,)) for d in directions]
        np.testing.assert_allclose(score, expected, rtol=1e-6, atol=1e-8)
        rows = [difference(lambda x: evaluate_x(x)[1], (x,), (d,)) for d in directions]
        jacobian = np.reshape(rows, (x.size, x.size))
        np.testing.assert_allclose(jacobian, np.transpose(jacobian), atol=1e-6)
        assert np.abs(jacobian).min() > 1e-3


@pytest.mark.slow
def test_the_gradient_of_a_function_of_the_score_is_a_finite_difference(energy):
    """Fails if the gradient stops at the statistics of a normalisation's gradient."""
    evaluate, params, x = energy
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        d = jax.tree.map(lambda a: rng.normal(size=a.shape), (params, x))
        expected = difference(lambda *arguments: evaluate(*arguments)[2], (params, x), d)
        gradient = evaluate(params, x)[3]
        products = jax.tree.map(np.vdot, gradient, d)
        np.testing.assert_allclose(sum(jax.tree.leaves(products)), expected, rtol=1e-6)


@pytest.mark.slow
def test_the_gradients_have_the_dtypes_of_the_images_and_parameters(tiny):
    """The result has the parameters', as `resnet.ResNet` has."""
    network, params, _, x, level = tiny

    def total(params, x):
        U = network.apply({"params": params}, x, level)
        assert U.dtype == jnp.float32
        return jnp.sum(U)

    half = x.astype(jnp.bfloat16)
    params_grad, x_grad = jax.eval_shape(jax.grad(total, (0, 1)), params, half)
    assert x_grad.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(params_grad)} == {jnp.dtype(jnp.float32)}


def test_sizes_that_do_not_fit_raise():
    with pytest.raises(UserError, match=r"length 12 .* 3 times .* multiple of 8"):
        unet.network(12, ch=8, mult=(1, 2, 2, 2), N=1)
    with pytest.raises(
        UserError, match=r"length 28 .* patches of length 3; use a divisor of 28"
    ):
        unet.network(28, ch=8, mult=(1,), N=1, patch=3)
    with pytest.raises(UserError, match=r"28 .* once .* patches of length 4; .* such as 32"):
        unet.network(28, ch=8, mult=(1, 2), N=1, patch=4)
    with pytest.raises(UserError, match=r"attention at \(16, 5\): .* lengths \[16, 8\]"):
        unet.network(16, ch=8, mult=(1, 2), N=1, attention=(16, 5))
