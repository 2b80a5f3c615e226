"""What is learned: the frozen CLIP with prompts (``base``), what a learner is (``learner``), and one file a method.

May import ``engine`` and below. Imported by training, evaluation and everything above. ``records`` lists the methods.
"""

from cocoop_fast.methods.coop import CoOp
from cocoop_fast.methods.linear_probe import LinearProbe
from cocoop_fast.methods.meta_nets import MetaNetsCLIP
from cocoop_fast.methods.records import build_model, knows_other_classes
from cocoop_fast.methods.zeroshot import ZeroShot

__all__ = ["CoOp", "LinearProbe", "MetaNetsCLIP", "ZeroShot", "build_model", "knows_other_classes"]
