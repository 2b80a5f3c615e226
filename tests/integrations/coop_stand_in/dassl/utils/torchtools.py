import os.path as osp
from pathlib import Path

import torch


def save_checkpoint(state, save_dir, is_best=False, remove_module_from_keys=True, model_name=""):
    folder = Path(save_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (model_name or f"model.pth.tar-{state['epoch']}")
    torch.save(state, path)
    print(f"Checkpoint saved to {path}")
    (folder / "checkpoint").write_text(f"{path.name}\n")


def load_checkpoint(fpath):
    if fpath is None:
        raise ValueError("File path is None")
    if not osp.exists(fpath):
        raise FileNotFoundError(f'File is not found at "{fpath}"')
    return torch.load(fpath, map_location=None if torch.cuda.is_available() else "cpu")


def resume_from_checkpoint(fdir, model, optimizer=None, scheduler=None):
    path = osp.join(fdir, Path(fdir, "checkpoint").read_text().splitlines()[0])
    checkpoint = load_checkpoint(path)
    model.load_state_dict(checkpoint["state_dict"])
    if optimizer is not None:
        optimizer.load_state_dict(checkpoint["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(checkpoint["scheduler"])
    print(f"Previous epoch: {checkpoint['epoch']}")
    return checkpoint["epoch"]


def load_pretrained_weights(model, weight_path):
    state = load_checkpoint(weight_path)["state_dict"]
    own = model.state_dict()
    own.update({key: value for key, value in state.items() if key in own and own[key].shape == value.shape})
    model.load_state_dict(own)
    print(f"Successfully loaded pretrained weights from {weight_path}")
