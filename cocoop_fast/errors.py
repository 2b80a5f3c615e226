"""The one exception that a user is meant to read, and the ones that mean a lack of memory."""

from __future__ import annotations

_LONGEST = 6000  # characters of a message: what it quotes from a file may be megabytes


class UserError(ValueError):
    """Bad input: one sentence that says what is wrong, where, and what to do about it.

    The command line prints it without a traceback and exits with ``exit_status``: 2 when the call itself is
    wrong (an unknown option, a class list that cannot be encoded), 1 when the call is right but its data fail
    (a damaged file, a directory without images).
    """

    def __init__(self, message: str, *, exit_status: int = 2) -> None:
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
        super().__init__(message)
        self.exit_status = exit_status


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the host. torch says the latter in the text of a ``RuntimeError``."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
