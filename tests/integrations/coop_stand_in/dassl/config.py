"""Nested options with attributes, as yacs has them."""

import ast

import yaml


class CfgNode(dict):
    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    __setattr__ = dict.__setitem__

    def merge(self, values):
        for key, value in values.items():
            if isinstance(value, dict):
                self[key].merge(value)
            else:
                old = self[key]  # an unknown key is an error
                self[key] = (
                    _decode(value) if not isinstance(old, str) or not isinstance(value, str) else value
                )

    def merge_from_file(self, path):
        with open(path) as file:
            self.merge(yaml.safe_load(file))

    def merge_from_list(self, pairs):
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            *path, name = key.split(".")
            for part in reversed(path):
                name, value = part, {name: value}
            self.merge({name: value})


def _decode(value):
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def get_cfg_default():
    def node(**values):
        return CfgNode(values)

    return node(
        OUTPUT_DIR="./output",
        RESUME="",
        SEED=-1,
        USE_CUDA=True,
        INPUT=node(SIZE=(32, 32)),
        DATASET=node(SUBSAMPLE_CLASSES="all"),
        DATALOADER=node(TRAIN_X=node(BATCH_SIZE=1)),
        MODEL=node(INIT_WEIGHTS="", BACKBONE=node(NAME="")),
        OPTIM=node(
            NAME="sgd",
            LR=0.0003,
            MAX_EPOCH=10,
            LR_SCHEDULER="cosine",
            WARMUP_EPOCH=-1,
            WARMUP_TYPE="linear",
            WARMUP_CONS_LR=1e-5,
            MOMENTUM=0.9,
            WEIGHT_DECAY=5e-4,
        ),
        TRAIN=node(CHECKPOINT_FREQ=0, PRINT_FREQ=10),
        TRAINER=node(NAME=""),
    )
