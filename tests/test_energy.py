import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drl_jax import config as config_lib
from drl_jax import diffusion
from drl_jax import method as method_lib
from drl_jax.errors import UserError
from drl_jax.networks import resnet, unet
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


RESNET = {"network": "resnet", "ch": 4, "mult": (1, 2), "N": 1}
UNET = {"network": "unet", "ch": 4, "mult": (1, 2), "N": 0, "attention": (2,), "patch": 2}
MLP = {"network": "image_mlp", "ch": 8, "N": 1}
# Compiles in half the time of `jax.jit`, to slower programs.
FAST = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
KEY = jax.eval_shape(lambda: jax.random.key(0))


def randomised(params):
    """Returns random parameters of the given shapes; kernels are of order inputs^-1/2."""
    rng = np.random.default_rng(1)

    def draw(leaf):
        return rng.normal(size=leaf.shape) / max(np.prod(leaf.shape[:-1]), 4) ** 0.5

    return jax.tree.map(draw, params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "axes"),
    [(RESNET, 1), (RESNET, 3), (UNET, 3), (MLP, 1)],
    ids=lambda value: value["network"] if isinstance(value, dict) else value,
)
def test_the_gradient_of_f_for_signals_and_volumes_is_a_finite_difference(network, axes):
    """f is one number per example, which does not depend on the others."""
    config = config_lib.default()
    config.data.update(axes=axes, image_size=4, channels=2)
    config.energy.update(network)
    with jax.enable_x64(True):
        schedule = diffusion.schedule(6, "cosine")
        energy = method_lib.make_energy(config, schedule, "float32")
        assert energy.shape == (4,) * axes + (2,)
        params = randomised(jax.eval_shape(energy.init, KEY)[0])
        x = np.random.default_rng(0).normal(size=(3, *energy.shape))
        direction = np.random.default_rng(2).normal(size=x.shape)
        t = jnp.array([0, 3, 5])

        @FAST
        def evaluate(x):
            f, vjp = jax.vjp(lambda x: energy.f(params, x, t), x)
            return f, vjp(jnp.ones_like(f))[0]

        f, gradient = evaluate(x)
        assert (f.shape, gradient.shape) == ((3,), x.shape)
        step = 1e-6
        ends = [evaluate(x + sign * step * direction)[0] for sign in (1, -1)]
        expected = np.sum(gradient * direction, axis=tuple(range(1, x.ndim)))
        np.testing.assert_allclose((ends[0] - ends[1]) / (2 * step), expected, rtol=1e-5)
        others = np.concatenate([x[:1], x[:0:-1]])
        np.testing.assert_allclose(evaluate(others)[0][0], f[0], rtol=1e-9)
        assert np.all(np.abs(f) > 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "network",
    [
        resnet.ResNet(ch=4, mult=(1,), N=1),
        unet.network(4, ch=4, mult=(1,), N=0, attention=(4,), groups=2),
    ],
    ids=["resnet", "unet"],
)
def test_a_signal_is_an_image_of_width_one_and_an_image_a_volume_of_width_one(network):
    """In the longer kernels, all taps but those in the middle meet the padding only.

    Fails if the spatial axes of a kernel are in another order, or one is left out of a sum.
    """

    def embedded(kernel):
        """Returns a kernel with one axis more, the last spatial one."""
        if kernel.ndim < 3:
            return kernel
        shape = (*kernel.shape[:-2], 3, *kernel.shape[-2:])
        longer = np.random.default_rng(3).normal(size=shape)
        longer[..., 1, :, :] = kernel
        return longer

    with jax.enable_x64(True):
        t = jnp.array([1.0, 4.0])
        apply = FAST(lambda params, x: network.apply({"params": params}, x, t))
        for shape in ((2, 4, 3), (2, 4, 2, 3)):
            x = np.random.default_rng(0).normal(size=shape)
            params = randomised(jax.eval_shape(network.init, KEY, x, t)["params"])
            f = apply(params, x)
            longer = apply(jax.tree.map(embedded, params), x[..., None, :])
            np.testing.assert_allclose(np.reshape(longer, f.shape), f, rtol=1e-9, atol=1e-12)
            assert np.all(np.abs(f) > 1e-9)
