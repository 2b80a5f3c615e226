"""Other programs made to compute with this package; ``dassl``: CoOp's own ``train.py``, on Dassl.

May import everything but the command line; nothing imports it. Each imports what it integrates with when it is itself
imported.
"""
