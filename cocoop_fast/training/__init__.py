"""The training loop alone: steps, schedules, precision, features ahead of the steps. It writes no run directory.

May import ``evaluation``, ``data`` and below. Imported by ``runs``, the experiments and the measurements.
"""
