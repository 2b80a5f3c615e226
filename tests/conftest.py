"""One thread for the tests' tiny matrices: more would only wait for each other, above all on a busy machine.
Without a GPU, Triton's kernels run in its interpreter. Ctrl-C reaches tests that are started in the background, too.
"""

import os
import signal

# For the processes that tests start, too; read when torch loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import torch

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton loads

# A shell starts background processes with SIGINT ignored, and what they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
