"""`eval --shortlist 50` among a thousand classes against the evaluation of all, by the time that processors spend on it.

Random weights say nothing about how often the two agree; the command says that of what was learned.
"""

from __future__ import annotations

import time
from statistics import mean

import torch

from cocoop_fast.evaluation.shortlist import ShortlistClassifier, sample_size
from cocoop_fast.methods.cocoop import CustomCLIP

CLASSES, SHORTLIST, IMAGES_IN_ALL = 1000, 50, 50_000  # ImageNet's


def test_shortlist(benchmark, problem_of):
    problem = problem_of(CLASSES, 8)
    model = CustomCLIP(problem.cfg, problem.spec.classes, problem.clip_model)
    model.prompt_learner.load_state_dict(problem.learned, strict=False)
    model.eval()
    shortlisted, tree = ShortlistClassifier(model, SHORTLIST), model.tree_encoder.tree
    x = problem.features
    logits = shortlisted.forward_features(x)  # the first call encodes all classes once
    rows = [tree.n_ctx + len(tree.ancestors(tree.eot[chosen.isfinite()])) for chosen in logits]
    with torch.no_grad():
        exact = model.forward_features(x[:2])
    chosen = logits[:2].isfinite()
    torch.testing.assert_close(logits[:2][chosen], exact[chosen], rtol=1e-4, atol=1e-4)
    all_seconds: list[float] = []

    def time_all_classes() -> None:
        before = time.process_time()
        with torch.no_grad():
            model.forward_features(x[:2])
        all_seconds.append((time.process_time() - before) / 2)

    seconds: list[float] = []

    def by_shortlist() -> None:
        before = time.process_time()
        shortlisted.forward_features(x)
        seconds.append((time.process_time() - before) / len(x))

    benchmark.group = f"evaluation by shortlist, {CLASSES} classes"
    benchmark.pedantic(by_shortlist, setup=time_all_classes, rounds=5, warmup_rounds=0)
    exactly, quickly = min(all_seconds), min(seconds)
    compared = sample_size(IMAGES_IN_ALL, SHORTLIST, CLASSES)
    whole = IMAGES_IN_ALL * quickly + (compared + 1) * exactly
    benchmark.extra_info |= {
        "classes": CLASSES,
        "shortlist": SHORTLIST,
        "rows": mean(rows),
        "rows_of_all": tree.rows,
        "cpu_seconds_per_image": quickly,
        "cpu_seconds_per_image_of_all": exactly,
        "faster_per_image": exactly / quickly,
        "faster_with_comparison": IMAGES_IN_ALL * exactly / whole,
    }
