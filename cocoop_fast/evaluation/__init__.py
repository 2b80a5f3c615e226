"""Evaluation of a trained (or zero-shot) model, and prediction on single images.

May import ``data`` and the models; ``training`` and the command line import it. One exception: ``predict``
reads what a finished run left, and so imports ``training``, which does not import ``predict``.
"""
