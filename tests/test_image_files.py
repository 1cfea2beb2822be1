import contextlib
import io
import os

import numpy as np
import pytest
from etils import epath
from helpers import examples
from helpers.examples import one_line, save
from PIL import Image

from drl_jax.data import image_files
from drl_jax.errors import UserError

BLACK = np.zeros((4, 4, 3), np.uint8)
GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)
RGB = np.stack([GREY, 2 * GREY, 3 * GREY], -1)
LEFT_HALF_OPAQUE = np.repeat(np.uint8([[255, 0]] * 8), 4, axis=1)


def read(path, channels=3, background="white"):
    return image_files.read_image(path, channels, background).astype(int)


# Finding files


def test_links_to_folders_are_followed_and_circles_end(tmp_path):
    """Fails if links are ignored, or if a folder is visited once for every link to it."""
    save(tmp_path / "elsewhere" / "b.png", BLACK)
    save(tmp_path / "elsewhere" / "deeper" / "c.png", BLACK)
    folder = tmp_path / "images"
    save(folder / "a.png", BLACK)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "circle").symlink_to(folder)
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (folder / "again").symlink_to(tmp_path / "elsewhere" / "deeper")
    (folder / "itself").symlink_to(folder / "itself")
    (folder / "lost.png").symlink_to(tmp_path / "nowhere")
    found = image_files.find(epath.Path(folder))
    assert found.images == ["a.png", "again/c.png", "linked/b.png", "lost.png"]
    assert [stamp.size > 0 for stamp in found.stamps] == [True, True, True, False]


def test_hidden_files_and_folders_of_systems_are_ignored(tmp_path):
    hidden = ["._a.jpg", ".Trash/b.png", ".ipynb_checkpoints/c.png", "__MACOSX/a.png"]
    for name in ("a.png", "x/d.PNG", *hidden, "x/@eaDir/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(BLACK).save(tmp_path / name)
    found = image_files.find(epath.Path(tmp_path))
    assert found.images == ["a.png", "x/d.PNG"]
    assert not found.others


def test_images_are_sorted_part_by_part_and_other_files_counted_by_suffix(tmp_path):
    names = ["a-b.png", "a/z.webp", "a/b/c.tif", "B.gif", "d.jpeg"]
    for name in (*names, "notes.txt", "more.TXT", "photo.heic", "a/png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("")
    found = image_files.find(epath.Path(tmp_path))
    assert found.images == ["B.gif", "a/b/c.tif", "a/z.webp", "a-b.png", "d.jpeg"]
    assert found.others == {".txt": 2, ".heic": 1, "without suffix": 1}


def test_a_subfolder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    """Fails if its images are silently left out."""
    scan = os.scandir

    def refuse(path):  # the tests may run as root, who can read everything
        if path.name == "private":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    save(tmp_path / "a.png", BLACK)
    (tmp_path / "private").mkdir()
    with pytest.raises(UserError) as error:
        image_files.find(epath.Path(tmp_path))
    assert one_line(error) == f"cannot read {tmp_path}/private: Permission denied"


@pytest.mark.parametrize("method", ["is_dir", "stat"])
def test_a_disk_that_fails_while_files_are_listed_is_an_error(tmp_path, monkeypatch, method):
    """Fails if the size of the file is taken to be 0, or a folder to be a file."""
    save(tmp_path / "a.png", BLACK)
    scan = os.scandir

    class Entry:
        def __init__(self, entry):
            self.name, self.is_dir, self.stat = entry.name, entry.is_dir, entry.stat
            setattr(self, method, failing(OSError(5, "Input/output error")))

    @contextlib.contextmanager
    def scan_entries(path):
        with scan(path) as entries:
            yield map(Entry, entries)

    monkeypatch.setattr(os, "scandir", scan_entries)
    with pytest.raises(UserError) as error:
        image_files.find(epath.Path(tmp_path))
    assert one_line(error) == f"cannot read {tmp_path}/a.png: Input/output error"


# Reading images


def test_images_are_turned_as_their_exif_orientation_says(tmp_path):
    turned = {1: RGB, 3: RGB[::-1, ::-1], 6: np.rot90(RGB, -1), 8: np.rot90(RGB)}
    for orientation, expected in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
        np.testing.assert_array_equal(read(tmp_path / "a.png"), expected)


@pytest.mark.parametrize(
    ("background", "colour"), [("white", [255] * 3), ("#ff8000", [255, 128, 0])]
)
def test_the_background_shows_through_transparent_pixels(tmp_path, background, colour):
    """Fails if their hidden colour is shown."""
    opaque = LEFT_HALF_OPAQUE[..., np.newaxis] == 255
    save(tmp_path / "rgba.png", np.dstack([RGB, LEFT_HALF_OPAQUE]))
    save(tmp_path / "rgba.webp", np.dstack([GREY, GREY, GREY, LEFT_HALF_OPAQUE]))
    grey = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(LEFT_HALF_OPAQUE)])
    grey.save(tmp_path / "la.png")
    palette = Image.fromarray(np.where(LEFT_HALF_OPAQUE, GREY, 200)).convert("P")
    palette.save(tmp_path / "p.png", transparency=200)
    palette.save(tmp_path / "p.gif", transparency=200)
    for name, pixels in {"rgba.png": RGB, "la.png": None, "p.png": None, "p.gif": None}.items():
        shown = np.where(opaque, np.dstack([GREY] * 3) if pixels is None else pixels, colour)
        np.testing.assert_array_equal(read(tmp_path / name, background=background), shown)
    shown = read(tmp_path / "rgba.webp", background=background)
    np.testing.assert_array_equal(shown[:, 4:], np.broadcast_to(colour, (8, 4, 3)))


def test_a_partly_transparent_pixel_is_a_weighted_mean(tmp_path):
    save(tmp_path / "a.png", np.full((1, 1, 4), [100, 0, 0, 51], np.uint8))  # 51 / 255 = 0.2
    np.testing.assert_allclose(read(tmp_path / "a.png")[0, 0], [224, 204, 204], atol=1)


@pytest.mark.parametrize(
    ("name", "dtype"), [("a.png", "<u2"), ("a.tif", "<u2"), ("big_endian.tif", ">u2")]
)
def test_16_bits_are_reduced_to_8(tmp_path, name, dtype):
    """Fails if they are clipped, so that most pixels are white."""
    wide = GREY.astype(dtype) << 10
    save(tmp_path / name, wide.astype(dtype))
    np.testing.assert_array_equal(read(tmp_path / name, channels=1)[..., 0], wide // 256)


def test_every_format_is_read_in_grey_and_rgb(tmp_path):
    image = Image.fromarray(RGB)
    image.save(tmp_path / "rgb.bmp")
    image.save(tmp_path / "rgb.tiff")
    image.save(tmp_path / "rgb.webp", lossless=True)
    image.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    image.quantize(256).save(tmp_path / "palette.gif")
    image.convert("CMYK").save(tmp_path / "cmyk.tif")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    luma = RGB @ [0.299, 0.587, 0.114]
    for path in tmp_path.iterdir():
        tolerance = 6 if path.suffix == ".jpg" else 1.01
        np.testing.assert_allclose(read(path), RGB, atol=tolerance, err_msg=path.name)
        np.testing.assert_allclose(read(path, channels=1)[..., 0], luma, atol=tolerance)
        assert image_files.size(epath.Path(path)) == (8, 8)


def test_a_format_without_a_direct_way_to_grey_is_read_in_grey(tmp_path):
    Image.new("LAB", (4, 4), (255, 128, 128)).save(tmp_path / "white.tif")
    np.testing.assert_allclose(read(tmp_path / "white.tif", channels=1), 255, atol=1)


def test_black_and_white_pixels_are_0_and_255(tmp_path):
    Image.fromarray(GREY > 20).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read(tmp_path / "a.png", 1)[..., 0], 255 * (GREY > 20))


@pytest.mark.parametrize("suffix", ["gif", "webp", "tiff", "png"])
def test_the_first_frame_of_an_animation_is_read(tmp_path, suffix):
    frames = [Image.new("RGB", (4, 4), (value, value, value)) for value in (40, 200)]
    lossless = {"lossless": True} if suffix == "webp" else {}
    file = tmp_path / f"a.{suffix}"
    frames[0].save(file, save_all=True, append_images=frames[1:], **lossless)
    with Image.open(file) as animation:
        assert animation.n_frames == 2
    np.testing.assert_array_equal(read(file), np.full((4, 4, 3), 40))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (examples.save_damaged, "truncated"),
        (examples.save_text, "it is damaged or not an image"),
        (examples.save_float, "32 bits per channel"),
        (examples.save_int32, "32 bits per channel"),
        (examples.save_dangling_link, "No such file"),
    ],
)
def test_an_unreadable_image_is_named_with_the_reason(tmp_path, spoil, reason):
    spoil(tmp_path / "a.tif")
    with pytest.raises(image_files.UnreadableError) as error:
        read(tmp_path / "a.tif")
    assert str(tmp_path / "a.tif") in one_line(error)
    assert reason in one_line(error)


def failing(error):
    """Returns a function that raises the error, in place of one that accesses a file."""

    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize(
    ("method", "access"),
    [("read_bytes", read), ("open", lambda path: image_files.size(epath.Path(path)))],
)
def test_a_failing_disk_is_not_an_unreadable_image(tmp_path, monkeypatch, method, access):
    """Such images would be skipped, and the same seed would give another result."""
    save(tmp_path / "a.png", BLACK)
    fail = failing(OSError(5, "Input/output error"))
    monkeypatch.setattr(type(epath.Path(tmp_path)), method, fail)
    with pytest.raises(UserError) as error:
        access(tmp_path / "a.png")
    assert not isinstance(error.value, image_files.UnreadableError)
    assert one_line(error) == f"cannot read image {tmp_path}/a.png: Input/output error"


def test_a_file_without_permission_is_an_unreadable_image(tmp_path, monkeypatch):
    save(tmp_path / "a.png", BLACK)
    fail = failing(PermissionError(13, "Permission denied"))
    monkeypatch.setattr(type(epath.Path(tmp_path)), "read_bytes", fail)
    with pytest.raises(image_files.UnreadableError, match=r"a\.png: Permission denied$"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize("target", ["a.png", "file/b.png"])
def test_a_link_that_leads_to_no_file_is_an_unreadable_image(tmp_path, target):
    """Fails if only some such links are: this one to itself, or through a file."""
    (tmp_path / "file").touch()
    (tmp_path / "a.png").symlink_to(tmp_path / target)
    assert image_files.find(epath.Path(tmp_path)).images == ["a.png"]
    for access in (read, lambda path: image_files.size(epath.Path(path))):
        with pytest.raises(image_files.UnreadableError):
            access(tmp_path / "a.png")


def test_contents_are_decoded_as_they_are_stored():
    """As TensorFlow decodes TFDS images: fails if they are turned or get a background."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(np.dstack([RGB, LEFT_HALF_OPAQUE])).save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(image_files.decode(file.getvalue(), 3), RGB)
