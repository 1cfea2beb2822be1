"""Image files: finds them in a folder, reads their headers, and decodes them."""

import contextlib
import errno
import io
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from drl_jax.errors import UserError, as_user_error

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")

# Folders that systems create: copies of names (macOS), thumbnails (Synology), deleted files
# (Windows), fragments of files (Linux). Hidden files and folders are ignored, too.
IGNORED_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found")

MODES = {1: "L", 3: "RGB"}  # Pillow's name of the pixel format, by number of channels


class UnreadableError(UserError):
    """A file that is missing, damaged, not an image, or of an unknown pixel format."""


class Stamp(NamedTuple):
    """What changes if a file is replaced by another one of the same name.

    Attributes:
      size: number of bytes.
      modified: time of the last change since 1970 [ns].
    """

    size: int
    modified: int


class Found(NamedTuple):
    """The files in a folder and its subfolders.

    Attributes:
      images: paths of the image files relative to the folder, sorted part by part.
      stamps: stamp of each image file; None in a bucket, where each costs a request.
      others: number of other files by suffix.
    """

    images: list[str]
    stamps: list[Stamp] | None
    others: Counter[str]


def find(folder: epath.Path) -> Found:
    """Returns the files in a folder, which may be in a bucket, and in its subfolders.

    Links to folders are followed, and every folder is visited once, so that links that lead in
    a circle do no harm. Hidden files and `IGNORED_FOLDERS` are left out.

    Raises:
      UserError: if the folder or a subfolder cannot be read.
    """
    files = _in_bucket(folder) if is_bucket(folder) else _on_disk(folder)
    images: list[tuple[tuple[str, ...], Stamp | None]] = []
    others: Counter[str] = Counter()
    for parts, stamp in files:
        _, dot, suffix = parts[-1].rpartition(".")
        if f".{suffix.lower()}" in SUFFIXES and dot:
            images.append((parts, stamp))
        else:
            others[dot + suffix.lower() if dot else "without suffix"] += 1
    images.sort(key=lambda image: image[0])
    stamps = [stamp for _, stamp in images if stamp]
    return Found(
        images=["/".join(parts) for parts, _ in images],
        stamps=None if is_bucket(folder) else stamps,
        others=others,
    )


def is_bucket(path: epath.Path) -> bool:
    """Returns whether a path is in a bucket, such as gs://bucket/images."""
    return "://" in str(path)


def stamp(path: epath.Path) -> Stamp:
    """Returns the stamp of a file, which may be in a bucket."""
    if is_bucket(path):
        found = path.stat()
        return Stamp(found.length, found.mtime * 10**9)
    status = os.stat(path)  # epath's also looks up the owner, who may be unknown
    return Stamp(status.st_size, status.st_mtime_ns)


def size(path: epath.Path) -> tuple[int, int]:
    """Returns the width and height that the header of an image file states.

    Raises:
      UnreadableError: if there is no such header, or the pixel format is unknown.
      UserError: if the disk fails.
    """
    with _unreadable(path), path.open("rb") as file, _opened(file) as image:
        return image.size


def read_image(
    file: epath.PathLike, channels: int, background: str = "white"
) -> UInt8[np.ndarray, "H W C"]:
    """Reads an image as viewers show it: upright, and in front of a background.

    It is turned as its EXIF orientation says. Of animations, the first frame is read. 16 bits
    per channel are reduced to 8.

    Args:
      file: path of the file.
      channels: 1 for grey, 3 for RGB.
      background: colour, by name or as '#rrggbb', that shows through transparent pixels.

    Raises:
      UnreadableError: if the file is missing, damaged or not an image, or has 32 bits per
        channel, of which it is unknown how many are white.
      UserError: if the disk or the bucket fails.
    """
    path = epath.Path(file).expanduser()
    try:
        with as_user_error(f"cannot read image {path}"):
            content = path.read_bytes()
    except UserError as error:
        if _is_missing(error.__cause__):
            raise UnreadableError(str(error)) from error
        raise
    with _unreadable(path), _opened(io.BytesIO(content)) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            top = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", top.size, background), top)
        return _pixels(upright, channels)


def decode(content: bytes, channels: int) -> UInt8[np.ndarray, "H W C"]:
    """Decodes an image as it is stored, without regard to EXIF orientation or transparency.

    TensorFlow decodes the images of TFDS in the same way.

    Args:
      content: content of the file.
      channels: 1 for grey, 3 for RGB.

    Raises:
      Exception: of many classes, if the content is damaged or not an image.
    """
    with _opened(io.BytesIO(content)) as image:
        return _pixels(image, channels)


def _pixels(image: Image.Image, channels: int) -> UInt8[np.ndarray, "H W C"]:
    """Returns the pixels in grey (1 channel) or RGB (3 channels)."""
    if image.mode.startswith("I;16"):  # Pillow would clip these, not scale them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode not in ("1", "L"):
        image = image.convert("RGB")  # not all formats can be converted to grey directly
    pixels = np.asarray(image.convert(MODES[channels]))
    return pixels.reshape(*pixels.shape[:2], channels)


@contextlib.contextmanager
def _opened(file: Any) -> Iterator[Image.Image]:
    """Opens the image in a binary file, which reads its header.

    Raises:
      ValueError: if it is not an image, or has a pixel format whose white is unknown.
    """
    try:
        image = Image.open(file)
    except UnidentifiedImageError as error:  # its own message names a BytesIO object
        raise ValueError("it is damaged or not an image") from error
    with image:
        if image.mode in ("I", "F"):
            raise ValueError("it has 32 bits per channel, with an unknown white level")
        yield image


@contextlib.contextmanager
def _unreadable(path: epath.Path) -> Iterator[None]:
    """Re-raises any exception as an `UnreadableError`, unless a disk fails.

    Raises:
      UserError: if a disk fails.
    """
    try:
        with as_user_error(f"cannot read image {path}"):
            yield
    except UserError as error:
        cause = error.__cause__
        # Pillow's own OSErrors, about damaged images, have no number.
        if isinstance(cause, OSError) and cause.errno and not _is_missing(cause):
            raise
        raise UnreadableError(str(error)) from error


def _on_disk(folder: epath.Path) -> Iterator[tuple[tuple[str, ...], Stamp]]:
    """Yields the parts of the relative path and the stamp of every file that is not hidden."""
    visited = set()
    remaining: list[tuple[str, ...]] = [()]
    while remaining:
        parent = remaining.pop()
        path = folder.joinpath(*parent)
        real = os.path.realpath(path)
        if real in visited:
            continue
        visited.add(real)
        with as_user_error(f"cannot read {path}"), os.scandir(path) as scanned:
            entries = [entry for entry in scanned if not _is_hidden(entry.name)]
        subfolders = []
        for entry in sorted(entries, key=lambda entry: entry.name):
            parts = (*parent, entry.name)
            try:
                if entry.is_dir():
                    subfolders.append(parts)
                    continue
                status = entry.stat()
                yield parts, Stamp(status.st_size, status.st_mtime_ns)
            except OSError as error:
                if not _is_missing(error):
                    raise UserError(
                        f"cannot read {path / entry.name}: {error.strerror}"
                    ) from error
                yield parts, Stamp(0, 0)
        remaining += reversed(subfolders)


def _in_bucket(folder: epath.Path) -> Iterator[tuple[tuple[str, ...], None]]:
    """Yields the parts of the relative path of every object that is not hidden."""
    with as_user_error(f"cannot read {folder}"):
        walked = list(folder.walk())
    for parent, _, files in walked:
        above = parent.relative_to(folder).parts
        for name in files:
            if not any(map(_is_hidden, (*above, name))):
                yield (*above, name), None


def _is_missing(error: BaseException | None) -> bool:
    """Returns whether there is no file, or no permission to read it: no disk has failed.

    There is no file at the end of a link that leads to itself, or through a file.
    """
    lost = FileNotFoundError | NotADirectoryError | PermissionError
    return isinstance(error, lost) or getattr(error, "errno", None) == errno.ELOOP


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in IGNORED_FOLDERS
