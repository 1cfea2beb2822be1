"""Checkpoints: the training state and the configuration, written by Orbax.

Saving is asynchronous and atomic. A checkpoint that cannot be read (its disk filled up,
its copy was cut short) is passed over, with a word, for the one before it.
"""

import logging
from collections.abc import Callable

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Sharding
from ml_collections import ConfigDict

from drl_jax import config as config_lib
from drl_jax.train_state import TrainState

log = logging.getLogger(__name__)

# What reading a damaged file raises, through Orbax and TensorStore.
DAMAGE = (ValueError, OSError, KeyError)


class Checkpoints:
    """The checkpoints of one work directory. Use as a context: leaving waits for writes."""

    def __init__(self, workdir: epath.Path, config: ConfigDict | None = None):
        """Opens the directory: to write as `config.checkpoint` says, or only to read."""
        if config is None:
            options = ocp.CheckpointManagerOptions(read_only=True)
        else:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=config.checkpoint.keep_last,
                keep_period=config.checkpoint.keep_every_steps,
                cleanup_tmp_directories=True,
            )
        self._config = config
        self._manager = ocp.CheckpointManager(
            workdir / "checkpoints", options=options, item_names=("state", "config")
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def save(self, state: TrainState) -> None:
        """Starts writing the state as the checkpoint of its step, unless it is there."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                config=ocp.args.JsonSave(config_lib.to_json(self._config)),
            ),
        )

    def restore(
        self,
        abstract_state: Callable[[ConfigDict], TrainState],
        sharding: Sharding,
    ) -> tuple[ConfigDict, TrainState] | None:
        """Returns the newest checkpoint that can be read, or None if there is none.

        Args:
          abstract_state: configuration -> the shapes of its state; may raise `UserError`
            to refuse the configuration found.
          sharding: of every array restored.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                saved = self._restore_config(step)
            except DAMAGE as error:
                self._pass_over(step, error)
                continue
            target = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
                abstract_state(saved),
            )
            try:
                args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
                return saved, self._manager.restore(step, args=args)["state"]
            except DAMAGE as error:
                self._pass_over(step, error)
        return None

    def _restore_config(self, step: int) -> ConfigDict:
        args = ocp.args.Composite(config=ocp.args.JsonRestore())
        return config_lib.from_json(self._manager.restore(step, args=args)["config"])

    def _pass_over(self, step: int, error: Exception) -> None:
        log.warning(
            "checkpoint of step %d is damaged (%s): using the one before it",
            step,
            str(error).splitlines()[0][:200],
        )
        if self._config is not None:
            self._manager.delete(step)  # its step will be written again
