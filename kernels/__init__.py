"""Triton kernels and their launchers, one file an operation; installed as `cocoop_fast.kernels`.

May import torch and triton, and nothing of cocoop_fast; imported by `cocoop_fast.ops` alone, and only once an operation
runs on a GPU (or under `TRITON_INTERPRET=1`). Autograd, modules and the choice of a backend are not here.
"""
