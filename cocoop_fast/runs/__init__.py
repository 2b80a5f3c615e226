"""What a run leaves on a disk: its directory, checkpoints (the reference's too), logs, and the recipe it followed.

May import ``training`` and below. Imported by the experiments and above.
"""
