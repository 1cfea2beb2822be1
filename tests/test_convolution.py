import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from drl_jax import diffusion, model, recovery
from drl_jax.mcmc import langevin
from drl_jax.method import Method
from drl_jax.networks import convolution, resnet
from drl_jax.networks.convolution import conv3x3, kernel_gradient, whole_gradient
from drl_jax.recovery import Parameterisation
from drl_jax.runtime import sharding
from drl_jax.sampling.ladder import Sampler
from drl_jax.training import state as train_state
from drl_jax.training import step as train_step

B = 8
SHAPES = [  # H, W, input and output channels
    (5, 4, 1, 3),
    (4, 7, 3, 1),
    (3, 3, 1, 1),
    (1, 2, 2, 5),
    (8, 8, 6, 6),
    (8, 10, 128, 256),  # Winograd's
]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def autodiff(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def arrays(H, W, I, O, *lead):  # noqa: E741
    x_key, kernel_key = jax.random.split(jax.random.key(H * W + I))
    x = jax.random.normal(x_key, (*lead, B, H, W, I))
    kernel = jax.random.normal(kernel_key, (*lead, 3, 3, I, O))
    return x, kernel / (9 * I) ** 0.5


def gradients(conv):
    """Gradients in images and kernel of something that is not linear in either."""
    return jax.grad(lambda x, kernel: jnp.sum(jnp.sin(conv(x, kernel))), (0, 1))


def second_gradients(conv):
    """Gradients of a function of those: reverse over reverse."""

    def penalty(x, kernel):
        return sum(jnp.sum(jnp.cos(g)) for g in gradients(conv)(x, kernel))

    return jax.grad(penalty, (0, 1))


def assert_equal(ours, theirs):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), ours, theirs
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_autodiff(shape):
    args = arrays(*shape)
    for order in (lambda conv: conv, gradients, second_gradients):
        assert_equal(jax.jit(order(conv3x3))(*args), jax.jit(order(autodiff))(*args))


@pytest.mark.parametrize("channels", [1, 2, 3, 128])  # which the widths may not divide
def test_the_kernels_gradient_is_the_same_in_pieces_of_any_size(channels, monkeypatch):
    monkeypatch.setattr(convolution, "CHANNELS", channels)
    x, kernel = arrays(4, 5, 4, 3)
    g = autodiff(x, kernel)
    expected = convolution._kernel_gradient_by_convolution(x, g)
    assert_equal(convolution._kernel_gradient_by_tiles(x, g), expected)


def test_the_kernels_gradient_is_the_same_of_transposed_arrays():
    x, kernel = arrays(4, 5, 4, 3)
    g = autodiff(x, kernel)
    expected = convolution._kernel_gradient_by_convolution(x, g)
    assert_equal(jax.jit(convolution._kernel_gradient_transposed)(x, g), expected)


@pytest.mark.parametrize(
    ("platform", "transposed", "convolutions"), [("cpu", 2, 1), ("tpu", 0, 4), ("cuda", 0, 1)]
)
def test_every_platform_has_its_own_kernels_gradient(
    platform, transposed, convolutions, monkeypatch
):
    monkeypatch.setattr(convolution, "CHANNELS", 2)
    args = arrays(4, 5, 4, 3)
    g = autodiff(*args)
    traced = jax.jit(lambda x, g: kernel_gradient(x, g)).trace(args[0], g)  # a new function
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    before, *_ = text.split("stablehlo.convolution")
    assert before.count("stablehlo.transpose") == transposed
    assert text.count("stablehlo.convolution") == convolutions


@pytest.mark.parametrize(
    ("shape", "platform", "is_winograds"),
    [
        ((8, 8, 256, 128), "cpu", True),
        ((4, 4, 256, 256), "cpu", True),
        ((32, 32, 128, 128), "cpu", True),
        ((4, 4, 32, 64), "cpu", True),
        ((4, 4, 32, 32), "cpu", False),
        ((9, 8, 256, 256), "cpu", False),
        ((2, 2, 256, 256), "cpu", False),
        ((8, 8, 3, 256), "cpu", False),
        ((8, 8, 256, 256), "tpu", False),
        ((8, 8, 256, 256), "cuda", False),
    ],
)
def test_wide_convolutions_on_cpus_are_winograds(shape, platform, is_winograds):
    x, kernel = arrays(*shape)
    for fn, args in ((conv3x3, (x, kernel)), (kernel_gradient, (x, autodiff(x, kernel)))):
        traced = jax.jit(lambda *args, fn=fn: fn(*args)).trace(*args)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.dot_general" in text) == is_winograds
        assert ("stablehlo.convolution" in text) != is_winograds


def test_a_gradient_is_the_same_when_it_is_stored_first():
    def stored(x, kernel):
        return conv3x3(whole_gradient(jnp.sin(x)), kernel)

    def fused(x, kernel):
        return autodiff(jnp.sin(x), kernel)

    args = arrays(4, 5, 2, 3)
    for order in (lambda conv: conv, gradients, second_gradients):
        assert_equal(jax.jit(order(stored))(*args), jax.jit(order(fused))(*args))
    gradient = jax.grad(lambda x: jnp.sum(whole_gradient(x) ** 2))
    assert "optimization_barrier" in jax.jit(gradient).lower(args[0]).as_text()


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_gradients_survive_vmap(axes):
    args = arrays(4, 5, 2, 3, 3)
    some = [a if axis == 0 else a[0] for a, axis in zip(args, axes, strict=True)]
    ours = jax.jit(jax.vmap(second_gradients(conv3x3), in_axes=axes))(*some)
    assert_equal(ours, jax.jit(jax.vmap(second_gradients(autodiff), in_axes=axes))(*some))


def test_gradients_survive_a_loop():
    def climb(conv, x, kernel):
        def step(x, _):
            return x + gradients(conv)(x, kernel)[0], None

        return jnp.sum(jnp.sin(lax.scan(step, x, length=3)[0]))

    args = arrays(4, 5, 2, 3)
    for function in (climb, jax.grad(climb, (1, 2))):
        compiled = jax.jit(function, static_argnums=0)
        assert_equal(compiled(conv3x3, *args), compiled(autodiff, *args))


def test_the_kernels_gradient_is_summed_over_devices():
    def over_devices(kernel, x):
        x_gradient, kernel_gradient = gradients(conv3x3)(x, kernel)
        return kernel_gradient, x_gradient

    x, kernel = arrays(4, 5, 2, 3)
    mesh = sharding.make_mesh()
    mapped = jax.jit(sharding.mean_over_examples(over_devices, mesh))
    found = mapped(kernel, x)[0]
    assert_equal(found * mesh.size, gradients(autodiff)(x, kernel)[1])


def loops(hlo):
    """The lines of a compiled program's text that run inside a while-loop."""
    lines, calls, bodies = {}, {}, set()
    for block in re.split(r"\n(?=\S)", hlo):
        name = re.match(r"(?:ENTRY )?%?([\w.\-]+) ", block)
        if name:
            lines[name[1]] = block.splitlines()
            bodies |= set(re.findall(r"body=%?([\w.\-]+)", block))
            called = re.findall(r"(?:calls|body|condition|to_apply)=%?([\w.\-]+)", block)
            for group in re.findall(r"(?:calls|branch_computations)={(.*?)}", block):
                called += re.findall(r"[\w.\-]+", group)
            calls[name[1]] = called
    reached = set()
    while bodies:
        reached |= bodies
        bodies = {c for name in bodies for c in calls[name]} - reached
    return [line for name in reached for line in lines[name]]


def generation():
    method, mesh = tiny_method(), sharding.make_mesh()
    params, _ = method.energy.init(jax.random.key(0))
    program = model.Model(method, params, mesh).generate
    key = jax.random.key(1)
    return program.lower(params, method.sampler.tuning, key, jnp.arange(B), (), {})


def training():
    method, mesh = tiny_method(), sharding.make_mesh()
    optimiser = optax.adam(1e-4)
    state = train_state.create(jax.random.key(0), method.energy, optimiser)
    x = jnp.zeros((B, *method.energy.shape))
    return train_step.compile_for(mesh, method, optimiser, 0.9).lower(
        state, x, jax.random.key(1)
    )


def tiny_method():
    schedule = diffusion.schedule(6)
    energy = resnet.energy(4, 3, ch=8, mult=(1,), N=1)
    s = recovery.step_sizes(schedule, 2e-4)
    sampler = Sampler(langevin.init, langevin.kernel, {"step_size": s}, K=2)
    return Method(energy, schedule, Parameterisation(s**2, 0.0), sampler, "recovery")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a trap of XLA:CPU")
@pytest.mark.parametrize("program", [generation, training])
def test_no_loop_holds_a_convolution_that_is_slow_there(program):
    with jax.enable_x64(False):
        inside = loops(program().compile().as_text())
    convolutions = [line for line in inside if " convolution(" in line]
    assert convolutions
    assert not [line for line in convolutions if "dim_labels=b01f_01io->b01f" not in line]
    # Nor are kernels turned in every step of a chain: once before it is enough.
    assert not [line for line in inside if " reverse(" in line]
