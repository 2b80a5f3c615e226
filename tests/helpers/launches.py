"""What a GPU would be given, noted in Triton's interpreter."""

from __future__ import annotations

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter


class Launches(TorchDispatchMode):
    """Every launch: Triton's kernels, and torch's operations but for views and allocations."""

    def __init__(self, monkeypatch, *, run):
        super().__init__()
        self.seen = Counter()
        self.in_kernel = False
        launch = interpreter.GridExecutor.__call__

        def noted(executor, *arguments, **options):
            self.seen[executor.fn.__name__] += 1
            self.in_kernel = True
            try:
                return launch(executor, *arguments, **options) if run else None
            finally:
                self.in_kernel = False

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", noted)

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        returns = operation._schema.returns
        view = any(one.alias_info is not None and not one.alias_info.is_write for one in returns)
        name = operation.overloadpacket.__name__
        if not (self.in_kernel or view or "empty" in name):
            self.seen[name] += 1
            # A GEMM that adds a matrix would copy it into its result first: a launch that no count of calls shows.
            assert name != "addmm" or arguments[0].ndim == 1, "a bias is a vector"
        return operation(*arguments, **(options or {}))

    def count(self):
        return self.seen
