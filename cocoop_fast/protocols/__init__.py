"""The paper's experiments: which cells (method x data set x seed) they need, and the tables made of them.

May import ``experiments`` and below. Imported by the reports and the command line. Read in this order: protocol, cells,
run_cell, launchers, processes, published, table, outputs.
"""
