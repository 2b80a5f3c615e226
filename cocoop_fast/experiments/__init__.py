"""Whole experiments: train, evaluate and compare; predict; take over a run of the reference.

May import ``runs``, ``measure`` and below. Imported by the protocols and above.
"""
