"""What a run will cost, before it is run: ``cocoop-fast plan``.

``sizes`` reads a text tower and a class tree off their shapes, ``buffers`` and ``cost`` say what a step allocates and
computes (pure functions of those sizes), ``devices`` and ``measure`` know how fast a GPU of the table or this machine
does such things, ``predict`` puts both together. What comes out is a prediction and is called one everywhere.
"""
