"""Text features of K prompts for B contexts: the encoder, its towers, their memory, and what is left out or cut up.

May import ``ops``, ``prompts`` and below. Imported by the methods.
"""
