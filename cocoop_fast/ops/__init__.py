"""The op table: one file an op, with its torch twin (the readable definition) and its faster backends.

May be imported by the text tower and the models. Imports nothing above it: only torch, the class tree, and
the kernels. `dispatch.py` says which backend serves a device and a dtype.
"""
