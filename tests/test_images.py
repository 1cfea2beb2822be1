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


def test_a_png_file_contains_the_pixels(tmp_path):
    for channels in (1, 3):
        pixels = np.random.default_rng(0).integers(0, 256, (5, 4, channels), np.uint8)
        path = epath.Path(tmp_path / f"{channels}.png")
        images.write_png(path, pixels)
        read = np.asarray(Image.open(path)).reshape(5, 4, channels)
        np.testing.assert_array_equal(read, pixels)
