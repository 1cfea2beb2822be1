"""Checkpoints: the training state and the configuration, written by Orbax.

Saving is asynchronous and atomic. A checkpoint that is whole is sealed with the checksums of
its files, and only one whose files still agree with its seal is read: without it, a flipped
bit would be restored in silence. What does not agree (its disk failed, its copy was cut
short) is passed over, with a word, for the one before it.
"""

import contextlib
import json
import logging
import zlib
from collections.abc import Callable, Iterator

import jax
import orbax.checkpoint as ocp
from etils import epath
from google.api_core.exceptions import GoogleAPIError
from jax.sharding import Sharding
from ml_collections import ConfigDict

from drl_jax import config as config_lib
from drl_jax import processes
from drl_jax.errors import UserError
from drl_jax.train_state import TrainState

log = logging.getLogger(__name__)

ITEMS = ("state", "config")  # of a checkpoint: each has a folder in it
SEAL = "crc32.json"  # beside them: the checksums of all their files
DAMAGED = "damaged"  # ends the name of a checkpoint that was set aside


class Checkpoints:
    """The checkpoints of one work directory. Use as a context: leaving waits for writes."""

    def __init__(self, workdir: epath.Path, config: ConfigDict | None = None):
        """Opens the directory: to write as `config.checkpoint` says, or only to read."""
        if config is None:
            options = ocp.CheckpointManagerOptions(
                read_only=True, save_interval_steps=0, create=False
            )
        else:
            policies = ocp.checkpoint_managers
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(config.checkpoint.keep_last),
                        policies.EveryNSteps(config.checkpoint.keep_every_steps),
                    ]
                ),
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(
                    post_finalization_callback=self._seal,
                    # Where a folder cannot be made, its thread would wait for minutes.
                    create_directories_asynchronously=False,
                ),
            )
        folder = workdir / "checkpoints"
        # Orbax insists on it. (etils takes an address such as gs:// for absolute already.)
        self._folder = folder if folder.is_absolute() else folder.absolute()
        self._config = config
        self._saving: int | None = None
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=ITEMS)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        with self._writing():
            self._manager.close()

    def save(self, state: TrainState) -> None:
        """Starts writing the state as the checkpoint of its step, unless it is there.

        Raises:
          UserError: if this one, or the one before, cannot be written.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self.wait()  # for the seal of the one before
        with self._writing():
            self._saving = step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    config=ocp.args.JsonSave(config_lib.to_json(self._config)),
                ),
            )

    def wait(self) -> None:
        """Waits for what is being written.

        Raises:
          UserError: if it cannot be.
        """
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Where errors of earlier writes arrive, too: they are made in the background."""
        try:
            yield
        # The disk's, and the bucket's; TensorStore makes ValueError of all.
        except (OSError, ValueError, GoogleAPIError) as error:
            reason = ": ".join(str(error).split(": ")[-2:])  # before it, every layer's path
            raise UserError(f"cannot write checkpoints to {self._folder}: {reason}") from error

    def restore(
        self,
        abstract_state: Callable[[ConfigDict], TrainState],
        sharding: Callable[[tuple[int, ...]], Sharding],
    ) -> tuple[ConfigDict, TrainState] | None:
        """Returns the newest undamaged checkpoint, or None if there never was one.

        Args:
          abstract_state: configuration -> the shapes of its state; may raise `UserError`
            to refuse the configuration found.
          sharding: of an array of this shape.

        Raises:
          UserError: if all checkpoints are damaged, or this one fits no network of ours.
        """
        faults: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            is_first = jax.process_index() == 0
            fault = processes.from_first(
                find_fault(self._folder / str(step)) if is_first else None
            )
            if not fault:
                restored = self._read(step, abstract_state, sharding)
                for damaged, reason in faults.items():
                    log.warning(
                        "checkpoint of step %d is damaged (%s): using that of step %d",
                        *(damaged, reason, step),
                    )
                self._set_aside(faults)
                return restored
            faults[step] = fault
        if faults:
            newest = max(faults)
            raise UserError(
                f"every checkpoint in {self._folder} is damaged (of step {newest}: "
                f"{faults[newest]}): put back a copy, or train in a new --workdir"
            )
        return None

    def _read(
        self,
        step: int,
        abstract_state: Callable[[ConfigDict], TrainState],
        sharding: Callable[[tuple[int, ...]], Sharding],
    ) -> tuple[ConfigDict, TrainState]:
        config_args = ocp.args.Composite(config=ocp.args.JsonRestore())
        config = config_lib.from_json(self._manager.restore(step, args=config_args)["config"])
        target = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding(a.shape)),
            abstract_state(config),
        )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        try:
            return config, self._manager.restore(step, args=args)["state"]
        except ValueError as error:  # it is undamaged, so names or shapes differ
            raise UserError(
                f"the checkpoint of step {step} in {self._folder} does not fit the network of "
                "its config: was it made by another version of this program?"
            ) from error

    def _set_aside(self, damaged: dict[int, str]) -> None:
        """Renames what cannot be read, so that its step can be written again."""
        if self._config is None or not damaged:
            return
        if jax.process_index() == 0:
            for step in damaged:
                kept = self._folder / f"{step}.{DAMAGED}"
                if kept.exists():
                    kept.rmtree()
                (self._folder / str(step)).rename(kept)
        processes.from_first(None)  # the others wait for that
        self._manager.reload()

    def _seal(self) -> None:
        """Runs in Orbax's thread when all is written, before the checkpoint gets its name."""
        if jax.process_index():
            return
        for folder in self._folder.glob(f"{self._saving}*"):
            name, _, rest = folder.name.partition(".")
            if name == str(self._saving) and rest != DAMAGED:
                (folder / SEAL).write_text(json.dumps(checksums(folder)))


def checksums(folder: epath.Path) -> dict[str, int]:
    """Returns the CRC-32 of every file of a checkpoint's items, by relative path."""
    return {
        (parent / file).relative_to(folder).as_posix(): zlib.crc32((parent / file).read_bytes())
        for item in ITEMS
        for parent, _, files in (folder / item).walk()
        for file in files
    }


def find_fault(folder: epath.Path) -> str | None:
    """Returns what is wrong with the files of a checkpoint, if anything is."""
    try:
        sealed = json.loads((folder / SEAL).read_text())
        found = checksums(folder)
    except (OSError, ValueError) as error:
        return f"{SEAL} is missing or unreadable: {error}"
    wrong = [name for name, checksum in sealed.items() if found.get(name) != checksum]
    return f"{wrong[0]} is missing or altered" if wrong else None
