"""The engine against what others would write: contestants, their work, agreement, time, memory, plots.

Serves ``cocoop-fast bench``, benchmarks/ and tools/. Imports the library; nothing of the library imports it.
In reading order: ``problem`` (what is encoded), ``work`` (rows, FLOPs, bytes), ``contestants`` with ``dense``,
``padding_free`` and ``floor``, ``measure``, ``memory``, ``compare`` (all of it together), ``plot``, ``machine``.
"""
