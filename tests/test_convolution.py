import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from drl_jax import diffusion, recovery
from drl_jax.mcmc import langevin
from drl_jax.method import Method
from drl_jax.model import Model
from drl_jax.networks import convolution, resnet
from drl_jax.networks.convolution import conv3x3, kernel_gradient, materialise_gradient
from drl_jax.recovery import Parameterisation
from drl_jax.runtime import sharding
from drl_jax.sampling.ladder import Sampler
from drl_jax.training import state as train_state
from drl_jax.training import step as train_step

B = 8
SHAPES = [  # height, width, input channels, output channels
    (5, 4, 1, 3),
    (4, 7, 3, 1),
    (3, 3, 1, 1),
    (1, 2, 2, 5),
    (8, 8, 6, 6),
    (8, 10, 128, 256),  # wide enough for Winograd's algorithm
]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def direct(x, kernel):
    """Returns XLA's convolution of images, or of signals or volumes."""
    axes = {3: "W", 4: "HW", 5: "DHW"}[x.ndim]
    numbers = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    return lax.conv_general_dilated(
        x, kernel, (1,) * len(axes), "SAME", dimension_numbers=numbers
    )


def arrays(H, W, I, O, *lead):  # noqa: E741
    """Draws images and a kernel, with leading axes before the others."""
    x_key, kernel_key = jax.random.split(jax.random.key(H * W + I))
    x = jax.random.normal(x_key, (*lead, B, H, W, I))
    kernel = jax.random.normal(kernel_key, (*lead, 3, 3, I, O))
    return x, kernel / (9 * I) ** 0.5


def gradients(conv):
    """Returns the gradients of a function that is not linear in the images or the kernel."""
    return jax.grad(lambda x, kernel: jnp.sum(jnp.sin(conv(x, kernel))), (0, 1))


def second_gradients(conv):
    """Returns the gradients of a function of the first gradients (reverse over reverse)."""

    def penalty(x, kernel):
        return sum(jnp.sum(jnp.cos(g)) for g in gradients(conv)(x, kernel))

    return jax.grad(penalty, (0, 1))


def assert_equal(actual, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), actual, expected
    )


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_to_second_order_are_those_of_autodiff(shape):
    args = arrays(*shape)
    for order in (lambda conv: conv, gradients, second_gradients):
        assert_equal(jax.jit(order(conv3x3))(*args), jax.jit(order(direct))(*args))


@pytest.fixture(params=[(5,), (3, 4, 2)], ids=["signals", "volumes"])
def other(request):
    """Signals or volumes with two channels, and a kernel with three outputs."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, *request.param, 2)), rng.normal(size=(2, 3))
    return x, kernel + rng.normal(size=(3,) * len(request.param) + (2, 3))


def test_signals_and_volumes_are_summed_over_all_taps(other):
    """Fails if a kernel is reversed, or an axis is left out."""
    x, kernel = other
    n = x.ndim - 2
    padded = np.pad(x, ((0, 0), *((1, 1),) * n, (0, 0)))
    expected = 0
    for tap in np.ndindex((3,) * n):
        window = tuple(
            slice(i, i + length) for i, length in zip(tap, x.shape[1:], strict=False)
        )
        expected = expected + padded[:, *window] @ kernel[tap]
    assert_equal(conv3x3(jnp.asarray(x), jnp.asarray(kernel)), expected)


@pytest.mark.slow
def test_gradients_to_second_order_for_signals_and_volumes_are_those_of_autodiff(other):
    expected = jax.jit(second_gradients(direct))(*other)
    assert_equal(jax.jit(second_gradients(conv3x3))(*other), expected)


@pytest.mark.slow
def test_every_form_of_the_kernel_gradient_is_the_same_for_signals_and_volumes(
    other, monkeypatch
):
    monkeypatch.setattr(convolution, "BLOCK_CHANNELS", 2)
    x, g = jnp.asarray(other[0]), direct(*other)
    forms = [
        convolution._kernel_gradient_by_blocks,
        convolution._kernel_gradient_by_convolution,
        convolution._kernel_gradient_transposed,
    ]
    first, *others = (jax.jit(form)(x, g) for form in forms)
    for result in others:
        assert_equal(result, first)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 2, 3, 128])  # includes sizes that do not divide 4, 3
def test_kernel_gradient_does_not_depend_on_the_block_size(channels, monkeypatch):
    monkeypatch.setattr(convolution, "BLOCK_CHANNELS", channels)
    x, kernel = arrays(4, 5, 4, 3)
    g = direct(x, kernel)
    expected = convolution._kernel_gradient_by_convolution(x, g)
    assert_equal(convolution._kernel_gradient_by_blocks(x, g), expected)


def test_kernel_gradient_of_transposed_arrays_is_the_same():
    x, kernel = arrays(4, 5, 4, 3)
    g = direct(x, kernel)
    expected = convolution._kernel_gradient_by_convolution(x, g)
    assert_equal(jax.jit(convolution._kernel_gradient_transposed)(x, g), expected)


@pytest.mark.parametrize(
    ("platform", "transposed", "convolutions"), [("cpu", 2, 1), ("tpu", 0, 4), ("cuda", 0, 1)]
)
def test_every_platform_has_its_own_form_of_the_kernel_gradient(
    platform, transposed, convolutions, monkeypatch
):
    monkeypatch.setattr(convolution, "BLOCK_CHANNELS", 2)
    x, kernel = arrays(4, 5, 4, 3)
    g = direct(x, kernel)
    # The lambda is a new function, which has not been traced with another block size.
    traced = jax.jit(lambda x, g: kernel_gradient(x, g)).trace(x, g)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    before, *_ = text.split("stablehlo.convolution")
    assert before.count("stablehlo.transpose") == transposed
    assert text.count("stablehlo.convolution") == convolutions


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "platform", "uses_winograd"),
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
def test_only_wide_convolutions_on_cpus_use_winograds_algorithm(shape, platform, uses_winograd):
    x, kernel = arrays(*shape)
    for fn, args in ((conv3x3, (x, kernel)), (kernel_gradient, (x, direct(x, kernel)))):
        traced = jax.jit(lambda *args, fn=fn: fn(*args)).trace(*args)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.dot_general" in text) == uses_winograd
        assert ("stablehlo.convolution" in text) != uses_winograd


@pytest.mark.slow
def test_materialising_a_gradient_does_not_change_it():
    def materialised(x, kernel):
        return conv3x3(materialise_gradient(jnp.sin(x)), kernel)

    def fused(x, kernel):
        return direct(jnp.sin(x), kernel)

    args = arrays(4, 5, 2, 3)
    for order in (lambda conv: conv, gradients, second_gradients):
        assert_equal(jax.jit(order(materialised))(*args), jax.jit(order(fused))(*args))
    gradient = jax.grad(lambda x: jnp.sum(materialise_gradient(x) ** 2))
    assert "optimization_barrier" in jax.jit(gradient).lower(args[0]).as_text()


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_second_gradients_under_vmap_are_those_of_autodiff(axes):
    args = arrays(4, 5, 2, 3, 3)
    args = [a if axis == 0 else a[0] for a, axis in zip(args, axes, strict=True)]
    actual = jax.jit(jax.vmap(second_gradients(conv3x3), in_axes=axes))(*args)
    assert_equal(actual, jax.jit(jax.vmap(second_gradients(direct), in_axes=axes))(*args))


@pytest.mark.slow
def test_gradients_inside_and_of_a_loop_are_those_of_autodiff():
    def gradient_ascent(conv, x, kernel):
        def step(x, _):
            return x + gradients(conv)(x, kernel)[0], None

        return jnp.sum(jnp.sin(lax.scan(step, x, length=3)[0]))

    args = arrays(4, 5, 2, 3)
    for function in (gradient_ascent, jax.grad(gradient_ascent, (1, 2))):
        compiled = jax.jit(function, static_argnums=0)
        assert_equal(compiled(conv3x3, *args), compiled(direct, *args))


def test_kernel_gradient_is_reduced_over_devices():
    def over_devices(kernel, x):
        x_gradient, kernel_gradient = gradients(conv3x3)(x, kernel)
        return kernel_gradient, x_gradient

    x, kernel = arrays(4, 5, 2, 3)
    mesh = sharding.make_mesh(jax.devices("cpu"))
    mapped = jax.jit(sharding.mean_over_examples(over_devices, mesh))
    mean, _ = mapped(kernel, x)
    assert_equal(mean * mesh.size, gradients(direct)(x, kernel)[1])


def loops(hlo):
    """Returns the lines of a compiled program that run inside a while-loop."""
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
    method = tiny_method()
    params, _ = method.energy.init(jax.random.key(0))
    model = Model.create(method, params, sharding.make_mesh(jax.devices("cpu")))
    shared, examples = model.arguments(jax.random.key(1), jnp.arange(B))
    return model.programs.generate.lower(shared, examples)


def training():
    method = tiny_method()
    training = train_step.Training(
        objective=train_step.recovery_gradient,
        draw_levels=train_step.uniform_levels,
        optimiser=optax.adam(1e-4),
        ema_decay=0.9,
    )
    state = train_state.create(jax.random.key(0), method.energy, training.optimiser)
    x = jnp.zeros((B, *method.energy.shape))
    step = train_step.compile_step(sharding.make_mesh(jax.devices("cpu")), method, training)
    return step.lower(state, {"image": x}, jax.random.key(1))


def tiny_method():
    schedule = diffusion.schedule(6)
    energy = resnet.energy(4, 3, ch=8, mult=(1,), N=1)
    s = recovery.step_sizes(schedule, 2e-4)
    sampler = Sampler(langevin.init, langevin.kernel, {"step_size": s}, K=2)
    return Method(energy, schedule, Parameterisation(s**2, recovery.no_reference), sampler)


@pytest.mark.slow
@pytest.mark.parametrize("program", [generation, training])
def test_loops_only_hold_convolutions_that_are_fast_in_loops(program):
    """Of XLA:CPU, wherever the tests run."""
    with jax.enable_x64(False), jax.default_device(jax.devices("cpu")[0]):
        inside = loops(program().compile().as_text())
    convolutions = [line for line in inside if " convolution(" in line]
    assert convolutions
    assert not [line for line in convolutions if "dim_labels=b01f_01io->b01f" not in line]
    # Kernels are rotated once before a chain, not in each of its steps.
    assert not [line for line in inside if " reverse(" in line]
