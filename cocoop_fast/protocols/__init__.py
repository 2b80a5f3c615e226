"""The paper's experiments: which cells (method x data set x seed) they need, and the tables made of them.

May import ``training``, ``evaluation`` and ``data``; the command line imports it. Read in this order: protocol,
cells, run_cell, processes, published, table, outputs.
"""
