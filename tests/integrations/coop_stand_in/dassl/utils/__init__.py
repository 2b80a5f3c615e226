import sys
from pathlib import Path

from .registry import Registry  # noqa: F401
from .torchtools import (  # noqa: F401
    load_checkpoint,
    load_pretrained_weights,
    resume_from_checkpoint,
    save_checkpoint,
)


class Logger:
    """Writes what is printed into a file as well."""

    def __init__(self, path):
        self.console = sys.stdout
        self.file = Path(path).open("w")  # noqa: SIM115  # for as long as the process lives

    def write(self, text):
        self.console.write(text)
        self.file.write(text)

    def flush(self):
        self.console.flush()
        self.file.flush()


def setup_logger(output):
    path = Path(output, "log.txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path = path.with_name("log.txt-later")
    sys.stdout = Logger(path)
