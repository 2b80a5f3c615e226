import argparse

import torch
import trainers.cocoop
import trainers.coop  # noqa: F401
from dassl.config import CfgNode, get_cfg_default
from dassl.engine import build_trainer
from dassl.utils import setup_logger


def setup_cfg(args):
    cfg = get_cfg_default()
    options = {"N_CTX": 16, "CTX_INIT": "", "PREC": "fp16"}
    cfg.TRAINER.COOP = CfgNode(options, CSC=False, CLASS_TOKEN_POSITION="end")
    cfg.TRAINER.COCOOP = CfgNode(options)
    if args.config_file:
        cfg.merge_from_file(args.config_file)
    cfg.OUTPUT_DIR, cfg.RESUME, cfg.TRAINER.NAME = args.output_dir, args.resume, args.trainer
    if args.seed:
        cfg.SEED = args.seed
    cfg.merge_from_list(args.opts)
    return cfg


def main(args):
    cfg = setup_cfg(args)
    if cfg.SEED >= 0:
        torch.manual_seed(cfg.SEED)
    setup_logger(cfg.OUTPUT_DIR)
    trainer = build_trainer(cfg)
    if args.eval_only:
        trainer.load_model(args.model_dir, epoch=args.load_epoch)
        trainer.test()
        return
    trainer.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for option in ("--output-dir", "--resume", "--config-file", "--trainer", "--model-dir"):
        parser.add_argument(option, type=str, default="")
    parser.add_argument("--seed", type=int, default=-1)
    parser.add_argument("--load-epoch", type=int)
    parser.add_argument("--eval-only", action="store_true")
    parser.add_argument("opts", default=None, nargs=argparse.REMAINDER)
    main(parser.parse_args())
