"""Training, and what it has led to."""

from etils import epath
from ml_collections import ConfigDict

from drl_jax import train
from drl_jax.modes import parts
from drl_jax.modes.evaluate import measure, named_weights


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Trains, then writes samples.png and metrics.json."""
    perception = named_weights(config)
    model, step = train.train(config, workdir)
    parts.adapt(config, model)
    measure(config, model, step, workdir, perception)
