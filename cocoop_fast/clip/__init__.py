"""A CLIP as we use it: a read-only view, loading, weight files, the CLIP of the demonstration, the tokenizer.

May import ``config``, ``files`` and below. Imported by everything that encodes text or images.
"""
