"""Other programs made to compute with this package. ``dassl``: CoOp's own ``train.py``, on Dassl; ``scikit_learn``: an
estimator.

May import everything but the command line; nothing imports it. Each imports what it integrates with when it is itself
imported.
"""
