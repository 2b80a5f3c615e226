"""Other programs made to compute with this package.

``dassl``: CoOp's own ``train.py``, on Dassl. Each integration imports what it integrates with only when it is itself
imported. May import models and training; nothing imports it.
"""
