"""Small CLIP models with random weights, in every layout that the package reads."""

from __future__ import annotations

from collections import OrderedDict

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

IMAGE_SIZE = 32


def tiny_clip(
    *,
    quick_gelu: bool = True,
    resnet: bool = False,
    layers: int = 3,
    width: int = 48,
    heads: int = 3,
    embed_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **text: object,
) -> CLIP:
    """An open_clip CLIP with a ViT or ResNet image tower. Weights are large enough that context matters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if resnet:
            vision = CLIPVisionCfg(layers=(1, 1, 1, 1), width=16, head_width=16, image_size=IMAGE_SIZE)
        else:
            vision = CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=IMAGE_SIZE)
        text_cfg = CLIPTextCfg(width=width, heads=heads, layers=layers, **text)
        model = CLIP(embed_dim, vision, text_cfg, quick_gelu=quick_gelu)
        _enliven(model)
    return model.to(dtype).eval().requires_grad_(False)


def tiny_openai_clip(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> OpenAILayoutCLIP:
    """A model with the attributes of OpenAI's `clip.model.CLIP`: sequence-first blocks that hold the mask."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = OpenAILayoutCLIP(embed_dim=64, width=48, heads=3, layers=3)
        _enliven(model)
    return model.to(dtype).eval().requires_grad_(False)


def _enliven(model: nn.Module) -> None:
    """Random biases and LayerNorm weights, so that a forgotten one changes the result."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.2)
        elif "token_embedding" in name or "positional_embedding" in name:
            nn.init.normal_(parameter, std=0.3)
    model.logit_scale.data.fill_(1.0)  # soft probabilities: p - y is then as well conditioned as the logits


class OpenAILayoutCLIP(nn.Module):
    """The attribute layout of OpenAI's CLIP, as far as prompt learning touches it."""

    def __init__(self, embed_dim: int, width: int, heads: int, layers: int, context_length: int = 77) -> None:
        super().__init__()
        self.visual = _Visual(embed_dim)
        mask = torch.full((context_length, context_length), float("-inf")).triu(1)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*(_Block(width, heads, mask) for _ in range(layers)))
        self.transformer.forward = self.transformer.resblocks.forward
        self.token_embedding = nn.Embedding(49408, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)
        self.logit_scale = nn.Parameter(torch.zeros(()))

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype


class _Visual(nn.Module):
    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.input_resolution, self.output_dim = IMAGE_SIZE, embed_dim
        self.conv1 = nn.Conv2d(3, embed_dim, kernel_size=IMAGE_SIZE, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv1(image).flatten(1)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, mask: Tensor) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(), c_proj=nn.Linear(4 * width, width)
            )
        )
        self.ln_2 = nn.LayerNorm(width)
        self.attn_mask = mask  # a plain attribute, as OpenAI has it

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.attn_mask.to(x))[0]
        return x + self.mlp(self.ln_2(x))
