"""Accuracy of a model on a data set, its metrics, and the features of test images kept on disk.

May import ``distributed``, ``data`` and below. Imported by training and above.
"""
