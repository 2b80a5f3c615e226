"""From class names to rows: tokens, the layout of a prompt, the prefix tree of all prompts.

May import ``clip`` and below. Imported by the operations, the engine and the methods.
"""
