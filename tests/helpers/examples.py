"""Configurations and image files for the tests of the sources and of the pipeline."""

import io
import subprocess
import sys
import time

import numpy as np
from PIL import Image

from drl_jax import config as config_lib


def make_config(name="digits", batch_size=4, channels=1, image_size=8, **fields):
    """Returns the default config with this data; `fields` are further fields of config.data."""
    config = config_lib.default()
    config.data.name = name
    config.data.channels = channels
    config.data.image_size = image_size
    config.train.batch_size = batch_size
    for field, value in fields.items():
        config.data[field] = value
    return config


def scaled(pixels):
    """Returns 8-bit pixels scaled to [-1, 1]."""
    return pixels / np.float32(127.5) - 1


def one_line(error):
    """Returns the message of a caught exception, and asserts that it is one line."""
    text = str(error.value)
    assert "\n" not in text
    return text


def run_python(program, *args):
    """Runs a program and returns its exit status, its output, and the time when it ended."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr, time.time()


def save(path, pixels):
    """Writes pixels to an image file, in a folder that may be new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def encoded(pixels):
    """Returns pixels as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def save_damaged(path):
    """Writes the first part of a PNG file."""
    path.write_bytes(
        encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))[:2000]
    )


def save_text(path):
    path.write_text("not an image")


def save_float(path):
    Image.fromarray(np.ones((8, 8), np.float32)).save(path, "TIFF")


def save_int32(path):
    Image.fromarray(np.ones((8, 8), np.int32)).save(path, "TIFF")


def save_dangling_link(path):
    path.symlink_to(path.parent / "nowhere")
