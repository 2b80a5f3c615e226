"""Train the demo CLIP on glyphs and write cocoop_fast/assets/demo_clip.safetensors.

    python tools/pretrain_demo_clip.py                  # at most a quarter of an hour on two cores
    python tools/pretrain_demo_clip.py --evaluate       # score the weights in place, train nothing

Glyphs come from two sources: text faces bundled with matplotlib, drawn with Pillow, and stroke skeletons of
digits and letters (below), bent at random. Each glyph is stored as a 32x32 bitmap tightly fitted to its box;
during training it is moved, averaged down (most often to 8x8, as the handwritten digits of scikit-learn were
scanned) and brought back to 32x32. Captions name the glyph and sometimes its style: "a photo of a digit
zero.", "a thin handwritten letter k.". The loss is CLIP's, symmetric and contrastive, where every caption
that is true of an image counts as its positive.

No handwritten digit of scikit-learn is trained on. Its first 800 images (the development split) may be looked
at while choosing settings; the others are scored once, by --evaluate.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from PIL import Image, ImageDraw, ImageFont
from pretraining import contrastive_loss, make_optimizer, move_average, options, uniform
from torch import Tensor, nn

from cocoop_fast.clip.demo import (
    DEMO_CLIPS,
    load_demo_clip,
    save_demo_clip,
)

DEMO = DEMO_CLIPS["demo"]
SIZE = DEMO.vision["image_size"]

# ---------------------------------------------------------------------------------------------------------
# Classes. Left out: letters that, once fitted to their box, look like a digit or like another letter
# (o O l I i z s S g q b ...).

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
LOWER = "acdefhkmnprtuvwxy"
UPPER = "ABDEFGHLMNQRTY"
CHARACTERS = "0123456789" + LOWER + UPPER
DEVELOPMENT_IMAGES = 800


def class_names(character: str) -> list[str]:
    """The names of a class; the first is the one it is evaluated with."""
    if character.isdigit():
        word = DIGITS[int(character)]
        return [
            f"digit {word}",
            f"number {word}",
            f"numeral {word}",
            f"figure {word}",
            f"digit {character}",
            word,
        ]
    if character.isupper():
        letter = character.lower()
        return [f"capital letter {letter}", f"uppercase letter {letter}", f"big letter {letter}"]
    return [f"letter {character}", f"small letter {character}", f"lowercase letter {character}"]


# ---------------------------------------------------------------------------------------------------------
# Captions. A template is true of an image that has all the template's tags.

HAND, PRINT, BOLD, THIN, BLURRY, SHARP, SLANTED, UPRIGHT = (1 << i for i in range(8))
PLAIN_TEMPLATES = [
    "a photo of a {}.",
    "a photo of the {}.",
    "a photo of one {}.",
    "a photo of a {}",
    "a picture of a {}.",
    "an image of a {}.",
    "an image of the {}.",
    "a scan of a {}.",
    "a drawing of a {}.",
    "a drawing of the {}.",
    "a good photo of a {}.",
    "a close-up photo of a {}.",
    "a cropped photo of the {}.",
    "a black and white photo of a {}.",
    "an example of a {}.",
    "a shape of a {}.",
    "a {}.",
    "the {}.",
    "one {}.",
    "{}.",
    "{}",
    "a white {}.",
    "this is a {}.",
    "there is a {} in the image.",
    "a {} on a black background.",
    "the {} in white ink.",
    "a picture that shows, in white ink on a black background, a {}.",
    "this is one of many small images of digits and letters, and what it shows is the {}.",
    "from a long collection of small pictures of digits and letters in white on black, a photo of a {}.",
]
STYLED_TEMPLATES = [
    ("a handwritten {}.", HAND),
    ("a photo of a handwritten {}.", HAND),
    ("a scan of a handwritten {}.", HAND),
    ("a {} written by hand.", HAND),
    ("a {} drawn with a pen.", HAND),
    ("a printed {}.", PRINT),
    ("a photo of a printed {}.", PRINT),
    ("a {} typed in a font.", PRINT),
    ("a bold {}.", BOLD),
    ("a photo of a bold {}.", BOLD),
    ("a thick {}.", BOLD),
    ("a thin {}.", THIN),
    ("a photo of a thin {}.", THIN),
    ("a light {}.", THIN),
    ("a blurry photo of a {}.", BLURRY),
    ("a low resolution photo of a {}.", BLURRY),
    ("a pixelated scan of a {}.", BLURRY),
    ("a tiny {}.", BLURRY),
    ("a sharp photo of a {}.", SHARP),
    ("a high resolution photo of a {}.", SHARP),
    ("a large {}.", SHARP),
    ("a slanted {}.", SLANTED),
    ("a photo of a slanted {}.", SLANTED),
    ("an upright {}.", UPRIGHT),
    ("a photo of an upright {}.", UPRIGHT),
    ("a blurry scan of a handwritten {}.", BLURRY | HAND),
    ("a sharp scan of a printed {}.", SHARP | PRINT),
    ("a bold handwritten {}.", BOLD | HAND),
    ("a thin handwritten {}.", THIN | HAND),
    ("a slanted printed {}.", SLANTED | PRINT),
    ("a tiny bold {}.", BLURRY | BOLD),
]
BOLD_ABOVE, THIN_BELOW = 0.36, 0.25  # share of ink in the 32x32 box
SLANTED_ABOVE = 0.15  # horizontal shear
STYLED_SHARE = 0.4


@dataclass
class Captions:
    """All captions of all classes, encoded in the vocabulary that they use.

    Attributes:
        tokens: (classes, templates, names, length) int64 indices into `token_ids`; a class with fewer names
            than another repeats them.
        tags: (templates,) int64, what each template says of an image's style.
        token_ids: (n,) int64, sorted ids of open_clip's vocabulary. The order is kept, so EOT is still the
            largest index of a caption.
    """

    tokens: Tensor
    tags: Tensor
    token_ids: Tensor

    @classmethod
    def build(cls) -> Captions:
        templates = PLAIN_TEMPLATES + [template for template, _ in STYLED_TEMPLATES]
        tags = [0] * len(PLAIN_TEMPLATES) + [tag for _, tag in STYLED_TEMPLATES]
        names = [class_names(character) for character in CHARACTERS]
        most = max(map(len, names))
        text = [t.format((n * most)[i]) for n in names for t in templates for i in range(most)]
        tokens = open_clip.tokenize(text)
        tokens = tokens[:, : int((tokens != 0).sum(1).max())]
        token_ids, tokens = tokens.unique(return_inverse=True)
        return cls(tokens.view(len(names), len(templates), most, -1), torch.tensor(tags), token_ids)

    def draw(self, classes: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """One caption a class index: (n, tokens) and its tags (n,). The first name and template lead."""
        n, n_plain = len(classes), len(PLAIN_TEMPLATES)
        plain = torch.randint(0, n_plain, (n,), generator=rng)
        plain[torch.rand(n, generator=rng) < 0.2] = 0
        styled = torch.randint(n_plain, len(self.tags), (n,), generator=rng)
        template = torch.where(torch.rand(n, generator=rng) < STYLED_SHARE, styled, plain)
        name = torch.randint(0, self.tokens.shape[2], (n,), generator=rng)
        name[torch.rand(n, generator=rng) < 0.4] = 0
        tokens = self.tokens[classes, template, name]
        return tokens[:, : int((tokens != 0).sum(1).max())], self.tags[template]


# ---------------------------------------------------------------------------------------------------------
# Stroke skeletons: every variant of a character is a list of strokes, every stroke a list of (x, y) with y
# down, in a unit box. Strokes are smooth curves through their points; a corner is where one stroke ends and
# the next begins. "L" before a stroke makes it straight from point to point.


def _ellipse(cx: float, cy: float, rx: float, ry: float, start: float = -90, sweep: float = 360, n: int = 9):
    angles = [math.radians(start + sweep * i / (n - 1)) for i in range(n)]
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


def _line(*points):
    return ("L", *points)


SKELETONS: dict[str, list[list]] = {
    "0": [
        [_ellipse(0.5, 0.5, 0.38, 0.5)],
        [_ellipse(0.5, 0.5, 0.3, 0.5, -60, 350)],
        [_ellipse(0.5, 0.5, 0.4, 0.5, -110, -375)],
        [_ellipse(0.5, 0.5, 0.33, 0.5, -80, -340)],
    ],
    "1": [
        [_line((0.5, 0), (0.5, 1))],
        [_line((0.2, 0.3), (0.6, 0), (0.6, 1))],
        [_line((0.05, 0.42), (0.55, 0), (0.55, 1))],
        [_line((0.0, 0.5), (0.5, 0), (0.45, 1))],
        [_line((0.2, 0.25), (0.55, 0), (0.55, 1)), _line((0.2, 1), (0.9, 1))],
        [_line((0.1, 0.35), (0.5, 0), (0.5, 1)), _line((0.25, 1), (0.75, 1))],
    ],
    "2": [
        [[(0.05, 0.25), (0.2, 0.05), (0.5, 0), (0.8, 0.2), (0.7, 0.48), (0.4, 0.74), (0.05, 1)],
         _line((0.05, 1), (0.95, 1))],
        [[(0.05, 0.15), (0.4, 0), (0.8, 0.15), (0.75, 0.45), (0.4, 0.8), (0.12, 1), (0.0, 0.88), (0.2, 0.78),
          (0.55, 0.92), (1, 0.97)]],
        [[(0.1, 0.1), (0.5, 0), (0.8, 0.15), (0.7, 0.45), (0.1, 0.98)], [(0.1, 0.98), (0.4, 0.92), (0.9, 1)]],
        [_line((0.1, 0.03), (0.75, 0.03)), [(0.75, 0.03), (0.75, 0.35), (0.45, 0.7), (0.05, 1)],
         _line((0.05, 1), (0.9, 1))],
    ],
    "3": [
        [[(0.1, 0.12), (0.4, 0), (0.8, 0.12), (0.75, 0.35), (0.35, 0.47)],
         [(0.35, 0.47), (0.8, 0.55), (0.88, 0.8), (0.5, 1), (0.05, 0.9)]],
        [_line((0.1, 0.02), (0.85, 0.02), (0.4, 0.4)),
         [(0.4, 0.4), (0.8, 0.5), (0.9, 0.78), (0.5, 1), (0.05, 0.92)]],
        [[(0.1, 0.05), (0.5, 0), (0.82, 0.2), (0.6, 0.43), (0.85, 0.7), (0.6, 0.97), (0.1, 0.98)]],
        [[(0.1, 0.1), (0.5, 0), (0.8, 0.18), (0.65, 0.4), (0.4, 0.48), (0.55, 0.5), (0.85, 0.65),
          (0.75, 0.92), (0.4, 1), (0.1, 0.9)]],
    ],
    "4": [
        [_line((0.3, 0), (0.05, 0.55), (0.95, 0.55)), _line((0.7, 0.25), (0.65, 1))],
        [_line((0.65, 1), (0.65, 0), (0, 0.65), (1, 0.65))],
        [[(0.15, 0), (0.1, 0.4), (0.4, 0.52), (0.85, 0.42)], _line((0.85, 0), (0.78, 1))],
        [_line((0.4, 0), (0.1, 0.6), (0.95, 0.6)), _line((0.6, 0.35), (0.5, 1))],
        [_line((0.5, 0), (0.05, 0.5), (0.9, 0.55)), _line((0.65, 0.2), (0.5, 1))],
        [[(0.45, 0), (0.2, 0.3), (0.1, 0.6), (0.5, 0.62), (0.95, 0.55)], _line((0.65, 0.3), (0.45, 1))],
    ],
    "5": [
        [_line((0.9, 0), (0.2, 0), (0.15, 0.42)),
         [(0.15, 0.42), (0.5, 0.33), (0.88, 0.55), (0.8, 0.88), (0.45, 1), (0.05, 0.92)]],
        [[(0.85, 0.03), (0.35, 0.05), (0.15, 0.3), (0.5, 0.45), (0.85, 0.65), (0.65, 0.95), (0.1, 0.98)]],
        [_line((0.2, 0.02), (0.15, 0.45)), [(0.15, 0.45), (0.6, 0.4), (0.85, 0.65), (0.65, 0.95),
          (0.1, 0.97)], _line((0.2, 0.02), (0.95, 0.0))],
        [_line((0.8, 0), (0.25, 0.05), (0.1, 0.5), (0.55, 0.45)),
         [(0.55, 0.45), (0.75, 0.6), (0.7, 0.85), (0.4, 1), (0.1, 1)]],
    ],
    "6": [
        [[(0.75, 0), (0.35, 0.2), (0.08, 0.6), (0.2, 0.93), (0.55, 1), (0.88, 0.8), (0.75, 0.56), (0.4, 0.52),
          (0.12, 0.72)]],
        [[(0.4, 0), (0.15, 0.4), (0.1, 0.75), (0.35, 1), (0.75, 0.95), (0.85, 0.72), (0.6, 0.55), (0.3, 0.65),
          (0.15, 0.85)]],
        [[(0.5, 0), (0.2, 0.3), (0.1, 0.7), (0.35, 1), (0.8, 0.9), (0.75, 0.62), (0.4, 0.6), (0.15, 0.8)]],
        [_line((0.45, 0), (0.12, 0.6)), _ellipse(0.45, 0.76, 0.36, 0.24, 180, -360)],
    ],
    "7": [
        [_line((0.05, 0.02), (0.95, 0.02), (0.35, 1))],
        [_line((0.05, 0.02), (0.9, 0.02), (0.4, 1)), _line((0.2, 0.5), (0.9, 0.5))],
        [[(0.05, 0.12), (0.3, 0.02), (0.85, 0.03)], [(0.85, 0.03), (0.6, 0.4), (0.45, 1)]],
        [[(0.05, 0.05), (0.5, 0.06), (0.85, 0.02)], [(0.85, 0.02), (0.65, 0.4), (0.4, 1)],
         _line((0.25, 0.55), (0.95, 0.45))],
        [_line((0.1, 0.2), (0.1, 0.02), (0.9, 0.02), (0.45, 1)), _line((0.3, 0.48), (0.9, 0.48))],
    ],
    "8": [
        [[(0.8, 0.15), (0.5, 0), (0.18, 0.18), (0.45, 0.45), (0.82, 0.75), (0.5, 1), (0.15, 0.78),
          (0.5, 0.48), (0.8, 0.22), (0.8, 0.15)]],
        [_ellipse(0.5, 0.25, 0.3, 0.25, 90), _ellipse(0.5, 0.74, 0.36, 0.26)],
        [[(0.9, 0.1), (0.55, 0), (0.2, 0.15), (0.4, 0.42), (0.75, 0.7), (0.5, 1), (0.2, 0.8), (0.45, 0.5),
          (0.9, 0.05)]],
        [_ellipse(0.5, 0.26, 0.34, 0.26, 90), _ellipse(0.45, 0.76, 0.27, 0.24)],
        [[(0.15, 0.05), (0.2, 0.35), (0.6, 0.55), (0.75, 0.8), (0.45, 1), (0.2, 0.8), (0.45, 0.5),
          (0.8, 0.25), (0.7, 0.02), (0.15, 0.05)]],
    ],
    "9": [
        [[(0.85, 0.2), (0.5, 0), (0.12, 0.2), (0.25, 0.47), (0.6, 0.45), (0.85, 0.2)],
         [(0.85, 0.2), (0.82, 0.6), (0.65, 1)]],
        [[(0.85, 0.2), (0.5, 0), (0.12, 0.2), (0.25, 0.47), (0.6, 0.47), (0.85, 0.2)],
         [(0.85, 0.2), (0.88, 0.6), (0.7, 0.95), (0.35, 1), (0.08, 0.9)]],
        [_ellipse(0.45, 0.25, 0.33, 0.25, 0, -360), _line((0.78, 0.1), (0.78, 1))],
        [_ellipse(0.5, 0.26, 0.35, 0.26, -20, -360), _line((0.82, 0.2), (0.4, 1))],
        [[(0.8, 0.08), (0.4, 0), (0.1, 0.2), (0.3, 0.45), (0.75, 0.4)],
         [(0.8, 0.08), (0.88, 0.65), (0.6, 0.98), (0.1, 0.98)]],
        [[(0.75, 0.1), (0.35, 0.02), (0.12, 0.25), (0.4, 0.45), (0.7, 0.25)],
         [(0.7, 0.25), (0.9, 0.7), (0.75, 0.97), (0.1, 1)]],
    ],
    "a": [[_ellipse(0.45, 0.5, 0.4, 0.5, -30, -330), _line((0.85, 0.05), (0.85, 1))]],
    "c": [[_ellipse(0.5, 0.5, 0.45, 0.5, -45, -270)]],
    "d": [[_ellipse(0.4, 0.7, 0.35, 0.3, -30, -330), _line((0.78, 0), (0.78, 1))]],
    "e": [[[(0.1, 0.5), (0.85, 0.45), (0.75, 0.1), (0.4, 0.02), (0.08, 0.4), (0.25, 0.92), (0.6, 1),
           (0.9, 0.85)]]],
    "f": [[[(0.85, 0.1), (0.6, 0), (0.45, 0.2), (0.45, 1)], _line((0.15, 0.42), (0.8, 0.42))]],
    "h": [[_line((0.15, 0), (0.15, 1)), [(0.15, 0.6), (0.5, 0.42), (0.8, 0.6), (0.8, 1)]]],
    "k": [[_line((0.15, 0), (0.15, 1)), _line((0.8, 0.35), (0.15, 0.7), (0.85, 1))]],
    "m": [[_line((0.05, 0.05), (0.05, 1)), [(0.05, 0.3), (0.28, 0.05), (0.48, 0.3), (0.48, 1)],
           [(0.48, 0.3), (0.72, 0.05), (0.95, 0.3), (0.95, 1)]]],
    "n": [[_line((0.15, 0.05), (0.15, 1)), [(0.15, 0.4), (0.5, 0.05), (0.85, 0.35), (0.85, 1)]]],
    "p": [[_line((0.15, 0), (0.15, 1)), _ellipse(0.5, 0.3, 0.35, 0.3, 180)]],
    "r": [[_line((0.2, 0.05), (0.2, 1)), [(0.2, 0.4), (0.45, 0.1), (0.8, 0.1)]]],
    "t": [[[(0.45, 0), (0.45, 0.8), (0.6, 1), (0.85, 0.92)], _line((0.1, 0.32), (0.85, 0.32))]],
    "u": [[[(0.12, 0), (0.12, 0.7), (0.45, 1), (0.85, 0.7), (0.85, 0)]],
          [[(0.12, 0), (0.12, 0.7), (0.45, 1), (0.85, 0.7)], _line((0.85, 0), (0.85, 1))]],
    "v": [[_line((0.05, 0), (0.5, 1), (0.95, 0))]],
    "w": [[_line((0, 0), (0.25, 1), (0.5, 0.3), (0.75, 1), (1, 0))],
          [[(0, 0), (0.1, 0.8), (0.3, 1), (0.5, 0.4)], [(0.5, 0.4), (0.7, 1), (0.9, 0.8), (1, 0)]]],
    "x": [[_line((0.05, 0), (0.95, 1)), _line((0.95, 0), (0.05, 1))]],
    "y": [[_line((0.05, 0), (0.5, 0.55)), _line((0.95, 0), (0.2, 1))]],
    "A": [[_line((0, 1), (0.5, 0), (1, 1)), _line((0.2, 0.62), (0.8, 0.62))]],
    "B": [[_line((0.12, 0), (0.12, 1)), [(0.12, 0), (0.65, 0.02), (0.75, 0.25), (0.55, 0.46), (0.12, 0.47)],
           [(0.12, 0.47), (0.7, 0.5), (0.88, 0.75), (0.65, 0.98), (0.12, 1)]]],
    "D": [[_line((0.1, 0), (0.1, 1)), [(0.1, 0), (0.65, 0.05), (0.92, 0.5), (0.65, 0.95), (0.1, 1)]]],
    "E": [[_line((0.9, 0), (0.12, 0), (0.12, 1), (0.9, 1)), _line((0.12, 0.48), (0.75, 0.48))]],
    "F": [[_line((0.9, 0), (0.15, 0), (0.15, 1)), _line((0.15, 0.45), (0.75, 0.45))]],
    "G": [[_ellipse(0.5, 0.5, 0.45, 0.5, -45, -290), _line((0.5, 0.55), (0.95, 0.55), (0.95, 0.95))]],
    "H": [[_line((0.1, 0), (0.1, 1)), _line((0.9, 0), (0.9, 1)), _line((0.1, 0.5), (0.9, 0.5))]],
    "L": [[_line((0.15, 0), (0.15, 1), (0.9, 1))]],
    "M": [[_line((0.02, 1), (0.08, 0), (0.5, 0.65), (0.92, 0), (0.98, 1))]],
    "N": [[_line((0.1, 1), (0.1, 0), (0.9, 1), (0.9, 0))]],
    "Q": [[_ellipse(0.48, 0.48, 0.45, 0.48), _line((0.55, 0.65), (0.98, 1))]],
    "R": [[_line((0.12, 0), (0.12, 1)), [(0.12, 0), (0.65, 0.02), (0.82, 0.26), (0.6, 0.5), (0.12, 0.52)],
           _line((0.4, 0.52), (0.9, 1))]],
    "T": [[_line((0.02, 0.02), (0.98, 0.02)), _line((0.5, 0.02), (0.5, 1))]],
    "Y": [[_line((0.02, 0), (0.5, 0.5), (0.98, 0)), _line((0.5, 0.5), (0.5, 1))]],
}  # fmt: skip
CURVE_STEPS = 4  # straight pieces between two points of a smooth stroke
BOX = 32  # pixels of a stored glyph, each way


def curve_matrix(n_points: int, steps: int) -> Tensor:
    """Catmull-Rom interpolation as a matrix: (steps * (n_points - 1) + 1, n_points)."""
    rows = []
    for piece in range(n_points - 1):
        for t in (torch.arange(steps) / steps).tolist():
            weights = (
                (-t + 2 * t**2 - t**3) / 2,
                (2 - 5 * t**2 + 3 * t**3) / 2,
                (t + 4 * t**2 - 3 * t**3) / 2,
                (-(t**2) + t**3) / 2,
            )
            row = torch.zeros(n_points)
            for offset, weight in zip(range(-1, 3), weights, strict=True):
                row[min(max(piece + offset, 0), n_points - 1)] += weight
            rows.append(row)
    return torch.stack([*rows, F.one_hot(torch.tensor(n_points - 1), n_points).float()])


@dataclass
class Glyphs:
    """A pool: bitmaps (n, 32, 32) uint8 with ink 255; class index (n,); style tags (n,)."""

    bitmaps: Tensor
    classes: Tensor
    tags: Tensor

    @classmethod
    def cat(cls, pools: list[Glyphs]) -> Glyphs:
        return cls(*(torch.cat([getattr(p, f) for p in pools]) for f in ("bitmaps", "classes", "tags")))


def ink_tags(bitmaps: Tensor, slant: Tensor) -> Tensor:
    """Tags that can be read off a glyph: weight of the stroke and slant."""
    ink = bitmaps.float().mean((1, 2)) / 255
    tags = BOLD * (ink > BOLD_ABOVE) + THIN * (ink < THIN_BELOW)
    return tags + SLANTED * (slant.abs() > SLANTED_ABOVE) + UPRIGHT * (slant.abs() < SLANTED_ABOVE / 2)


def draw_strokes(strokes: list, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """`n` renderings of one skeleton, bent at random: bitmaps (n, 32, 32) uint8 and their slant (n,).

    Control points move independently and along a smooth random field; the whole is sheared and turned, fitted
    to the box (height first, as the scans were), and inked wherever a pixel is nearer to the line than half
    the pen's width.
    """
    wobble = uniform((n, 1, 1), 0.01, 0.06, rng)
    frequency = uniform((n, 2, 2), -4, 4, rng)
    phase = uniform((n, 1, 2), 0, 2 * math.pi, rng)
    bend = uniform((n, 1, 2), 0, 0.09, rng)
    starts, ends = [], []
    for stroke in strokes:
        straight = stroke[0] == "L"
        points = torch.tensor(stroke[1:] if straight else stroke, dtype=torch.float32)
        points = points + wobble * torch.randn(n, *points.shape, generator=rng)
        line = curve_matrix(points.shape[1], 2 if straight else CURVE_STEPS)
        if straight:  # halve each piece, so that the field can bend it
            line = line.new_zeros(line.shape)
            for i in range(line.shape[0]):
                line[i, i // 2] += 0.5
                line[i, (i + 1) // 2] += 0.5
        points = line @ points
        points = points + bend * torch.sin(points @ frequency + phase)
        starts.append(points[:, :-1])
        ends.append(points[:, 1:])
    a, b = torch.cat(starts, 1) - 0.5, torch.cat(ends, 1) - 0.5

    slant = (torch.randn(n, generator=rng) * 0.22).clamp(-0.5, 0.6)
    turn = torch.randn(n, generator=rng) * 0.09
    aspect = torch.exp(torch.randn(n, generator=rng) * 0.2) * 0.72
    one, zero = torch.ones(n), torch.zeros(n)
    shear = torch.stack([aspect, -slant, zero, one], -1).view(n, 2, 2)
    rotate = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], -1).view(n, 2, 2)
    matrix = (rotate @ shear).mT
    a, b = a @ matrix, b @ matrix

    pen = uniform((n, 1, 1), 2.8, 6.6, rng)
    low, high = torch.minimum(a, b).amin(1, True), torch.maximum(a, b).amax(1, True)
    scale = (BOX - pen) / (high - low).amax(2, True)
    centre = BOX / 2 + uniform((n, 1, 2), -1, 1, rng) * torch.tensor([2.0, 0.0])
    a, b = ((p - (low + high) / 2) * scale + centre for p in (a, b))

    grid = torch.arange(BOX) + 0.5
    pixels = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1).view(-1, 1, 2)
    along = (b - a)[:, None]
    offset = pixels - a[:, None]
    t = (offset * along).sum(-1) / along.square().sum(-1).clamp_min(1e-6)
    distance = (offset - t.clamp(0, 1)[..., None] * along).square().sum(-1).amin(-1).sqrt()
    ink = (pen[:, 0] / 2 - distance + 0.5).clamp(0, 1)
    return (ink * 255).view(n, BOX, BOX).to(torch.uint8), slant


def stroke_pool(characters: str, per_class: int, rng: torch.Generator, chunk: int = 64) -> Glyphs:
    pools = []
    for character in characters:
        variants = SKELETONS[character]
        counts = [len(part) for part in np.array_split(np.arange(per_class), len(variants))]
        for strokes, count in zip(variants, counts, strict=True):
            for start in range(0, count, chunk):
                bitmaps, slant = draw_strokes(strokes, min(chunk, count - start), rng)
                classes = torch.full((len(bitmaps),), CHARACTERS.index(character))
                pools.append(Glyphs(bitmaps, classes, HAND + ink_tags(bitmaps, slant)))
    return Glyphs.cat(pools)


# ---------------------------------------------------------------------------------------------------------
# Fonts bundled with matplotlib. All are text faces with digits and Latin letters; the validation faces are
# never trained on.

FONTS = [
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
    "cmr10",
    "cmb10",
    "cmmi10",
    "cmtt10",
]
VALIDATION_FONTS = ["cmss10", "cmti10", "DejaVuSerif-BoldItalic", "DejaVuSansMono-BoldOblique"]
MASTER = 64


def font_master(font: str, character: str) -> Tensor:
    """One glyph, cropped to its ink and centred in (64, 64), values 0..1."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    canvas = Image.new("L", (320, 320))
    ImageDraw.Draw(canvas).text((80, 60), character, font=ImageFont.truetype(str(path), 160), fill=255)
    glyph = canvas.crop(canvas.getbbox())
    scale = 48 / max(glyph.size)
    glyph = glyph.resize([max(1, round(side * scale)) for side in glyph.size], Image.Resampling.BOX)
    square = Image.new("L", (MASTER, MASTER))
    square.paste(glyph, ((MASTER - glyph.width) // 2, (MASTER - glyph.height) // 2))
    return torch.from_numpy(np.asarray(square, dtype=np.float32) / 255)


def font_pool(fonts: list[str], characters: str, per_glyph: int, rng: torch.Generator) -> Glyphs:
    """`per_glyph` deformations of every character in every font."""
    pools = []
    for font in fonts:
        italic = 0.2 if "Obli" in font or "Ita" in font or font in ("cmmi10", "cmti10") else 0.0
        masters = torch.stack([font_master(font, character) for character in characters])
        masters = masters.repeat_interleave(per_glyph, 0)[:, None]
        n = len(masters)
        slant = (torch.randn(n, generator=rng) * 0.15).clamp(-0.35, 0.35)
        turn = torch.randn(n, generator=rng) * 0.07
        wide = torch.exp(torch.randn(n, generator=rng) * 0.15)
        zero, one = torch.zeros(n), torch.ones(n)
        rotate = torch.stack([turn.cos(), -turn.sin(), zero, turn.sin(), turn.cos(), zero], -1).view(n, 2, 3)
        shear = torch.stack([wide, slant, zero, one], -1).view(n, 2, 2)
        grid = F.affine_grid(shear @ rotate, [n, 1, MASTER, MASTER], align_corners=False)
        field = torch.randn(n, 2, 4, 4, generator=rng) * uniform((n, 1, 1, 1), 0, 0.08, rng)
        field = F.interpolate(field, (MASTER, MASTER), mode="bicubic", align_corners=False)
        bent = F.grid_sample(masters, grid + field.permute(0, 2, 3, 1), align_corners=False)
        # A blur and a threshold make the stroke thinner or thicker.
        blurred = F.avg_pool2d(F.avg_pool2d(bent, 3, 1, 1), 3, 1, 1)
        bent = ((blurred - uniform((n, 1, 1, 1), 0.15, 0.6, rng)) * 4 + 0.5).clamp(0, 1)
        bitmaps = torch.stack([fit_box(glyph) for glyph in bent[:, 0]])
        classes = torch.tensor([CHARACTERS.index(c) for c in characters]).repeat_interleave(per_glyph)
        pools.append(Glyphs(bitmaps, classes, PRINT + ink_tags(bitmaps, slant + italic)))
    return Glyphs.cat(pools)


def fit_box(glyph: Tensor) -> Tensor:
    """Crop (64, 64) to its ink and fit it to the middle of the 32x32 box, aspect kept: uint8."""
    rows, columns = ((glyph > 0.3).any(axis).nonzero().flatten() for axis in (1, 0))
    if len(rows) == 0:
        return torch.zeros(BOX, BOX, dtype=torch.uint8)
    glyph = glyph[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = BOX / max(glyph.shape)
    height, width = (min(BOX, max(2, round(side * scale))) for side in glyph.shape)
    glyph = F.interpolate(glyph[None, None], (height, width), mode="bilinear", antialias=True)[0, 0]
    left, top = (BOX - width) // 2, (BOX - height) // 2
    return (F.pad(glyph, (left, BOX - width - left, top, BOX - height - top)) * 255).to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------
# From a bitmap to what the image tower sees.

RESOLUTIONS = {8: 0.6, 10: 0.1, 12: 0.1, 16: 0.1, 32: 0.1}


def normalise(images: Tensor) -> Tensor:
    """(n, 32, 32) in 0..1 -> (n, 3, 32, 32) as the demo CLIP's preprocessing gives them."""
    mean, std = (torch.full((3, 1, 1), value) for value in (DEMO.image_mean, DEMO.image_std))
    return (images[:, None] - mean) / std


def scan(bitmaps: Tensor, side: int) -> Tensor:
    """Average (n, 32, 32) in 0..1 down to `side` pixels, to 17 levels as in the scans, and back to 32."""
    small = F.interpolate(bitmaps[:, None], (side, side), mode="area")
    if side == 8:
        small = (small * 16).round() / 16
    full = F.interpolate(small, (BOX, BOX), mode="bicubic", antialias=True, align_corners=False)
    return full[:, 0].clamp(0, 1)


def augment(bitmaps: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Move, scan at a random resolution, change contrast: (n, 32, 32) uint8 -> images and resolution tags."""
    n = len(bitmaps)
    turn = torch.randn(n, generator=rng) * 0.06
    scale = uniform((n, 1), 0.9, 1.12, rng) * uniform((n, 2), 0.95, 1.05, rng)
    shift = torch.randn(n, 2, generator=rng) * 0.05
    rotate = (
        torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], -1).view(n, 2, 2) * scale[..., None]
    )
    still = torch.rand(n, generator=rng) < 0.3
    rotate[still] = torch.eye(2)
    shift[still] = 0
    grid = F.affine_grid(torch.cat([rotate, shift[..., None]], 2), [n, 1, BOX, BOX], align_corners=False)
    moved = F.grid_sample(bitmaps[:, None].float() / 255, grid, align_corners=False)[:, 0]

    images, tags, start = [], [], 0
    for side, share in RESOLUTIONS.items():
        stop = n if side == BOX else start + round(share * n)
        images.append(scan(moved[start:stop], side))
        tags.append(torch.full((stop - start,), BLURRY if side <= 10 else SHARP if side >= 16 else 0))
        start = stop
    images = torch.cat(images) * uniform((n, 1, 1), 0.8, 1.0, rng)
    images = (images + torch.randn(n, BOX, BOX, generator=rng) * 0.02).clamp(0, 1)
    return normalise(images), torch.cat(tags)


# ---------------------------------------------------------------------------------------------------------
# Training.


def encode_captions(model: CLIP, tokens: Tensor) -> Tensor:
    """Normalised text features, as `model.encode_text` gives them, without computing the padding.

    The transformer is causal, so nothing after EOT is read. Captions go in two groups by length, each as long
    as its longest.
    """
    ends = tokens.argmax(1)
    order = ends.argsort(stable=True)
    groups = order.tensor_split([round(0.75 * len(order))]) if len(order) > 16 else [order]
    features = []
    for group in groups:
        length = int(ends[group].max()) + 1
        x = model.token_embedding(tokens[group, :length]) + model.positional_embedding[:length]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
        features.append(x[torch.arange(len(group)), ends[group]] @ model.text_projection)
    return F.normalize(torch.cat(features)[order.argsort()], dim=-1)


def scanned_digits() -> tuple[Tensor, Tensor]:
    """The 1,797 handwritten digits of scikit-learn as model input, and their classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = []
    for image in digits.images:
        picture = Image.fromarray(np.round(image * 255 / 16).astype(np.uint8), "L")
        picture = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        images.append(torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255))
    return normalise(torch.stack(images)), torch.from_numpy(digits.target).long()


@torch.no_grad()
def report(model: CLIP, images: Tensor, classes: Tensor, token_ids: Tensor | None = None) -> str:
    """Zero-shot accuracies of "a photo of a <name>." on images of the digits.

    Args:
        model: its token embedding has the rows `token_ids`, or with None the whole vocabulary.
        images: (n, 3, 32, 32) normalised; those of other classes than digits are left out.
        classes: (n,) indices into CHARACTERS.
    """
    tokens = open_clip.tokenize([f"a photo of a {class_names(CHARACTERS[i])[0]}." for i in range(10)])
    if token_ids is not None:
        tokens = torch.searchsorted(token_ids, tokens)
    images, classes = images[classes < 10], classes[classes < 10]
    scores = (
        torch.cat([model.encode_image(part) for part in images.split(256)]) @ encode_captions(model, tokens).T
    )
    accuracies = []
    for first, last in ((0, 5), (5, 10), (0, 10)):
        mine = (classes >= first) & (classes < last)
        correct = first + scores[mine, first:last].argmax(1) == classes[mine]
        accuracies.append(correct.float().mean().item())
    return "base {:.1%}  new {:.1%}  all ten {:.1%}".format(*accuracies)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)
    started = time.time()
    strokes, fonts = args.strokes_per_class, max(1, args.strokes_per_class // 40)
    pool = Glyphs.cat(
        [
            stroke_pool("0123456789", strokes, rng),
            stroke_pool(LOWER + UPPER, max(1, strokes // 4), rng),
            font_pool(FONTS, CHARACTERS, fonts, rng),
        ]
    )
    held_out = font_pool(VALIDATION_FONTS, CHARACTERS, 3, rng)
    held_out_images = normalise(scan(held_out.bitmaps.float() / 255, 8))
    digit_images, digit_classes = (t[:DEVELOPMENT_IMAGES] for t in scanned_digits())
    is_digit = pool.classes < 10
    hand = (pool.tags & HAND) > 0
    kinds = [
        (is_digit & hand, 0.5),
        (is_digit & ~hand, 0.15),
        (~is_digit & hand, 0.2),
        (~is_digit & ~hand, 0.15),
    ]
    kinds = [(mask.nonzero().flatten(), round(share * args.batch)) for mask, share in kinds]
    print(f"{len(pool.classes)} glyphs drawn in {time.time() - started:.0f} s", flush=True)

    captions = Captions.build()
    caption_classes = torch.cat([torch.arange(10).repeat_interleave(5), torch.arange(10, len(CHARACTERS))])
    model = DEMO.build()
    model.token_embedding = nn.Embedding.from_pretrained(
        model.token_embedding.weight.data[captions.token_ids].clone(), freeze=False
    )
    with torch.no_grad():
        model.logit_scale.fill_(math.log(50))
    optimizer = make_optimizer(model, args.lr, weight_decay=0.05, slow=0.1, scale=5.0)
    average = copy.deepcopy(model).eval()
    metadata = {
        name: str(getattr(args, name)) for name in ("seed", "steps", "batch", "lr", "strokes_per_class")
    }

    for step in range(args.steps):
        warm, done = min(1.0, (step + 1) / min(50, args.steps)), step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.lr * group["rate"] * warm * (0.5 + 0.5 * math.cos(math.pi * done))
        picks = torch.cat([ids[torch.randint(len(ids), (n,), generator=rng)] for ids, n in kinds])
        picks = picks[torch.randperm(len(picks), generator=rng)]
        images, tags = augment(pool.bitmaps[picks], rng)
        tags = tags | pool.tags[picks]
        tokens, needed = captions.draw(caption_classes, rng)

        scale = model.logit_scale.exp()
        logits = scale * model.encode_image(images, normalize=True) @ encode_captions(model, tokens).T
        positive = (pool.classes[picks][:, None] == caption_classes) & ((tags[:, None] & needed) == needed)
        loss = contrastive_loss(logits, positive)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(math.log(50), math.log(100))  # sharp, as CLIP ends up
        move_average(average, model, step, decay=0.99)

        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            ids = captions.token_ids
            print(
                f"step {step + 1}/{args.steps}  {time.time() - started:.0f} s  loss {loss.item():.3f}  "
                f"scale {scale.item():.1f}\n"
                f"    held-out fonts      {report(average, held_out_images, held_out.classes, ids)}\n"
                f"    development digits  {report(average, digit_images, digit_classes, ids)}",
                flush=True,
            )
            save_demo_clip(average, captions.token_ids, args.out, metadata | {"step": str(step + 1)})
    print(f"wrote {args.out}: {args.out.stat().st_size / 1e6:.2f} MB, {len(captions.token_ids)} token rows")


def evaluate(args: argparse.Namespace) -> None:
    model = load_demo_clip(path=args.out)
    images, classes = scanned_digits()
    cut = DEVELOPMENT_IMAGES
    print(f"development digits (first {cut}): {report(model, images[:cut], classes[:cut])}")
    print(f"test digits (the other {len(classes) - cut}): {report(model, images[cut:], classes[cut:])}")


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, DEMO, scored_on="digits", steps=800, batch=128, log_every=50)
    parser.add_argument(
        "--strokes-per-class", type=int, default=1000, help="handwritten renderings of each digit"
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    evaluate(args) if args.evaluate else train(args)


if __name__ == "__main__":
    main()
