"""Training, and what it has led to."""

from etils import epath
from ml_collections import ConfigDict

from drl_jax.modes import parts
from drl_jax.modes.evaluate import measure, named_weights


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Trains, then writes samples.png and metrics.json."""
    from drl_jax import train as train_lib  # TensorFlow, behind clu: seconds

    perception = named_weights(config)
    model, step = train_lib.train(config, workdir)
    parts.adapt(config, model)
    measure(config, model, step, workdir, perception)
