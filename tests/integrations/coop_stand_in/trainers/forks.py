"""What descendants of CoOp change, one kind in each trainer: written for the tests, after what those methods publish.

All have a prompt learner that makes dense prompts and a text encoder that is called with them, as CoOp has.
"""

import json
import os.path as osp
from typing import ClassVar

import torch
from dassl.engine import TRAINER_REGISTRY, TrainerX
from dassl.optim import build_lr_scheduler, build_optimizer
from tiny_models import tiny_openai_clip
from torch import nn
from torch.nn import functional as F

from cocoop_fast.clip.tokenizer import tokenizer


def load_clip_to_cpu(cfg):
    return tiny_openai_clip().float()


class DenseTextEncoder(nn.Module):
    def __init__(self, clip_model):
        super().__init__()
        self.transformer = clip_model.transformer
        self.positional_embedding = clip_model.positional_embedding
        self.ln_final, self.text_projection = clip_model.ln_final, clip_model.text_projection

    def forward(self, prompts, tokenized_prompts):
        hidden = self.transformer((prompts + self.positional_embedding).transpose(0, 1)).transpose(0, 1)
        ends = tokenized_prompts.argmax(dim=1)
        return self.ln_final(hidden)[range(len(hidden)), ends] @ self.text_projection


class DensePrompts(nn.Module):
    """(K, L, d), or (B, K, L, d) where the context depends on the image."""

    def __init__(self, clip_model, names, words, n_ctx, *, csc=False, conditional=False, place="end"):
        super().__init__()
        if isinstance(words, bool):  # KgCoOp, ProGrad, TCP
            words = "a photo of a" if words else ""
        n_ctx = len(words.split()) if words else n_ctx
        prompts = [f"{words or ' '.join('X' * n_ctx)} {name.replace('_', ' ')}." for name in names]
        self.tokenized_prompts = tokenizer()(prompts)
        embedding = clip_model.token_embedding(self.tokenized_prompts).detach()
        width = embedding.shape[2]
        if words:
            start = embedding[0, 1 : 1 + n_ctx].clone()
        else:
            start = 0.02 * torch.randn(*((len(names),) if csc else ()), n_ctx, width)
        self.ctx = nn.Parameter(start)
        self.place, self.n_ctx = place, n_ctx
        self.register_buffer("token_prefix", embedding[:, :1])
        self.register_buffer("token_suffix", embedding[:, 1 + n_ctx :])
        self.name_lens = [int(row.argmax()) - n_ctx - 2 for row in self.tokenized_prompts]
        self.meta_net = (
            nn.Sequential(nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, width)) if conditional else None
        )

    def of(self, ctx):
        k = len(self.token_prefix)
        ctx = ctx if ctx.ndim == 3 else ctx.expand(k, -1, -1)
        if self.place == "end":
            return torch.cat([self.token_prefix, ctx, self.token_suffix], dim=1)
        rows = []
        for start, context, rest, length in zip(
            self.token_prefix, ctx, self.token_suffix, self.name_lens, strict=True
        ):
            ahead = self.n_ctx // 2 if self.place == "middle" else 0
            rows.append(torch.cat([start, context[:ahead], rest[:length], context[ahead:], rest[length:]]))
        return torch.stack(rows)

    def forward(self, image_features=None):
        if self.meta_net is None:
            return self.of(self.ctx)
        return torch.stack([self.of(self.ctx + shift) for shift in self.meta_net(image_features)[:, None]])


class DenseCLIP(nn.Module):
    def __init__(self, cfg, names, clip_model, encoder=DenseTextEncoder, **learner):
        super().__init__()
        options = cfg.TRAINER.COOP
        self.prompt_learner = DensePrompts(clip_model, names, options.CTX_INIT, options.N_CTX, **learner)
        self.text_encoder = encoder(clip_model)
        self.image_encoder, self.logit_scale = clip_model.visual, clip_model.logit_scale
        self.more = ()  # what the text encoder is given besides

    def features(self, image):
        """(B, E) and (B or 1, K, E), of unit length."""
        found = F.normalize(self.image_encoder(image), dim=-1)
        prompts = self.prompt_learner(found)
        each = prompts if prompts.ndim == 4 else prompts[None]
        texts = [self.text_encoder(one, self.prompt_learner.tokenized_prompts, *self.more) for one in each]
        return found, F.normalize(torch.stack(texts), dim=-1)

    def forward(self, image):
        found, texts = self.features(image)
        return self.logit_scale.exp() * (found[:, None] * texts).sum(dim=-1)


class Fork(TrainerX):
    """With the reference's loss; what a fork changes is overridden."""

    learner: ClassVar = {}
    encoder = DenseTextEncoder

    def build_model(self):
        cfg = self.cfg
        clip_model = load_clip_to_cpu(cfg).to(self.device)
        self.model = DenseCLIP(cfg, self.dm.dataset.classnames, clip_model, self.encoder, **self.learner)
        self.add_parts(clip_model)
        self.model.to(self.device)
        for name, value in self.model.named_parameters():
            value.requires_grad_(self.is_learned(name))
        self.optim = self.make_optimizer()
        self.sched = build_lr_scheduler(self.optim, cfg.OPTIM)
        self.register_model("prompt_learner", self.model.prompt_learner, self.optim, self.sched)

    def add_parts(self, clip_model): ...

    def is_learned(self, name):
        return "prompt_learner" in name

    def make_optimizer(self):
        return build_optimizer(self.model.prompt_learner, self.cfg.OPTIM)

    def loss(self, image, label):
        return F.cross_entropy(self.model(image), label)

    def forward_backward(self, batch):
        loss = self.loss(batch["img"].to(self.device), batch["label"].to(self.device))
        self.optim.zero_grad()
        loss.backward()
        self.optim.step()
        self.after_step(loss)
        if (self.batch_idx + 1) == self.num_batches:
            self.update_lr()
        return {"loss": loss.item()}

    def after_step(self, loss): ...


@TRAINER_REGISTRY.register()
class TCPT(Fork):
    """CoCoOp with a loss of its own, on text features and logits."""

    learner: ClassVar = {"conditional": True}

    def loss(self, image, label):
        found, texts = self.model.features(image)
        logits = self.model.logit_scale.exp() * (found[:, None] * texts).sum(dim=-1)
        apart = (texts @ texts.transpose(1, 2)).mean()
        return F.cross_entropy(logits, label) + 0.5 * apart + 0.1 * logits.logsumexp(dim=-1).mean()


@TRAINER_REGISTRY.register()
class KgCoOp(Fork):
    """Keeps text features near those of the frozen prompts."""

    def add_parts(self, clip_model):
        names = self.dm.dataset.classnames
        frozen = DensePrompts(clip_model, names, "a photo of a", 4)
        with torch.no_grad():
            taught = self.model.text_encoder(frozen(), frozen.tokenized_prompts)
        self.taught = F.normalize(taught, dim=-1)

    def loss(self, image, label):
        _, texts = self.model.features(image)
        return super().loss(image, label) + 8.0 * (1.0 - (texts[0] * self.taught).sum(dim=-1).mean())


@TRAINER_REGISTRY.register()
class ProGrad(KgCoOp):
    """Steps along the one loss's gradient without what opposes the other's."""

    def forward_backward(self, batch):
        image, label = batch["img"].to(self.device), batch["label"].to(self.device)
        logits = self.model(image)
        found = F.normalize(self.model.image_encoder(image), dim=-1)
        teacher = (self.model.logit_scale.exp() * found @ self.taught.T).softmax(dim=-1)
        learned = list(self.model.prompt_learner.parameters())
        general = torch.autograd.grad(
            F.kl_div(logits.log_softmax(-1), teacher, reduction="batchmean"), learned, retain_graph=True
        )
        loss = F.cross_entropy(logits, label)
        own = torch.autograd.grad(loss, learned)
        self.optim.zero_grad()
        for value, mine, other in zip(learned, own, general, strict=True):
            along = (mine * other).sum()
            value.grad = mine - along.clamp(max=0) * other / other.square().sum().clamp(min=1e-12)
        self.optim.step()
        if (self.batch_idx + 1) == self.num_batches:
            self.update_lr()
        return {"loss": loss.item()}


@TRAINER_REGISTRY.register()
class DePT(Fork):
    """A classifier of its own on image features, and rates by group for all that is learned in the model."""

    def add_parts(self, clip_model):
        self.model.probe = nn.Linear(64, len(self.dm.dataset.classnames))

    def is_learned(self, name):
        return "prompt_learner" in name or "probe" in name

    def make_optimizer(self):
        rates = {"probe": 5.0, "prompt_learner": 1.0}
        groups = [
            {"params": list(getattr(self.model, name).parameters()), "lr": rate * self.cfg.OPTIM.LR}
            for name, rate in rates.items()
        ]
        return build_optimizer(self.model, self.cfg.OPTIM, groups)

    def loss(self, image, label):
        found, texts = self.model.features(image)
        logits = self.model.logit_scale.exp() * found @ texts[0].T
        return F.cross_entropy(logits, label) + 0.7 * F.cross_entropy(self.model.probe(found), label)


@TRAINER_REGISTRY.register()
class CAPT(Fork):
    """A context for each class, which begins as the same for all; and a hook that writes a file at every step."""

    def add_parts(self, clip_model):
        learner = self.model.prompt_learner
        learner.own = nn.Parameter(torch.zeros(len(learner.token_prefix), 1, learner.ctx.shape[-1]))
        learner.forward = lambda features=None: learner.of(learner.ctx + learner.own)

    def after_step(self, loss):
        with open(osp.join(self.cfg.OUTPUT_DIR, "losses.jsonl"), "a") as file:
            file.write(json.dumps(loss.item()) + "\n")


@TRAINER_REGISTRY.register()
class ClassSpecific(Fork):
    learner: ClassVar = {"csc": True}


@TRAINER_REGISTRY.register()
class NameInTheMiddle(Fork):
    learner: ClassVar = {"place": "middle"}


@TRAINER_REGISTRY.register()
class NameInFront(Fork):
    learner: ClassVar = {"place": "front"}


class TextEncoderWithMore(DenseTextEncoder):
    def forward(self, prompts, tokenized_prompts, more=0.0):
        return super().forward(prompts, tokenized_prompts) + more


@TRAINER_REGISTRY.register()
class TCP(Fork):
    """Its text encoder takes what it has learned of a class as well."""

    encoder = TextEncoderWithMore

    def loss(self, image, label):
        learner = self.model.prompt_learner
        texts = self.model.text_encoder(learner(), learner.tokenized_prompts, learner.ctx.mean())
        logits = (
            self.model.logit_scale.exp() * F.normalize(self.model.image_encoder(image)) @ F.normalize(texts).T
        )
        return F.cross_entropy(logits, label)


def with_prompt(hidden, prompt):
    """(L, K, d) rows with a prompt (M, d) after the first."""
    prompt = prompt[:, None].expand(-1, hidden.shape[1], -1)
    return torch.cat([hidden[:1], prompt, hidden[1 + len(prompt) :]])


class DeepTextEncoder(DenseTextEncoder):
    def rounded(self, prompt):
        return prompt

    def forward(self, prompts, tokenized_prompts, deep):
        hidden = (prompts + self.positional_embedding).transpose(0, 1)
        for layer, block in enumerate(self.transformer.resblocks):
            hidden = block(
                with_prompt(hidden, self.rounded(deep[layer - 1])) if 0 < layer <= len(deep) else hidden
            )
        ends = tokenized_prompts.argmax(dim=1)
        return self.ln_final(hidden.transpose(0, 1))[range(len(prompts)), ends] @ self.text_projection


@TRAINER_REGISTRY.register()
class MaPLe(Fork):
    """A prompt for each layer, more than there are, handed to the text encoder."""

    encoder = DeepTextEncoder

    def add_parts(self, clip_model):
        learner = self.model.prompt_learner
        layers = len(clip_model.transformer.resblocks)
        learner.deep = nn.ParameterList(0.1 * torch.randn_like(learner.ctx) for _ in range(layers))
        self.model.more = (learner.deep,)


def prompted(block, prompt):
    """A block that reads a prompt of its own, as one of its parameters."""

    class Prompted(type(block)):
        def forward(self, hidden):
            return super().forward(with_prompt(hidden, self.prompt))

    block.prompt, block.__class__ = prompt, Prompted


@TRAINER_REGISTRY.register()
class PromptSRC(Fork):
    """A prompt in each block of the text tower but the first."""

    def add_parts(self, clip_model):
        learner = self.model.prompt_learner
        _, *blocks = clip_model.transformer.resblocks
        learner.deep = nn.ParameterList(0.1 * torch.randn_like(learner.ctx) for _ in blocks)
        for block, prompt in zip(blocks, learner.deep, strict=True):
            prompted(block, prompt)


@TRAINER_REGISTRY.register()
class Tuned(Fork):
    """Learns within the text tower what no prompt is."""

    def is_learned(self, name):
        return "prompt_learner" in name or name == "text_encoder.ln_final.weight"

    def make_optimizer(self):
        learned = [value for value in self.model.parameters() if value.requires_grad]
        return build_optimizer(self.model, self.cfg.OPTIM, [{"params": learned}])


class AdaptedTextEncoder(DenseTextEncoder):
    def forward(self, prompts, tokenized_prompts):
        return 1.5 * super().forward(prompts, tokenized_prompts)


@TRAINER_REGISTRY.register()
class Adapted(Fork):
    """Its text encoder computes something else than CLIP's."""

    encoder = AdaptedTextEncoder
