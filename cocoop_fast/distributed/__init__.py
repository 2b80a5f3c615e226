"""One run on several processes: ``ranks`` is what each of them knows, ``launch`` joins them, ``heartbeat`` notices
when one ends, ``class_shards`` shares a model's classes out.

May import ``methods`` and below. Imported by evaluation, training and above.
"""
