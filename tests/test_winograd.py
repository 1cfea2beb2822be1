import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from drl_jax.networks import winograd


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def direct(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def draw(shape, channels):
    """Of which a convolution has variance 1."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, shape[3], channels)) / np.sqrt(9 * shape[3])
    return jnp.asarray(rng.normal(size=shape)), jnp.asarray(kernel)


def direct_gradient(x, kernel):
    """With respect to the kernel, of the convolution's inner product with itself."""
    result, vjp = jax.vjp(lambda kernel: direct(x, kernel), kernel)
    return vjp(result)[0]


def gradient(x, kernel):
    return winograd.kernel_gradient(x, direct(x, kernel))


BOTH = [(winograd.conv3x3, direct), (gradient, direct_gradient)]


def assert_direct(ours, expected, args):
    """Up to roundings: of a gradient, of sums over all pixels of all images."""
    terms = args[0][..., 0].size if ours is gradient else 1
    np.testing.assert_allclose(ours(*args), expected(*args), rtol=0, atol=1e-13 * terms)


@pytest.mark.parametrize(("ours", "expected"), BOTH)
@pytest.mark.parametrize(
    "shape", [(1, 2, 2, 1), (2, 8, 8, 5), (3, 10, 4, 2), (1, 16, 16, 256), (0, 4, 4, 3)]
)
def test_it_is_the_direct_sum(shape, ours, expected):
    assert_direct(ours, expected, draw(shape, 7))


@pytest.mark.parametrize(("ours", "expected"), BOTH)
@pytest.mark.parametrize(("numbers", "few"), [(1, 1), (4 * 8 * 6 * 7, 3), (10**9, 6)])
def test_it_is_the_same_a_few_images_at_a_time(numbers, few, ours, expected, monkeypatch):
    monkeypatch.setattr(winograd, "NUMBERS", numbers)
    args = draw((6, 8, 6, 5), 7)
    assert winograd._few(*args) == few
    assert_direct(ours, expected, args)


@pytest.mark.parametrize(("ours", "expected"), BOTH)
def test_its_errors_in_float32_are_less_than_twice_those_of_the_direct_sum(ours, expected):
    args = [a.astype(jnp.float32) for a in draw((4, 16, 16, 256), 256)]
    exact = expected(*(a.astype(jnp.float64) for a in args))
    own, others = (
        jnp.sqrt(jnp.mean((f(*args) - exact) ** 2) / jnp.mean(exact**2))
        for f in (ours, expected)
    )
    assert own < 2 * others < 2e-6


def test_images_in_less_precision_than_the_kernel_are_left_to_the_direct_sum():
    x, kernel = draw((1, 8, 8, 256), 128)
    assert winograd.pays(x, kernel)
    assert not winograd.pays(x.astype(jnp.bfloat16), kernel)
