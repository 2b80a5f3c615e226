"""Bytes on a disk: files that are there whole or not at all, tensors, and torch's archives read without running them.

May import ``errors`` and ``readable``. Imported by everything that keeps files.
"""
