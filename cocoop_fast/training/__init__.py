"""Training: recipes, the learning-rate schedule, the loop, checkpoints, run directories and whole experiments.

May import ``data``, ``evaluation`` and the models; only the command line imports it. ``trainer.fit`` needs no
files; ``experiment.run`` adds them. Read in this order: recipe, schedule, trainer, checkpoint, run_directory,
run_log, experiment; reference_checkpoint stands apart.
"""
