"""What all contestants compute: a model, a class list, a batch of image features, and the same parameters."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import QuickGELU
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from torch import Tensor, nn

from cocoop_fast.clip.frozen import FrozenCLIP, TextWeights
from cocoop_fast.clip.load import load_clip
from cocoop_fast.config import ConsistencyKind, ModelConfig
from cocoop_fast.errors import UserError
from cocoop_fast.methods.cocoop import PromptLearner, reference_cfg
from cocoop_fast.prompts.tree import ClassTree

DEFAULT_MODEL = "ViT-B/16 text tower, random weights"


@dataclass(frozen=True)
class ProblemSpec:
    """A problem by name: small enough to be handed to another process."""

    classes: tuple[str, ...]
    batch: int = 1  # B, images a step
    model: str | None = None  # None: DEFAULT_MODEL; else as `cocoop-fast train --model`
    pretrained: str | None = None
    ctx_init: str = "a photo of a"
    attributes: tuple[str, ...] = ()
    seed: int = 0
    consistency: ConsistencyKind = "none"  # that verification adds to the loss

    @property
    def model_name(self) -> str:
        return self.model or DEFAULT_MODEL


@dataclass(frozen=True, eq=False)
class Problem:
    """A problem ready to be computed. B images, K classes, M context tokens, E embedding."""

    spec: ProblemSpec
    clip_model: nn.Module
    cfg: object  # the reference's
    features: Tensor  # (B, E) image features
    labels: Tensor  # (B,)
    tokens: Tensor  # (K, L) token ids
    lengths: Tensor  # (K,) tokens of each prompt from SOS to EOT
    tree: ClassTree
    weights: TextWeights
    learned: dict[str, Tensor]  # `ctx` and the Meta-Net, the same for all contestants
    activation_assumed: bool = False  # nothing says which one the weights were trained with

    @property
    def longest(self) -> int:
        """L': the tokens of the longest prompt."""
        return int(self.lengths.max())

    def learner(self) -> PromptLearner:
        """A new PromptLearner with the common parameters, in training mode."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of duplicate names; told once, when the problem was built
            learner = PromptLearner(self.cfg, self.spec.classes, self.clip_model)
        learner.load_state_dict(self.learned, strict=False)
        return learner.train()

    def first(self, classes: int, batch: int) -> Problem:
        """The same model and parameters with the first classes and images only."""
        names = self.spec.classes[:classes]
        small = build_problem(replace(self.spec, classes=names, batch=batch), self.clip_model)
        return replace(small, learned=self.learned)


def imagenet_names(count: int) -> tuple[str, ...]:
    """The first ImageNet class names, as open_clip spells them; more than 1000: of ImageNet-22k, which timm has.

    Raises:
        UserError: not between 1 and 21,841.
    """
    names = IMAGENET_CLASSNAMES
    if count > len(names):
        from timm.data import ImageNetInfo  # a dependency of open_clip, slow to import

        synonyms = ImageNetInfo("imagenet22k").label_descriptions()
        names = [of_a_class.split(",")[0] for of_a_class in synonyms]
    if not 1 <= count <= len(names):
        raise UserError(f"There are {len(names)} ImageNet names, but {count} were asked for.")
    return tuple(names[:count])


def random_text_tower(layers: int = 12) -> CLIP:
    """A CLIP with the text tower of ViT-B/16 (d = 512, 8 heads, 12 layers, QuickGELU), all weights random.

    Its image tower is a stub: image features are given, so that only text is measured, as image features
    cost every contestant the same.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        vision = CLIPVisionCfg(layers=1, width=64, head_width=16, patch_size=112, image_size=224)
        model = CLIP(512, vision, CLIPTextCfg(width=512, heads=8, layers=layers), quick_gelu=True)
    return model.eval().requires_grad_(False)


def load_model(spec: ProblemSpec) -> tuple[nn.Module, bool]:
    """The frozen float32 CLIP that a problem names, on the CPU, and whether its activation was assumed.

    Raises:
        UserError: an unknown model, or one that is not built like CLIP's own.
    """
    if spec.model is None:
        return random_text_tower(), False
    named = ModelConfig(name=spec.model, pretrained=spec.pretrained, precision="fp32", device="cpu")
    loaded = load_clip(named)
    model = loaded.model
    if not isinstance(model, CLIP):
        raise UserError(
            f"The model '{spec.model}' keeps its text tower apart ({type(model).__name__}), which the dense "
            "oracle does not read; choose a plain CLIP such as ViT-B-16-quickgelu."
        )
    return model, bool(loaded.assumed)


def build_problem(spec: ProblemSpec, clip_model: nn.Module | None = None) -> Problem:
    """Everything that a problem fixes. The image features are random.

    Args:
        spec: what to build.
        clip_model: its model, if it is there already.

    Raises:
        UserError: an unusable model or class list.
    """
    if spec.batch < 1:
        raise UserError(f"The batch size must be at least 1, got {spec.batch}.")
    model, assumed = load_model(spec) if clip_model is None else (clip_model, False)
    frozen = FrozenCLIP(model)
    generator = torch.Generator().manual_seed(spec.seed)
    cfg = reference_cfg(
        ctx_init=spec.ctx_init,
        n_ctx=4,
        precision="fp32",
        image_size=frozen.image_size,
        attributes=spec.attributes,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(spec.seed)
        learner = PromptLearner(cfg, spec.classes, model)
    tokens = learner.tokenized_prompts
    return Problem(
        spec=spec,
        clip_model=model,
        cfg=cfg,
        features=torch.randn(spec.batch, frozen.embed_dim, generator=generator),
        labels=torch.randint(learner.n_cls, (spec.batch,), generator=generator),
        tokens=tokens,
        lengths=tokens.argmax(dim=1) + 1,
        tree=ClassTree.from_layout(learner.layout),
        weights=frozen.text_weights(),
        learned={name: value.detach().clone() for name, value in learner.named_parameters()},
        activation_assumed=assumed,
    )


def with_other_activation(problem: Problem) -> Problem:
    """The same problem with QuickGELU in the text tower in place of GELU, or the other way round."""
    model: Any = copy.deepcopy(problem.clip_model)
    for block in model.transformer.resblocks:
        block.mlp.gelu = QuickGELU() if problem.weights.activation == "gelu" else nn.GELU()
    return replace(build_problem(problem.spec, model), learned=problem.learned)
