"""One thread for the tests' tiny matrices: more would only wait for each other, above all on a busy machine."""

import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # for the processes that tests start, too; read when torch loads
