"""Draws samples as PNG files: images as a grid, points and other vectors as a histogram."""

import io

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from PIL import Image

from drl_jax.data.pipeline import to_uint8
from drl_jax.storage.atomic import write_atomically

GAP = 1  # width of the gap between images, before they are enlarged [pixels]
GREY = 128  # pixel value of the gap
HALF_WIDTH = 1.5  # half the side of a histogram, in units of the data
BINS = 96  # along each side of a histogram
HALF_WIDTH_OF_VECTORS = 3.0  # the same, unless they are points in the plane
POINTS = 2000  # samples per histogram


def are_points(shape: tuple[int, ...]) -> bool:
    """Returns whether examples of this shape are vectors [D] rather than images [H, W, C]."""
    return len(shape) == 1


def grid(x: Float[np.ndarray, "B H W C"], columns: int) -> UInt8[np.ndarray, "h w C"]:
    """Arranges images in rows, separated by grey gaps.

    Images are enlarged by repeating pixels, by the largest integer factor with which they are
    at most 64 pixels wide and high. Larger images keep their size.

    Args:
      x: images in [-1, 1].
      columns: number of images per row. The last row may have fewer.
    """
    B, H, W, C = x.shape
    rows = -(-B // columns)
    tiles = np.full((rows * columns, H + GAP, W + GAP, C), GREY, np.uint8)
    tiles[:B, :H, :W] = to_uint8(x)
    sheet = tiles.reshape(rows, columns, H + GAP, W + GAP, C).swapaxes(1, 2)
    sheet = sheet.reshape(rows * (H + GAP), columns * (W + GAP), C)
    sheet = np.pad(sheet, ((GAP, 0), (GAP, 0), (0, 0)), constant_values=GREY)
    factor = max(1, 64 // max(H, W))
    return sheet.repeat(factor, axis=0).repeat(factor, axis=1)


def histogram(x: Float[np.ndarray, "B D"]) -> UInt8[np.ndarray, "h w 1"]:
    """Returns a histogram of points in [-HALF_WIDTH, HALF_WIDTH]² as an image, y upwards.

    Of longer vectors it shows the first two values, and of numbers (D = 1) their histogram as a
    horizontal line, in [-HALF_WIDTH_OF_VECTORS, HALF_WIDTH_OF_VECTORS]². The brightness is
    proportional to the square root of the count, whose standard deviation is about the same
    everywhere (1/2).
    """
    half_width = HALF_WIDTH if x.shape[1] == 2 else HALF_WIDTH_OF_VECTORS
    edges = np.linspace(-half_width, half_width, BINS + 1)
    vertical = x[:, 1] if x.shape[1] > 1 else np.zeros(len(x))
    counts, _, _ = np.histogram2d(x[:, 0], vertical, bins=(edges, edges))
    roots = np.sqrt(counts.T[::-1])
    bright = to_uint8(2 * roots / max(roots.max(), 1) - 1)[..., None]
    factor = 512 // BINS
    return bright.repeat(factor, axis=0).repeat(factor, axis=1)


def grid_size(shape: tuple[int, ...], columns: int) -> int:
    """Returns the number of samples of this shape that `picture` shows."""
    return POINTS if are_points(shape) else columns**2


def picture(x: Float[np.ndarray, "B *D"], columns: int) -> UInt8[np.ndarray, "h w C"]:
    """Returns images as a grid with at most as many rows as columns, or points as a histogram.

    Args:
      x: images in [-1, 1] or points; of images, only the first `grid_size` are shown.
      columns: number of images per row.
    """
    if are_points(x.shape[1:]):
        return histogram(x)
    return grid(x[: grid_size(x.shape[1:], columns)], columns)


def write_png(path: epath.Path, image: UInt8[np.ndarray, "H W C"]) -> None:
    """Writes a grey (C = 1) or RGB (C = 3) image.

    Raises:
      UserError: if the file cannot be written.
    """
    encoded = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(encoded, "PNG")
    write_atomically(path, encoded.getvalue())
