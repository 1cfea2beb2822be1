"""The task `prepare`: downloads a TFDS data set and prepares it for training."""

from etils import epath
from ml_collections import ConfigDict

from drl_jax.data import sources


def run(config: ConfigDict, workdir: epath.Path | None) -> None:
    """Prepares the data set `config.data.name` in `config.data.data_dir`, as ArrayRecord.

    Args:
      config: uses these two fields.
      workdir: not used.

    Raises:
      UserError: as for `sources.prepare`.
    """
    del workdir
    sources.prepare(config.data.name, config.data.data_dir)
