"""Compares the network with torch-fidelity's, given the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_inception
from helpers.fixtures import INCEPTION, assert_close

from drl_jax.metrics import inception, weights
from drl_jax.runtime import sharding
from drl_jax.runtime.batching import Engine

NAMES = ("64", "192", "768", "2048", "logits_unbiased", "logits")


@pytest.fixture(scope="module")
def expected():
    with np.load(INCEPTION / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def found(expected):
    """Our features of the images, by image size, from one pass through the network."""
    images = {size: expected[f"images_{size}"] for size in (32, 64, 299)}
    x = jnp.concatenate([inception.prepare(image) for image in images.values()])
    features = jax.jit(inception.Network().apply)(random_inception.variables(), x)
    ends = np.cumsum([len(image) for image in images.values()])
    split = {name: np.split(value, ends[:-1]) for name, value in features.items()}
    return {size: {n: split[n][i] for n in split} for i, size in enumerate(images)}


def test_names_and_shapes_of_the_tensors_are_those_of_the_pytorch_file():
    lines = (INCEPTION / "names.txt").read_text().splitlines()
    assert sorted(lines) == sorted(
        f"{name} {shape}" for name, (_, shape) in weights.file_layout().items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64, 299])
@pytest.mark.parametrize("name", NAMES)
def test_features_equal_those_of_torch_fidelity(found, expected, size, name):
    """To 1e-5 relative to the largest; the measured errors are up to 1.3e-6."""
    assert_close(found[size][name], expected[f"{name}_{size}"], 1e-5)


def test_resize_interpolates_at_i_times_the_ratio_and_repeats_the_last_pixel():
    x = jnp.asarray([0.0, 4.0, 8.0])[None, :, None, None] + jnp.asarray([0.0, 100.0])[:, None]
    resized = inception.resize(x, 6)
    assert resized.shape == (1, 6, 6, 1)
    np.testing.assert_allclose(resized[0, :, 0, 0], [0, 2, 4, 6, 8, 8])
    np.testing.assert_allclose(resized[0, 0, :, 0], [0, 100 / 3, 200 / 3, 100, 100, 100])


def test_an_image_of_the_networks_input_size_is_not_resized():
    x = np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3), np.uint8)
    np.testing.assert_array_equal(inception.prepare(x), (np.float32(x) - 128) / 128)


def test_for_the_papers_protocol_pixels_from_0_to_255_become_minus_one_to_one():
    """As in the authors' `run_inception_jit`; the graph of 2015 maps white to 127 / 128."""
    x = np.zeros((1, 299, 299, 1), np.uint8)
    x[0, 0, 0] = 255
    for centre, white in ((inception.CENTRE_OF_PAPER, 1.0), (inception.CENTRE, 127 / 128)):
        prepared = inception.prepare(x, centre)
        assert (prepared.min(), prepared.max()) == (-1, white)


def test_a_grey_image_is_treated_as_rgb_with_equal_channels():
    x = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), np.uint8)
    np.testing.assert_array_equal(
        inception.prepare(x), inception.prepare(np.repeat(x, 3, axis=-1))
    )


@pytest.mark.parametrize(("n", "centre"), [(1, 128.0), (3, 128.0), (4, 128.0), (9, 127.5)])
def test_an_extractor_yields_the_features_of_every_image_once_in_order(monkeypatch, n, centre):
    def first_pixel(self, variables, x):
        pixels = x[:, 0, 0]
        return dict.fromkeys(NAMES, variables["scale"] * pixels)

    monkeypatch.setattr(inception.Network, "apply", first_pixel)
    mesh = sharding.make_mesh(jax.devices()[:1])
    engine = Engine(mesh, batch_size=4)
    extractor = inception.Extractor({"scale": jnp.float32(centre)}, engine, centre)
    images = [np.full((5, 5, 3), i, np.uint8) for i in range(n)]
    batches = list(extractor(iter(images)))
    assert max(len(batch["2048"]) for batch in batches) <= 4
    for name in ("2048", "logits_unbiased"):
        found = np.concatenate([batch[name] for batch in batches])
        expected = np.arange(n)[:, None] * np.ones(3) - centre
        np.testing.assert_allclose(found, expected, rtol=1e-6)
