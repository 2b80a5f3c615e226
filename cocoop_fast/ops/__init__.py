"""The operations. ``table`` says what a backend offers; ``<op>`` has the readable twin of one operation; ``cpu``,
``triton`` and ``cuda`` launch kernels; ``shapes`` computes nothing and knows the sizes.

May import ``prompts``, ``clip`` and below, and the kernels. Imported by the engine and the methods.
"""
