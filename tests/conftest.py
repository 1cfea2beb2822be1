"""Fixtures that several test modules share."""

from helpers.torch_files import torch  # noqa: F401
from helpers.toy import trained_toy  # noqa: F401
