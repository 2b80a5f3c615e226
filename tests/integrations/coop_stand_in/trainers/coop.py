from dassl.engine import TRAINER_REGISTRY

from trainers import cocoop
from trainers.cocoop import load_clip_to_cpu  # noqa: F401


@TRAINER_REGISTRY.register()
class CoOp(cocoop.CoCoOp):
    section, conditional = "COOP", False
