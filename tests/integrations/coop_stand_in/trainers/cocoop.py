"""CoCoOp as the oracle computes it, behind the reference's trainer interface."""

import os.path as osp

import torch
from dassl.engine import TRAINER_REGISTRY, TrainerX
from dassl.optim import build_lr_scheduler, build_optimizer
from dassl.utils import load_checkpoint, load_pretrained_weights
from tiny_models import tiny_openai_clip

from cocoop_fast.reference import DensePromptedCLIP


def load_clip_to_cpu(cfg):
    return tiny_openai_clip(dtype=torch.float16)  # as OpenAI's files have it


@TRAINER_REGISTRY.register()
class CoCoOp(TrainerX):
    section, conditional = "COCOOP", True

    def check_cfg(self, cfg):
        assert cfg.TRAINER[self.section].PREC in ["fp16", "fp32", "amp"]

    def build_model(self):
        cfg = self.cfg
        options = cfg.TRAINER[self.section]
        clip_model = load_clip_to_cpu(cfg).float()
        self.model = DensePromptedCLIP(
            clip_model,
            self.dm.dataset.classnames,
            ctx_init=options.CTX_INIT,
            n_ctx=options.N_CTX,
            conditional=self.conditional,
        )
        learner = self.model.prompt_learner
        learner.register_buffer("token_prefix", self.model.embedding[:, :1])
        learner.register_buffer("token_suffix", self.model.embedding[:, 1 + learner.ctx.shape[-2] :])
        if cfg.MODEL.INIT_WEIGHTS:
            load_pretrained_weights(learner, cfg.MODEL.INIT_WEIGHTS)
        self.optim = build_optimizer(learner, cfg.OPTIM)
        self.sched = build_lr_scheduler(self.optim, cfg.OPTIM)
        self.register_model("prompt_learner", learner, self.optim, self.sched)

    def forward_backward(self, batch):
        image, label = self.parse_batch_train(batch)
        loss = self.model(image, label)
        self.optim.zero_grad()
        loss.backward()
        self.optim.step()
        if (self.batch_idx + 1) == self.num_batches:
            self.update_lr()
        return {"loss": loss.item()}

    def parse_batch_train(self, batch):
        return batch["img"].to(self.device), batch["label"].to(self.device)

    def load_model(self, directory, epoch=None):
        if not directory:
            print("Note that load_model() is skipped as no pretrained model is given")
            return
        for name in self.get_model_names():
            path = osp.join(directory, name, f"model.pth.tar-{epoch}")
            checkpoint = load_checkpoint(path)
            state = checkpoint["state_dict"]
            for buffer in ("token_prefix", "token_suffix"):
                state.pop(buffer, None)
            print(f'Loading weights to {name} from "{path}" (epoch = {checkpoint["epoch"]})')
            self._models[name].load_state_dict(state, strict=False)
