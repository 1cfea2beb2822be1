"""Winograd's convolution against the direct sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from drl_jax.energies import convolution, winograd


def direct(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def draw(shape, channels, dtype):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=shape), rng.normal(size=(3, 3, shape[3], channels))
    return jnp.asarray(x, dtype), jnp.asarray(kernel / np.sqrt(9 * shape[3]), dtype)


@pytest.mark.parametrize("shape", [(1, 2, 2, 1), (2, 8, 8, 5), (3, 10, 4, 2), (1, 16, 16, 256)])
def test_it_is_the_direct_sum_in_float64(shape):
    with jax.enable_x64(True):
        x, kernel = draw(shape, 7, jnp.float64)
        np.testing.assert_allclose(
            winograd.conv3x3(x, kernel), direct(x, kernel), rtol=0, atol=1e-13
        )


def test_its_errors_in_float32_are_less_than_twice_those_of_the_direct_sum():
    with jax.enable_x64(True):
        x, kernel = draw((4, 16, 16, 256), 256, jnp.float32)
        exact = direct(x.astype(jnp.float64), kernel.astype(jnp.float64))
        ours, others = (
            float(jnp.sqrt(jnp.mean((f(x, kernel) - exact) ** 2)))
            for f in (winograd.conv3x3, direct)
        )
    assert ours < 2 * others < 2e-6


def test_the_gradients_of_a_wide_convolution_are_those_of_the_direct_sum():
    with jax.enable_x64(True):
        x, kernel = draw((2, 8, 8, 128), 256, jnp.float64)
        assert winograd.pays(x, kernel)

        def penalty(f, x, kernel):
            """Of the gradient with respect to the images, as in training an energy."""
            g = jax.grad(lambda x: jnp.sum(jnp.sin(f(x, kernel))))(x)
            return jnp.sum(g**3)

        ours, others = (
            jax.grad(lambda *args, f=f: penalty(f, *args), (0, 1))(x, kernel)
            for f in (convolution.conv3x3, direct)
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * abs(b).max()),
            *(ours, others),
        )


@pytest.mark.parametrize(
    ("shape", "channels", "platform", "sums"),
    [
        ((2, 8, 8, 256), 256, "cpu", "dot_general"),
        ((2, 8, 8, 256), 128, "cpu", "dot_general"),
        ((2, 4, 4, 256), 256, "cpu", "convolution"),
        ((2, 9, 8, 256), 256, "cpu", "convolution"),
        ((2, 32, 32, 128), 128, "cpu", "convolution"),
        ((2, 8, 8, 256), 256, "tpu", "convolution"),
        ((2, 8, 8, 256), 256, "cuda", "convolution"),
    ],
)
def test_it_is_used_on_cpus_where_it_pays(shape, channels, platform, sums):
    args = draw(shape, channels, jnp.float32)
    program = export.export(jax.jit(convolution.conv3x3), platforms=[platform])(*args)
    text = program.mlir_module()
    found = {name for name in ("dot_general", "convolution") if f"stablehlo.{name}" in text}
    assert found == {sums}
