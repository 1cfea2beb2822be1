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
    """Draws images and a kernel whose convolution has unit variance."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, shape[3], channels)) / np.sqrt(9 * shape[3])
    return jnp.asarray(rng.normal(size=shape)), jnp.asarray(kernel)


def direct_gradient(x, kernel):
    """Returns the kernel gradient for an output gradient equal to the convolution itself."""
    result, vjp = jax.vjp(lambda kernel: direct(x, kernel), kernel)
    return vjp(result)[0]


def gradient(x, kernel):
    return winograd.kernel_gradient(x, direct(x, kernel))


BOTH = [(winograd.conv3x3, direct), (gradient, direct_gradient)]


def assert_direct(ours, expected, args):
    """Asserts equality up to rounding; a gradient sums over all pixels of all images."""
    terms = args[0][..., 0].size if ours is gradient else 1
    np.testing.assert_allclose(ours(*args), expected(*args), rtol=0, atol=1e-13 * terms)


@pytest.mark.slow
@pytest.mark.parametrize(("ours", "expected"), BOTH)
@pytest.mark.parametrize(
    "shape", [(1, 2, 2, 1), (2, 8, 8, 5), (3, 10, 4, 2), (1, 16, 16, 256), (0, 4, 4, 3)]
)
def test_result_equals_the_direct_sum(shape, ours, expected):
    assert_direct(ours, expected, draw(shape, 7))


@pytest.mark.parametrize(("ours", "expected"), BOTH)
@pytest.mark.parametrize(("elements", "images"), [(1, 1), (4 * 8 * 6 * 7, 3), (10**9, 6)])
def test_result_does_not_depend_on_the_chunk_size(
    elements, images, ours, expected, monkeypatch
):
    monkeypatch.setattr(winograd, "CHUNK_ELEMENTS", elements)
    args = draw((6, 8, 6, 5), 7)
    assert winograd._chunk_size(*args) == images
    assert_direct(ours, expected, args)


@pytest.mark.slow
@pytest.mark.parametrize(("ours", "expected"), BOTH)
def test_float32_errors_are_less_than_twice_those_of_the_direct_sum(ours, expected):
    args = [a.astype(jnp.float32) for a in draw((4, 16, 16, 256), 256)]
    exact = expected(*(a.astype(jnp.float64) for a in args))
    winograd_error, direct_error = (
        jnp.sqrt(jnp.mean((f(*args) - exact) ** 2) / jnp.mean(exact**2))
        for f in (ours, expected)
    )
    assert winograd_error < 2 * direct_error < 2e-6


def test_images_of_another_dtype_than_the_kernel_use_the_direct_sum():
    x, kernel = draw((1, 8, 8, 256), 128)
    assert winograd.is_faster(x, kernel)
    assert not winograd.is_faster(x.astype(jnp.bfloat16), kernel)
