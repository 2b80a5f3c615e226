"""Train the icons CLIP on drawings of designers that the data set `icons` has not, and write its asset.

    python tools/pretrain_icons_clip.py                # at most two hours on two quiet cores
    python tools/pretrain_icons_clip.py --evaluate     # score the weights in place on held-out names, train nothing

Drawings come from three fonts of the package qtawesome whose designers drew none of the data set: Material Design Icons,
Remix Icon and Codicons. A tenth of their names is held out: settings are chosen on those alone. Drawings are turned, moved,
scaled and printed in random colours; captions are their names in templates, or behind random words and beside noise, so that
a learned context, which is no text, does not break the text tower. The loss is CLIP's, symmetric and contrastive, where all
drawings of a name count as its positives; beside it, less and less, the image tower predicts the tokens of the name (SuperClass,
NeurIPS 2024), from which it learns shapes several times sooner than from the contrast alone.

No drawing of Phosphor, Font Awesome or Elusive is read. A run that was interrupted goes on where it last reported.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from PIL import Image, ImageFont
from pretraining import contrastive_loss, make_optimizer, move_average, options, uniform
from torch import Tensor, nn

from cocoop_fast.clip.demo import DEMO_CLIPS, load_demo_clip, save_demo_clip
from cocoop_fast.data import icons

ICONS = DEMO_CLIPS["icons"]
FONTS = ("materialdesignicons6-webfont", "remixicon", "codicon")
STYLE_WORDS = {"outline", "variant", "line", "fill", "2", "3"}  # words of a name that say how, not what
IMAGE = ICONS.vision["image_size"]
MASTER, BOX = 64, 52  # pixels of a stored drawing, and of the box that it is fitted to
SHOWN = 120  # held-out names that are chosen among
LONGEST_CONTEXT = 12  # random words before a name
ODD = 0.25  # of the captions: random words before the name
CALM = 0.1  # of the steps, over which odd captions and noise come in
# The first is what a model is evaluated with.
TEMPLATES = [
    "an icon of a {}.", "a photo of a {}.", "an icon of the {}.", "a drawing of a {}.", "a picture of a {}.", "an image of a {}.",
    "a symbol of a {}.", "a pictogram of a {}.", "the {} icon.", "a {}.", "the {}.", "{}.", "{}", "a black icon of a {}.",
    "a white icon of a {}.", "a colourful {}.", "a thin icon of a {}.", "a bold icon of a {}.", "a filled icon of a {}.",
    "a sign that shows a {}.", "a small picture of a {}.", "a large {}.", "a print of a {}.", "a sketch of a {}.",
    "a photo of the {}.", "a bad photo of a {}.", "itap of a {}.", "art of the {}.", "a origami {}.", "a {} in a video game.",
]  # fmt: skip

# -- drawings ----------------------------------------------------------------------------------------------------


class Drawing(NamedTuple):
    font: Path
    name: str  # in words
    character: int


def drawings() -> Iterator[Drawing]:
    """All that is trained on or held out."""
    for stem in FONTS:
        font = icons.font_file(stem, ".ttf")
        for name, point in json.loads(icons.font_file(f"{stem}-charmap", ".json").read_text()).items():
            words = [word for word in name.replace("_", "-").split("-") if word not in STYLE_WORDS]
            if words and not words[-1].isdigit():
                yield Drawing(font, " ".join(words), int(point, 16))


def masters(of: list[Drawing]) -> Tensor:
    """(n, 64, 64) uint8, each fitted to the box."""
    faces, out = {font: ImageFont.truetype(str(font), 128) for font in {one.font for one in of}}, []
    for one in of:
        glyph = icons.glyph_of(faces[one.font], one.character)
        scale = BOX / max(glyph.size)
        glyph = glyph.resize([max(1, round(side * scale)) for side in glyph.size], Image.Resampling.BOX)
        square = Image.new("L", (MASTER, MASTER))
        square.paste(glyph, ((MASTER - glyph.width) // 2, (MASTER - glyph.height) // 2))
        out.append(np.asarray(square))
    return torch.from_numpy(np.stack(out))


def printed(glyphs: Tensor, rng: torch.Generator) -> Tensor:
    """(n, 64, 64) uint8 to (n, 3, 64, 64): turned, moved, scaled, thinner, bolder or in outline, in colours told apart."""
    n = len(glyphs)
    turn, size = torch.randn(n, generator=rng) * 0.12, uniform((n, 1, 1), 1.0, 1.65, rng)
    stretch = torch.diag_embed(torch.exp(torch.randn(n, 2, generator=rng) * 0.06))
    rotate = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], -1).view(n, 2, 2) @ stretch * size
    room = (size[:, 0] - 0.85).clamp_min(0) * 0.6
    shift = uniform((n, 2), -1, 1, rng) * room
    plain = torch.rand(n, generator=rng) < 0.2  # black on white, upright
    rotate[plain], shift[plain] = torch.eye(2) * 1.05, 0.0
    grid = F.affine_grid(torch.cat([rotate, shift[..., None]], 2), [n, 1, IMAGE, IMAGE], align_corners=False)
    ink = F.grid_sample(glyphs[:, None].float() / 255, grid, align_corners=False)
    # The stroke becomes thinner or bolder by a blur and another threshold.
    blur = F.avg_pool2d(ink, 3, 1, 1)
    bent = ((blur - uniform((n, 1, 1, 1), 0.2, 0.6, rng)) * 3 + 0.5).clamp(0, 1)
    # Many designers draw outlines where these fill: ink is left where a drawing begins and ends alone.
    outline = F.max_pool2d(ink, 3, 1, 1) + F.max_pool2d(-ink, 3, 1, 1)
    style = torch.rand(n, generator=rng)[:, None, None, None]
    ink = torch.where(style < 0.45, bent, torch.where(style < 0.65, outline, ink))
    pair = torch.rand(n, 2, 3, generator=rng)  # ink and paper
    grey = pair @ torch.tensor([0.299, 0.587, 0.114])
    dark_on_light = torch.rand(n, generator=rng) < 0.5
    low, high = uniform((n,), 0.0, 0.3, rng), uniform((n,), 0.7, 1.0, rng)
    wanted = torch.stack([torch.where(dark_on_light, low, high), torch.where(dark_on_light, high, low)], 1)
    pair = (pair + (wanted - grey)[..., None]).clamp(0, 1)
    pair[plain, 0], pair[plain, 1] = 0.0, 1.0
    images = ink * pair[:, 0, :, None, None] + (1 - ink) * pair[:, 1, :, None, None]
    images = images + torch.randn(images.shape, generator=rng) * 0.02
    return (images.clamp(0, 1) - ICONS.image_mean) / ICONS.image_std


# -- captions ----------------------------------------------------------------------------------------------------


class Captions(NamedTuple):
    """Names in templates, as rows of a small vocabulary."""

    tokens: Tensor  # (names, templates, length)
    token_ids: Tensor  # (n,), sorted: open_clip's ids of those rows

    @classmethod
    def build(cls, names: list[str]) -> Captions:
        tokens = open_clip.tokenize([template.format(name) for name in names for template in TEMPLATES])
        tokens = tokens[:, : int((tokens != 0).sum(1).max())].contiguous()
        # Words of the data set's names have a row as well: no drawing shows them here, but they occur in random contexts.
        asked = [name.replace("-", " ") for one in icons.ICON_SETS.values() for name in one.names()]
        token_ids = torch.unique(torch.cat([tokens.flatten(), open_clip.tokenize(asked).flatten()]))
        return cls(torch.searchsorted(token_ids, tokens).view(len(names), len(TEMPLATES), -1), token_ids)

    def words(self) -> Tensor:
        """(names, rows) the tokens of each name, the rare ones weighing more; a row of them sums to 1."""
        bag = torch.zeros(len(self.tokens), len(self.token_ids))
        bag.scatter_(1, self.tokens[:, TEMPLATES.index("{}")], 1.0)
        bag *= (
            len(bag) / bag.sum(0).clamp_min(1)
        ).log()  # what all captions have, their start and end, is nothing
        return bag / bag.sum(1, keepdim=True).clamp_min(1e-6)

    def behind_random_words(self, labels: Tensor, rng: torch.Generator) -> Tensor:
        """(n,) names as (n, length) tokens, 1 to 12 random words before each."""
        bare = self.tokens[labels, TEMPLATES.index("{}.")]
        width, out = bare.shape[1] + LONGEST_CONTEXT, []
        for row in bare:
            k = int(torch.randint(1, LONGEST_CONTEXT + 1, (1,), generator=rng))
            words = torch.randint(1, len(self.token_ids) - 2, (k,), generator=rng)
            own = torch.cat([row[:1], words, row[1 : int(row.argmax()) + 1]])
            out.append(F.pad(own, (0, width - len(own))))
        return torch.stack(out)


def encode_text(
    model: CLIP, tokens: Tensor, rng: torch.Generator | None = None, noisy: float = 0.0
) -> Tensor:
    """(n, E) unit features; the rows of a share ``noisy`` of the captions are off by up to half their spread."""
    ends = tokens.argmax(1)
    length = int(ends.max()) + 1
    x = model.token_embedding(tokens[:, :length])
    if noisy:
        n, spread = len(tokens), model.token_embedding.weight.detach().std()
        which = (torch.rand(n, generator=rng) < noisy)[:, None, None]
        x = x + which * torch.randn(x.shape, generator=rng) * spread * uniform((n, 1, 1), 0, 0.5, rng)
    x = x + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return F.normalize(x[torch.arange(len(x)), ends] @ model.text_projection, dim=-1)


# -- training ----------------------------------------------------------------------------------------------------


class Material(NamedTuple):
    """Drawings with the numbers of their names, and which of them are trained on."""

    glyphs: Tensor
    labels: Tensor
    trained: Tensor  # indices of drawings
    shown: Tensor  # numbers of the held-out names that are chosen among
    captions: Captions

    @classmethod
    def load(cls, every: int = 1) -> Material:
        """Of each ``every``-th drawing."""
        found = list(drawings())[::every]
        names = sorted({one.name for one in found})
        number = {name: i for i, name in enumerate(names)}
        held_out = set(random.Random(0).sample(names, len(names))[: len(names) // 10])
        return cls(
            glyphs=masters(found),
            labels=torch.tensor([number[one.name] for one in found]),
            trained=torch.tensor([one.name not in held_out for one in found]).nonzero()[:, 0],
            shown=torch.tensor([number[name] for name in sorted(held_out)[:SHOWN]]),
            captions=Captions.build(names),
        )

    @torch.no_grad()
    def held_out_accuracies(self, model: CLIP, templates: Sequence[int] = (0,)) -> list[float]:
        """Of zero-shot classification of four prints of each held-out drawing among the held-out names, by template."""
        mine = torch.isin(self.labels, self.shown).nonzero()[:, 0].repeat(4)
        images = printed(self.glyphs[mine], torch.Generator().manual_seed(1))
        features = torch.cat([model.encode_image(part, normalize=True) for part in images.split(256)])
        accuracies = []
        for template in templates:
            scores = features @ encode_text(model, self.captions.tokens[self.shown, template]).T
            accuracies.append(float((self.shown[scores.argmax(1)] == self.labels[mine]).float().mean()))
        return accuracies


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)
    started = time.time()
    glyphs, labels, trained, _, captions = material = Material.load(args.every)
    print(
        f"{len(trained)} drawings, {len(captions.tokens)} names, {len(captions.token_ids)} tokens", flush=True
    )

    model = ICONS.build()
    model.token_embedding = nn.Embedding.from_pretrained(
        model.token_embedding.weight.data[captions.token_ids].clone(), freeze=False
    )
    with torch.no_grad():
        model.logit_scale.fill_(math.log(20))
    words = captions.words()
    predictor = nn.Linear(ICONS.embed_dim, words.shape[1])
    optimizer = make_optimizer(model, args.lr, weight_decay=0.1, slow=0.3, scale=1.0)
    optimizer.add_param_group({"params": predictor.parameters(), "weight_decay": 0.0, "rate": 1.0})
    average = copy.deepcopy(model).eval()
    metadata = {name: str(getattr(args, name)) for name in ("seed", "steps", "batch", "lr", "every")}

    kept = {"model": model, "average": average, "predictor": predictor, "optimizer": optimizer}
    state_file, first = args.out.with_suffix(".state"), 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        for name, part in kept.items():
            part.load_state_dict(state[name])
        rng.set_state(state["rng"])
        torch.set_rng_state(state["torch_rng"])
        first = state["step"]
        print(f"goes on after step {first}", flush=True)

    for step in range(first, args.steps):
        warm, done = min(1.0, (step + 1) / 200), step / args.steps
        strange = min(1.0, done / CALM)
        for group in optimizer.param_groups:
            group["lr"] = (
                args.lr * group["rate"] * warm * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * done)))
            )
        picks = trained[torch.randint(len(trained), (args.batch,), generator=rng)]
        images = printed(glyphs[picks], rng)
        template = torch.randint(len(TEMPLATES), (args.batch,), generator=rng)
        template[torch.rand(args.batch, generator=rng) < 0.3] = 0
        tokens = captions.tokens[labels[picks], template]
        odd = round(args.batch * ODD * strange)
        text = encode_text(model, tokens[odd:], rng, strange / 2)
        if odd:
            behind = captions.behind_random_words(labels[picks[:odd]], rng)
            text = torch.cat([encode_text(model, behind, rng, strange / 2), text])
        scale = model.logit_scale.exp()
        features = model.encode_image(images)
        same = labels[picks][:, None] == labels[picks]
        loss = contrastive_loss(scale * F.normalize(features, dim=-1) @ text.T, same)
        predicted = -(predictor(features).log_softmax(1) * words[labels[picks]]).sum(1).mean()
        optimizer.zero_grad()
        (loss + (1 - done) * predicted).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(math.log(10), math.log(100))
        move_average(average, model, step, decay=0.999)
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            print(
                f"step {step + 1}/{args.steps}  {time.time() - started:.0f} s  loss {loss.item():.3f}  scale {scale.item():.1f}"
                f"  held-out names {material.held_out_accuracies(average)[0]:.1%}",
                flush=True,
            )
            state = {name: part.state_dict() for name, part in kept.items()}
            state |= {"rng": rng.get_state(), "torch_rng": torch.get_rng_state(), "step": step + 1}
            torch.save(state, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").replace(state_file)
    save_demo_clip(average, captions.token_ids, args.out, metadata)
    state_file.unlink(missing_ok=True)
    print(f"wrote {args.out}: {args.out.stat().st_size / 1e6:.2f} MB, {len(captions.token_ids)} token rows")


def evaluate(args: argparse.Namespace) -> None:
    model = load_demo_clip("icons", args.out)
    material = Material.load(args.every)
    rows = model.token_embedding.weight[material.captions.token_ids]
    model.token_embedding = nn.Embedding.from_pretrained(rows)  # captions are numbered by these rows
    accuracies = material.held_out_accuracies(model, range(len(TEMPLATES)))
    print(f"held-out names ({len(material.shown)}): {accuracies[0]:.1%}")
    print(f"by one of {len(TEMPLATES)} templates: {min(accuracies):.1%} to {max(accuracies):.1%}")


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, ICONS, scored_on="held-out names", steps=2400, batch=192, log_every=200)
    parser.add_argument("--every", type=int, default=1, help="take each N-th drawing alone, for a trial")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    evaluate(args) if args.evaluate else train(args)


if __name__ == "__main__":
    main()
