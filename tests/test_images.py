import numpy as np
from etils import epath
from PIL import Image

from drl_jax.plots import images


def test_pixels_map_from_unit_range_and_are_clipped():
    x = np.array([-2.0, -1.0, 0.0, 1.0, 3.0])
    np.testing.assert_array_equal(pipeline.to_uint8(x), [0, 0, 128, 255, 255])


def test_a_grid_has_grey_gaps_around_enlarged_tiles():
    x = np.stack([np.full((8, 8, 1), v) for v in (-1, 1, -1)]).astype(np.float32)
    sheet = images.grid(x, columns=2)
    scale = 8
    assert sheet.shape == ((2 * 9 + 1) * scale, (2 * 9 + 1) * scale, 1)
    assert np.all(sheet[:scale] == images.GREY)
    assert np.all(sheet[scale : 9 * scale, scale : 9 * scale] == 0)
    assert np.all(sheet[scale : 9 * scale, 10 * scale : 18 * scale] == 255)
    assert np.all(sheet[10 * scale :, 10 * scale :] == images.GREY)  # no fourth image


def test_png_files_hold_the_pixels(tmp_path):
    for channels in (1, 3):
        pixels = np.random.default_rng(0).integers(0, 256, (5, 4, channels), np.uint8)
        path = epath.Path(tmp_path / f"{channels}.png")
        images.write_png(path, pixels)
        read = np.asarray(Image.open(path)).reshape(5, 4, channels)
        np.testing.assert_array_equal(read, pixels)
