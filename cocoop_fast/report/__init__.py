"""Pages about runs, for people: ``cocoop-fast report``.

May import ``protocols`` and below. Imported by the command line. Read in this order: history, sources (what runs left on
disk), inspection, contexts, cost (what their models do), style, figures (matplotlib), chapters (what belongs together),
page (HTML), make_report. ``tensorboard`` stands alone: an observer of training.
"""
