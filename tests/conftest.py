"""Run-time checks of all annotations, and fixtures that several test modules share."""

import helpers.typechecking

# Must come before the first import of the package.
helpers.typechecking.install()

from helpers.torch_files import torch  # noqa: E402, F401
from helpers.toy import trained_toy  # noqa: E402, F401
