"""The log of a run, as a file in its work directory."""

import logging
from types import TracebackType

import jax
from etils import epath

from drl_jax.errors import Interrupted, UserError, as_user_error

LOGGER = logging.getLogger("drl_jax")  # of the whole package


class LogFile(logging.Handler):
    """Appends the log of the package to a file. Use it as a context manager.

    Lines are collected until `open` names the file, so that a run that is refused leaves no
    file behind. An error that ends the context is the last line. If the file cannot be written,
    one line of the log says so, and the program continues without it.
    """

    def __init__(self) -> None:
        """Prepares a log without a file."""
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self._path: epath.Path | None = None
        self._lines: list[str] = []

    def __enter__(self) -> "LogFile":
        LOGGER.addHandler(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, UserError | Interrupted):
            words = f"error: {error}" if isinstance(error, UserError) else str(error)
            self.emit(logging.LogRecord("", logging.INFO, "", 0, words, None, None))
        LOGGER.removeHandler(self)

    def open(self, path: epath.Path) -> None:
        """Starts writing. Of several processes, only process 0 does.

        Args:
          path: path of the file; its previous content is kept.
        """
        if not jax.process_index():
            self._path = path
            self._write()

    def emit(self, record: logging.LogRecord) -> None:
        """Adds a line; `logging` calls this method."""
        self._lines.append(f"{self.format(record)}\n")
        self._write()

    def _write(self) -> None:
        """Writes the lines that have not been written."""
        if self._path is None or not self._lines:
            return
        path, lines, self._lines = self._path, self._lines, []
        try:
            with as_user_error(f"cannot write to {path}"), path.open("a") as file:
                file.write("".join(lines))
        except UserError as error:
            self._path = None
            LOGGER.warning("%s: the log is no longer written there", error)
