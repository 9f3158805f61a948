"""What we say to the operator while a machine runs, through the standard library's logging.

    log = Log(__name__)
    log.warning("%s: ...", name)

Logging is imported with the first message: with what it needs itself it takes 5 ms, and most machines start without a
word. `kvmpy run` does so as soon as the guest runs (`get_ready`), for no device's handler may wait for an import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import logging

CALLER: Final = 2  # the frame that a record names is that of who called the method

_to_stderr = False


class Log:
    """`logging.getLogger`, in time."""

    def __init__(self, name: str) -> None:
        self._name = name

    def info(self, message: str, *args: object) -> None:
        self._logger().info(message, *args, stacklevel=CALLER)

    def warning(self, message: str, *args: object) -> None:
        self._logger().warning(message, *args, stacklevel=CALLER)

    def error(self, message: str, *args: object, exc_info: BaseException | None = None) -> None:
        """With the traceback of ``exc_info``, if given."""
        self._logger().error(message, *args, exc_info=exc_info, stacklevel=CALLER)

    def exception(self, message: str, *args: object) -> None:
        """With the traceback of the exception that is being handled."""
        self._logger().exception(message, *args, stacklevel=CALLER)

    def _logger(self) -> logging.Logger:
        get_ready()
        import logging

        return logging.getLogger(self._name)


def to_stderr() -> None:
    """From now on messages go to standard error, unless the process has another place for them."""
    global _to_stderr  # of the process, as the handlers are
    _to_stderr = True


def get_ready() -> None:
    """Have logging imported. Any thread, any number of times."""
    import logging

    if _to_stderr:
        logging.basicConfig(format="kvmpy: %(message)s", level=logging.INFO)
