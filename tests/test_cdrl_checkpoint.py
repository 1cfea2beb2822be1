"""Compares with numbers that the authors' PyTorch program computed from its own checkpoints.

"Fails" in a docstring names bugs that were introduced on purpose to see the test fail.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from helpers.fixtures import CDRL, CDRL_LABELS, assert_close
from helpers.torch_files import tensor, write_zip

from drl_jax.errors import UserError
from drl_jax.networks import resnet, unet
from drl_jax.storage import cdrl_checkpoint

GUIDANCE = 0.7  # w of the fixture
AVERAGED = pytest.mark.parametrize("averaged", [False, True], ids=["raw", "averaged"])
# Compiles in half the time of `jax.jit`, to slower programs.
FAST = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
read = functools.cache(lambda folder: cdrl_checkpoint.read(str(folder / "best.pth.tar")))


class Example(NamedTuple):
    """A checkpoint, and what the program computed with it.

    Attributes:
      parts: the networks and their parameters.
      expected: the program's results.
      label: labels; None if there are none.
      f: (params, y, label) -> f of levels 0..5, compiled.
      score: likewise, the gradient of f with respect to y.
      g: (params, x_tilde, label) -> the initialiser's images of levels 0..5, compiled.
    """

    parts: cdrl_checkpoint.Parts
    expected: dict
    label: jax.Array | None
    f: Callable
    score: Callable
    g: Callable


def images(array):
    """Returns images with the axes [B, H, W, C] in place of PyTorch's [B, C, H, W]."""
    return jnp.asarray(np.moveaxis(array, 1, 3))


@pytest.fixture(scope="module", params=[CDRL, CDRL_LABELS], ids=["no labels", "labels"])
def example(request):
    return load(request.param)


@functools.cache
def extract(folder):
    return cdrl_checkpoint.extract(read(folder), image_size=32)


@functools.cache
def load(folder):
    parts = extract(folder)
    with np.load(folder / "expected.npz") as arrays:
        expected = dict(arrays)
    label = jnp.asarray(expected["label"], "int32") if "label" in expected else None
    network = unet.network(32, **parts.initialiser._asdict())

    def f(params, y, label):
        levels = jnp.asarray(conditioning(expected)[:-1], y.dtype)
        energy = resnet.cdrl_energy(32, levels=levels, **parts.energy._asdict())
        params, _ = energy.normalise(params, parts.vectors)
        return energy.f(params, y, jnp.arange(6), label=label)

    def g(params, x_tilde, label):
        levels = jnp.asarray(conditioning(expected)[1:], x_tilde.dtype)
        return x_tilde + network.apply({"params": params}, x_tilde, levels, label=label)

    def score(params, y, label):
        return jax.grad(lambda y: jnp.sum(f(params, y, label)))(y)

    return Example(parts, expected, label, FAST(f), FAST(score), FAST(g))


def conditioning(expected):
    """Returns the input of the networks for levels 0..6."""
    return np.arctan(np.exp(-expected["logsnr"] / 2)) * 2000 / np.pi


def y_of(example):
    """Returns y = a_{t+1} x_t at levels 0..4, and x_t at the last."""
    a_bar = 1 / np.sqrt(1 + np.exp(-example.expected["logsnr"]))
    a = np.append(a_bar[1:-1] / a_bar[:-2], 1).astype("float32")
    return images(example.expected["x_s"] * a[:, None, None, None])


def test_the_architectures_are_those_of_the_weights():
    for folder, N, classes in ((CDRL, 2, 0), (CDRL_LABELS, 1, 4)):
        checkpoint = read(folder)
        energy = cdrl_checkpoint.infer_energy(checkpoint.energy.raw)
        assert energy == (3, 16, (1, 2, 2, 2), N, classes)
        network = cdrl_checkpoint.infer_initialiser(checkpoint.initialiser.raw, image_size=32)
        assert network == (32, (1, 1, 1), 1, (16, 8), classes, 32)


@pytest.mark.slow
@AVERAGED
def test_energy_and_its_gradient(example, averaged):
    """Fails without the leaky ReLU after a block's dense layer, or with y = x_t.

    The gradient is compared in float64, where activations that are close to the kink of the
    leaky ReLU are on the same side on every machine. One of them, in one example, is within
    1e-6 of it and on the other side in PyTorch's float32. It changes the gradient of the 5x5
    pixels (in part beyond the border) that it depends on.
    """
    params = example.parts.ema if averaged else example.parts.params
    prefix, y = "ema_" * averaged, y_of(example)
    f = example.f(params, y, example.label)
    assert_close(f, example.expected[prefix + "f"], 1e-5)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, "float64"), params)
        score = np.asarray(example.score(params, np.float64(y), example.label))
    expected = np.array(images(example.expected[prefix + "f_grad"]))
    if averaged and example.label is None:
        expected[3, 6:11, 28:] = score[3, 6:11, 28:]
    assert_close(score, expected, 1e-5)


@pytest.mark.slow
@AVERAGED
def test_initialiser(example, averaged):
    """Fails with the level t in place of t + 1."""
    parts, prefix = example.parts, "ema_" * averaged
    params = parts.initialiser_ema if averaged else parts.initialiser_params
    g = example.g(params, images(example.expected["x_t"]), example.label)
    assert_close(g, images(example.expected[prefix + "g"]), 1e-5)


@pytest.mark.slow
@AVERAGED
def test_guidance_extrapolates_from_no_label_which_is_label_0(averaged):
    """f_w = (1 + w) f(label) - w f(none), and likewise for g."""
    example = load(CDRL_LABELS)
    parts, prefix = example.parts, "ema_" * averaged
    cases = [
        ("f", example.f, (parts.params, parts.ema), y_of(example)),
        (
            "g",
            example.g,
            (parts.initialiser_params, parts.initialiser_ema),
            images(example.expected["x_t"]),
        ),
    ]
    for name, function, both, x in cases:
        params = both[averaged]
        none = function(params, x, None)
        np.testing.assert_array_equal(none, function(params, x, 0 * example.label))
        guided = (1 + GUIDANCE) * function(params, x, example.label) - GUIDANCE * none
        expected = example.expected[f"{prefix}{name}_guided"]
        assert_close(guided, images(expected) if expected.ndim == 4 else expected, 1e-5)


@pytest.mark.slow
@AVERAGED
def test_normalised_kernels_are_those_of_the_program(example, averaged):
    """The program's are W / (u · W v) with the vectors of the raw network.

    Fails if the vectors are left at random values.
    """
    parts = example.parts
    energy = resnet.cdrl_energy(32, levels=jnp.zeros(1), **parts.energy._asdict())
    params = parts.ema if averaged else parts.params
    normalised = traverse_util.flatten_dict(
        FAST(energy.normalise)(params, parts.vectors)[0], sep="/"
    )
    raw = traverse_util.flatten_dict(params, sep="/")
    weights = read(CDRL if example.label is None else CDRL_LABELS).energy
    for path in parts.vectors:
        name = cdrl_checkpoint.energy_name(path, parts.energy.N)
        W = (weights.ema if averaged else weights.raw)[name]
        u, v = (weights.raw[name.replace("orig", end)] for end in "uv")
        expected = W / (u @ W.reshape(len(u), -1) @ v)
        expected = expected.transpose((2, 3, 1, 0) if W.ndim == 4 else (1, 0))
        g = raw.get(path.replace("kernel", "g"), 1)
        assert_close(np.asarray(normalised[path]), expected * np.asarray(g), 1e-5)


@pytest.mark.parametrize("folder", [CDRL, CDRL_LABELS], ids=["no labels", "labels"])
def test_all_parameters_are_extracted(folder):
    parts = extract(folder)
    energy = resnet.cdrl_energy(32, levels=jnp.zeros(1), **parts.energy._asdict())
    shapes, vectors = jax.eval_shape(energy.init, jax.random.key(0))
    network = unet.network(32, **parts.initialiser._asdict())
    x = jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(network.init, jax.random.key(0), x, jnp.zeros(1))
    for tree, like in (
        (parts.params, shapes),
        (parts.ema, shapes),
        (parts.vectors, vectors),
        (parts.initialiser_params, variables["params"]),
        (parts.initialiser_ema, variables["params"]),
    ):
        assert jax.tree.structure(tree) == jax.tree.structure(like)
        for ours, theirs in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_the_average_is_matched_to_the_raw_weights_by_its_order():
    """It is close to the raw weights but not equal.

    Fails if the average is taken to be in alphabetical order.
    """
    parts = jax.tree.map(np.asarray, extract(CDRL))
    pairs = [(parts.params, parts.ema), (parts.initialiser_params, parts.initialiser_ema)]
    for raw, average in pairs:
        raw = traverse_util.flatten_dict(raw, sep="/")
        average = traverse_util.flatten_dict(average, sep="/")
        for path, value in raw.items():
            distance = np.linalg.norm(average[path] - value)
            assert distance < 0.02 * np.linalg.norm(value) + 1e-3, path
        assert any(np.any(average[path] != value) for path, value in raw.items())


def test_attention_is_counted_in_the_names_of_blocks():
    architecture = cdrl_checkpoint.InitialiserArchitecture(64, (1, 1, 1), 3, (16, 8), 0)
    name = functools.partial(
        cdrl_checkpoint.initialiser_name, architecture=architecture, image_size=32
    )
    assert name("down_0_block_2/conv1/kernel") == "downs.0.2.conv1.weight"
    assert name("down_0_pool/norm2/scale") == "downs.0.3.norm2.weight"
    assert name("down_1_block_2/dense/bias") == "downs.1.4.mlp.1.bias"
    assert name("down_1_block_2_attention/out/bias") == "downs.1.5.to_out.bias"
    assert name("down_1_pool/conv2/bias") == "downs.1.6.conv2.bias"
    assert name("up_2_block_3_attention/qkv/kernel") == "ups.0.7.to_qkv.weight"
    assert name("up_2_double/conv1/kernel") == "ups.0.8.conv1.weight"
    assert name("up_0_block_3/skip/kernel") == "ups.2.3.res_conv.weight"


def drop(start):
    """Removes the tensors whose name starts with `start`."""
    return lambda tensors: {n: t for n, t in tensors.items() if not n.startswith(start)}


def add(name, *shape):
    return lambda tensors: tensors | {name: np.zeros(shape, np.float32)}


@pytest.mark.parametrize(
    ("network", "change", "words"),
    [
        ("energy", drop("temb_map2.bias"), "pi_state_dict lacks module.temb_map2.bias:"),
        ("energy", drop("temb_final.weight"), "lacks module.temb_final.weight:"),
        ("energy", drop("module_list.4.conv2.weight_u"), "module_list.4.conv2.weight_u:"),
        ("energy", drop("module_list.4.conv2.weight_v"), "module_list.4.conv2.weight_v:"),
        ("energy", drop("module_list.5."), r"module_list.5.conv1.bias and \d+ more:"),
        ("energy", drop("module_list.5.conv1.weight_orig"), "lacks .*5.conv1.weight_orig:"),
        (
            "energy",
            drop("module_list.0.weight_orig"),
            "has no module.module_list.0.weight_orig",
        ),
        ("energy", drop(""), "pi_state_dict has no"),
        ("energy", add("attention.weight", 3), "holds module.attention.weight, which"),
        (
            "energy",
            add("temb_map1.weight_orig", 16, 64),
            r"temb_map1.weight_orig of shape \[16, 64\], not \[64, 16\]:",
        ),
        (
            "energy",
            add("module_list.1.conv1.weight_orig", 8, 16, 3, 3),
            r"module_list.1.conv1.\w+ of shape \[8, 16, 3, 3\], not \[16, 16, 3, 3\]",
        ),
        (
            "energy",
            add("module_list.1.g", 1, 8, 1, 1),
            r"module_list.1.g of shape \[1, 8, 1, 1\], not \[1, 16, 1, 1\]",
        ),
        ("energy", add("y_map.weight_orig", 64, 5), "lacks module.y_map.bias and 2 more"),
        ("initialiser", drop("norm.bias"), "p_state_dict lacks module.norm.bias:"),
        (
            "initialiser",
            drop("downs.1.1.to_qkv.weight"),
            "lacks module.downs.1.1.to_qkv.weight",
        ),
        ("initialiser", drop("downs.0.0.conv1.weight"), "lacks module.downs.0.0.conv1.weight:"),
        ("initialiser", drop("init_conv"), "p_state_dict has no module.init_conv.weight"),
        ("initialiser", add("ups.2.1.norm.bias", 32), "holds module.ups.2.1.norm.bias, which"),
        (
            "initialiser",
            add("mid_attn.to_qkv.weight", 96, 32),
            r"mid_attn.to_qkv.weight of shape \[96, 32\], not \[96, 32, 1, 1\]",
        ),
    ],
)
def test_a_checkpoint_of_another_network_is_rejected_by_name(network, change, words):
    checkpoint = read(CDRL)
    weights = getattr(checkpoint, network)
    checkpoint = checkpoint._replace(**{network: weights._replace(raw=change(weights.raw))})
    with pytest.raises(UserError, match=words) as raised:
        cdrl_checkpoint.extract(checkpoint, image_size=32)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (30, r"length 30 cannot be halved 3 times"),
        (64, r"64x64 would have attention at the sizes \[32, 16\] of \[64, 32, 16\], .* size"),
    ],
)
def test_an_image_size_that_does_not_fit_is_rejected(size, words):
    with pytest.raises(UserError, match=words):
        cdrl_checkpoint.extract(read(CDRL), image_size=size)


def test_images_that_only_the_initialiser_cannot_halve_are_rejected():
    weights = read(CDRL).initialiser.raw
    with pytest.raises(UserError, match=r"length 18 cannot be halved 2 times"):
        cdrl_checkpoint.infer_initialiser(weights, image_size=18)


@pytest.mark.parametrize("kind", ["absent", "folder", "text", "cut"])
def test_files_of_another_format_are_rejected_in_one_line(tmp_path, kind):
    path = tmp_path / "best.pth.tar"
    if kind == "folder":
        path.mkdir()
    if kind == "text":
        path.write_text("no checkpoint")
    if kind == "cut":
        whole = (CDRL / "best.pth.tar").read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    words = r"best.pth.tar cannot be read as a checkpoint .* CDRL program \(.+\): give a file"
    with pytest.raises(UserError, match=words) as raised:
        cdrl_checkpoint.read(str(path))
    assert "\n" not in str(raised.value)


def saved(path, torch, **changes):
    """Writes a small file with the program's entries; `changes` replace some."""
    raw, ema = {"module.w": tensor(np.ones(2, np.float32))}, [tensor(np.ones(2, np.float32))]
    entries = {"pi_state_dict": raw, "p_state_dict": raw}
    for network in ("pi", "p"):
        entries[f"{network}_ema_state_dict"] = {"decay": 0.9999, "shadow_params": ema}
    entries = {name: value for name, value in (entries | changes).items() if value is not None}
    path.write_bytes(write_zip(entries, torch))
    return str(path)


def test_the_four_entries_are_read(tmp_path, torch):
    checkpoint = cdrl_checkpoint.read(saved(tmp_path / "a.pth", torch))
    for weights in checkpoint:
        np.testing.assert_array_equal(weights.raw["w"], [1, 1])
        np.testing.assert_array_equal(weights.ema["w"], [1, 1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"p_state_dict": None}, "it lacks p_state_dict; give"),
        (
            {"pi_ema_state_dict": None, "p_ema_state_dict": None},
            "it lacks pi_ema_state_dict, p_ema_state_dict; give",
        ),
        ({"p_state_dict": {"w": 3}}, "p_state_dict does not consist of tensors"),
        ({"p_state_dict": 3}, "p_state_dict does not consist of tensors"),
        ({"pi_ema_state_dict": {"decay": 1}}, "pi_ema_state_dict does not consist of tensors"),
        (
            {"pi_ema_state_dict": {"shadow_params": []}},
            "pi_ema_state_dict has 0 tensors, but pi_state_dict has 1 parameters",
        ),
    ],
)
def test_a_file_without_the_four_entries_is_rejected(tmp_path, torch, changes, words):
    with pytest.raises(UserError, match=words) as raised:
        cdrl_checkpoint.read(saved(tmp_path / "a.pth", torch, **changes))
    assert "\n" not in str(raised.value)
