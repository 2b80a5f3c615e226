"""The registry, and the trainer loop: what it calls, in which order, and what it prints."""

import os.path as osp
import time
from collections import OrderedDict
from datetime import timedelta

import torch

from dassl.data import DataManager
from dassl.utils import Registry, load_checkpoint, resume_from_checkpoint, save_checkpoint

TRAINER_REGISTRY = Registry("TRAINER")


def build_trainer(cfg):
    assert cfg.TRAINER.NAME in TRAINER_REGISTRY.registered_names()
    return TRAINER_REGISTRY.get(cfg.TRAINER.NAME)(cfg)


class TrainerX:
    def __init__(self, cfg):
        self._models, self._optims, self._scheds = OrderedDict(), OrderedDict(), OrderedDict()
        self.check_cfg(cfg)
        self.device = torch.device("cuda" if torch.cuda.is_available() and cfg.USE_CUDA else "cpu")
        self.max_epoch, self.output_dir, self.cfg = cfg.OPTIM.MAX_EPOCH, cfg.OUTPUT_DIR, cfg
        self.dm = DataManager(cfg)
        self.train_loader_x, self.test_loader = self.dm.train_loader_x, self.dm.test_loader
        self.build_model()

    def check_cfg(self, cfg): ...

    def register_model(self, name="model", model=None, optim=None, sched=None):
        assert name not in self._models
        self._models[name], self._optims[name], self._scheds[name] = model, optim, sched

    def get_model_names(self):
        return list(self._models)

    def save_model(self, epoch, directory, is_best=False, val_result=None, model_name=""):
        for name in self._models:
            state = {
                "state_dict": self._models[name].state_dict(),
                "epoch": epoch + 1,
                "optimizer": self._optims[name].state_dict(),
                "scheduler": self._scheds[name].state_dict(),
                "val_result": val_result,
            }
            save_checkpoint(state, osp.join(directory, name), is_best, model_name=model_name)

    def load_model(self, directory, epoch=None):
        for name in self._models:
            state = load_checkpoint(osp.join(directory, name, f"model.pth.tar-{epoch}"))
            self._models[name].load_state_dict(state["state_dict"])

    def set_model_mode(self, mode):
        for model in self._models.values():
            model.train(mode == "train")

    def update_lr(self):
        for scheduler in self._scheds.values():
            scheduler.step()

    def detect_anomaly(self, loss):
        if not torch.isfinite(loss).all():
            raise FloatingPointError("Loss is infinite or NaN!")

    def get_current_lr(self):
        return self._optims[self.get_model_names()[0]].param_groups[0]["lr"]

    def train(self):
        directory = self.cfg.RESUME or self.cfg.OUTPUT_DIR
        start_epoch = 0
        if all(osp.exists(osp.join(directory, name)) for name in self._models):
            print(f"Found checkpoint at {directory} (will resume training)")
            for name in self._models:
                parts = self._models[name], self._optims[name], self._scheds[name]
                start_epoch = resume_from_checkpoint(osp.join(directory, name), *parts)
        for epoch in range(start_epoch, self.max_epoch):
            self.epoch = epoch
            self.run_epoch()
            frequency = self.cfg.TRAIN.CHECKPOINT_FREQ
            if self.epoch + 1 == self.max_epoch or (frequency > 0 and (self.epoch + 1) % frequency == 0):
                self.save_model(self.epoch, self.output_dir)
        self.after_train()

    def after_train(self):
        print("Finish training")
        self.test()

    def run_epoch(self):
        self.set_model_mode("train")
        self.num_batches = len(self.train_loader_x)
        for batch_idx, batch in enumerate(self.train_loader_x):
            self.batch_idx = batch_idx
            start, rate = time.time(), self.get_current_lr()
            summary = self.forward_backward(batch)
            seconds = time.time() - start
            losses = " ".join(f"{name} {value:.4f} ({value:.4f})" for name, value in summary.items())
            print(f"step lr {rate!r} loss {summary['loss']!r}")  # at full precision, for the tests
            print(
                f"epoch [{self.epoch + 1}/{self.max_epoch}] batch [{self.batch_idx + 1}/{self.num_batches}] "
                f"time {seconds:.3f} ({seconds:.3f}) data 0.000 (0.000) {losses} "
                f"lr {self.get_current_lr():.4e} eta {timedelta(seconds=0)}"
            )

    @torch.no_grad()
    def test(self, split="test"):
        self.set_model_mode("eval")
        print(f"Evaluate on the *{split}* set")
        correct = total = 0
        for batch in self.test_loader:
            image, label = batch["img"].to(self.device), batch["label"].to(self.device)
            correct += int((self.model_inference(image).argmax(dim=1) == label).sum())
            total += len(label)
        accuracy = 100.0 * correct / total
        print(f"=> result\n* total: {total:,}\n* correct: {correct:,}\n* accuracy: {accuracy:.1f}%")
        return accuracy

    def model_inference(self, image):
        return self.model(image)
