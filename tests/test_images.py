import numpy as np
import pytest
from etils import epath
from PIL import Image

from drl_jax.plots import arrays, images


def test_a_grid_has_grey_gaps_around_enlarged_images():
    x = np.stack([np.full((8, 8, 1), v) for v in (-1, 1, -1)]).astype(np.float32)
    sheet = images.grid(x, columns=2)
    scale = 8
    assert sheet.shape == ((2 * 9 + 1) * scale, (2 * 9 + 1) * scale, 1)
    assert np.all(sheet[:scale] == images.GREY)
    assert np.all(sheet[scale : 9 * scale, scale : 9 * scale] == 0)
    assert np.all(sheet[scale : 9 * scale, 10 * scale : 18 * scale] == 255)
    assert np.all(sheet[10 * scale :, 10 * scale :] == images.GREY)  # there is no fourth image


@pytest.mark.parametrize(
    ("shape", "size"),
    [((2,), images.POINTS), ((5, 1), 9), ((8, 8, 1), 9), ((4, 8, 8, 2), 9)],
)
def test_each_kind_of_example_has_its_own_picture(shape, size):
    assert images.are_images(shape) == (len(shape) == 3)
    assert images.grid_size(shape, columns=3) == size
    x = np.random.default_rng(0).normal(size=(size + 5, *shape)).astype(np.float32)
    if len(shape) == 1:
        expected = images.histogram(x)
    elif len(shape) == 2:
        expected = arrays.signals(x)
    elif len(shape) == 4:
        middle = x[:size, 2, ..., :1]
        low, high = np.percentile(middle, [1, 99])
        expected = images.grid(np.clip(2 * (middle - low) / (high - low) - 1, -1, 1), columns=3)
    else:
        expected = images.grid(x[:size], columns=3)
    np.testing.assert_array_equal(images.picture(x, columns=3), expected)


@pytest.mark.parametrize("shape", [(5,), (9, 2), (8, 8, 1), (4, 4, 4, 2)])
def test_versions_of_examples_of_any_kind_are_compared_in_one_picture(shape):
    rng = np.random.default_rng(0)
    parts = {"known": 1, "completions": 3, "original": 1}
    parts = {k: rng.uniform(-1, 1, (2, n, *shape)).astype(np.float32) for k, n in parts.items()}
    if len(shape) != 3:
        parts["known"][..., 0] = np.nan
    picture = images.rows(parts)
    assert (picture.dtype, picture.ndim) == (np.uint8, 3)
    if len(shape) > 2:
        scale, side = 64 // shape[0], shape[0] + 1
        assert picture.shape == ((2 * side + 1) * scale, (5 * side + 1) * scale, 1)
        assert np.ptp(picture) > 200
    else:
        assert picture.shape[2] == 3
    if len(shape) == 4:  # unknown voxels are grey
        assert np.all(picture[scale : side * scale, scale : side * scale] == images.GREY)


def test_slices_are_the_middle_ones_and_their_range_is_that_of_all_of_them():
    """Fails if another axis or channel is shown, or each slice has its own range."""
    x = np.full((2, 5, 3, 3, 2), 1e6)
    x[:, 2, ..., 0] = np.arange(18).reshape(2, 3, 3)
    low, high = np.percentile(np.arange(18), [1, 99])
    expected = np.clip(2 * (np.arange(18) - low) / (high - low) - 1, -1, 1)
    found = images.slices(x)
    assert found.shape == (2, 3, 3, 1)
    np.testing.assert_allclose(found.ravel(), expected)


def test_a_png_file_contains_the_pixels(tmp_path):
    for channels in (1, 3):
        pixels = np.random.default_rng(0).integers(0, 256, (5, 4, channels), np.uint8)
        path = epath.Path(tmp_path / f"{channels}.png")
        images.write_png(path, pixels)
        read = np.asarray(Image.open(path)).reshape(5, 4, channels)
        np.testing.assert_array_equal(read, pixels)
