"""The reference's configuration files and keys become ours, or are refused by name."""

import pytest
import yaml

from cocoop_fast.cli import configuration
from cocoop_fast.cli.reference_config import BACKBONES, METHOD_RULES, RULES, is_reference_key, translate
from cocoop_fast.config import RunConfig
from cocoop_fast.errors import UserError

# In the spelling of the reference's files: tuples as text, 1e-5 (which YAML reads as text), both kinds of quotes.
COCOOP_YAML = """
DATALOADER:
  TRAIN_X:
    BATCH_SIZE: 1
  TEST:
    BATCH_SIZE: 100
  NUM_WORKERS: 8

INPUT:
  SIZE: (224, 224)
  INTERPOLATION: "bicubic"
  PIXEL_MEAN: [0.48145466, 0.4578275, 0.40821073]
  PIXEL_STD: [0.26862954, 0.26130258, 0.27577711]
  TRANSFORMS: ["random_resized_crop", "random_flip", "normalize"]

OPTIM:
  NAME: "sgd"
  LR: 0.002
  MAX_EPOCH: 10
  LR_SCHEDULER: "cosine"
  WARMUP_EPOCH: 1
  WARMUP_TYPE: "constant"
  WARMUP_CONS_LR: 1e-5

TRAIN:
  PRINT_FREQ: 20

MODEL:
  BACKBONE:
    NAME: "ViT-B/16"

TRAINER:
  COCOOP:
    N_CTX: 4
    CTX_INIT: "a photo of a"
    PREC: "fp16"
"""
COOP_YAML = (
    COCOOP_YAML.replace("BATCH_SIZE: 1\n", "BATCH_SIZE: 32\n")
    .replace("MAX_EPOCH: 10", "MAX_EPOCH: 200")
    .replace("PRINT_FREQ: 20", "PRINT_FREQ: 5")
    .replace(
        'COCOOP:\n    N_CTX: 4\n    CTX_INIT: "a photo of a"\n    PREC: "fp16"',
        'COOP:\n    CTX_INIT: "a photo of a"',
    )
)


def read(text, **chosen):
    return translate(yaml.safe_load(text), "file.yaml", {k.replace("__", "."): v for k, v in chosen.items()})


def test_the_papers_file_becomes_the_papers_recipe(tmp_path):
    path = tmp_path / "vit_b16_c4_ep10_batch1_ctxv1.yaml"
    path.write_text(COCOOP_YAML)
    built = configuration.build(files=[path], pairs=["data.root", str(tmp_path)])
    config, default = built.config, RunConfig()

    assert built.warnings == ()
    assert (config.model.name, config.model.pretrained) == ("ViT-B-16-quickgelu", "openai")
    assert config.model.precision == "auto"  # fp16 where it was written for, a GPU
    assert config.prompt == default.prompt  # the defaults are that file's
    assert (config.optim.lr, config.optim.warmup_epochs, config.optim.warmup_lr) == (0.002, 1, 1e-5)
    assert (config.optim.batch_size, config.optim.epochs) == (1, 10)
    assert (config.eval_batch_size, config.data.workers, config.print_freq) == (100, 8, 20)
    assert (config.augment.crop_scale, config.augment.flip) == ((0.08, 1.0), 0.5)


def test_the_method_follows_from_the_section():
    fields = read(COOP_YAML).fields
    assert fields["prompt.method"] == "coop"
    assert (fields["optim.batch_size"], fields["optim.epochs"], fields["print_freq"]) == (32, 200, 5)


def test_a_method_chosen_elsewhere_outranks_the_section():
    translation = read(COCOOP_YAML, prompt__method="zeroshot")
    assert translation.fields["prompt.method"] == "zeroshot"
    assert "prompt.ctx_init" not in translation.fields
    assert [w for w in translation.warnings if "TRAINER.COCOOP.CTX_INIT is ignored" in w]


def test_trainer_name_decides_between_two_sections():
    text = "TRAINER: {NAME: CoOp, COOP: {N_CTX: 16}, COCOOP: {N_CTX: 4}}"
    assert read(text).fields["prompt.n_ctx"] == 16
    with pytest.raises(UserError, match=r"both TRAINER\.COCOOP and TRAINER\.COOP"):
        read(text.replace("NAME: CoOp, ", ""))


@pytest.mark.parametrize(
    ("pairs", "field", "expected"),
    [
        (["OPTIM.LR", "0.01"], "optim.lr", 0.01),
        (["TRAINER.COCOOP.CTX_INIT", "a picture of one"], "prompt.ctx_init", "a picture of one"),
        (["TRAINER.COCOOP.N_CTX", "16", "TRAINER.COCOOP.CTX_INIT", ""], "prompt.ctx_init", ""),
        (["DATASET.NAME", "OxfordPets"], "data.name", "oxford_pets"),
        (["DATASET.NAME", "ImageNetV2"], "data.name", "imagenetv2"),
        (["DATASET.NUM_SHOTS", "4"], "data.shots", 4),
        (["DATASET.NUM_SHOTS", "0"], "data.shots", 0),
        (["DATASET.SUBSAMPLE_CLASSES", "new"], "data.subset", "new"),
        (["SEED", "7"], "seed", 7),
        (["USE_CUDA", "False"], "model.device", "cpu"),
        (["OPTIM.WARMUP_CONS_LR", "1e-5"], "optim.warmup_lr", 1e-5),
        (["TRAINER.COOP.PREC", "amp"], "model.precision", "amp"),
        (["INPUT.TRANSFORMS", "['random_resized_crop', 'normalize']"], "augment.flip", 0.0),
        (["INPUT.RRCROP_SCALE", "(0.5, 1.0)"], "augment.crop_scale", (0.5, 1.0)),
        (["TRAINER.NAME", "ZeroshotCLIP"], "prompt.method", "zeroshot"),
        (["TRAINER.NAME", "ZeroshotCLIP2"], "prompt.ensemble", "select"),
        (["TRAINER.COOP.CSC", "True"], "prompt.csc", True),
        (["TRAINER.COOP.CSC", "True"], "prompt.ctx_init", ""),
        (["TRAINER.COOP.CLASS_TOKEN_POSITION", "middle"], "prompt.class_position", "middle"),
    ],
)
def test_trailing_pairs_of_the_reference(pairs, field, expected):
    value = configuration.build(pairs=pairs).config
    for part in field.split("."):
        value = getattr(value, part)
    assert value == expected


@pytest.mark.parametrize(
    ("key", "value", "fragment"),
    [
        ("OPTIM.NAME", "adam", "OPTIM.NAME is 'adam', but only 'sgd' is offered"),
        ("OPTIM.LR_SCHEDULER", "single_step", "OPTIM.LR_SCHEDULER"),
        ("OPTIM.WARMUP_TYPE", "linear", "OPTIM.WARMUP_TYPE"),
        ("OPTIM.SGD_NESTEROV", True, "OPTIM.SGD_NESTEROV"),
        ("INPUT.INTERPOLATION", "bilinear", "INPUT.INTERPOLATION"),
        ("INPUT.PIXEL_MEAN", [0.485, 0.456, 0.406], "only CLIP's own mean"),
        ("INPUT.TRANSFORMS", ["random_resized_crop", "cutout", "normalize"], "INPUT.TRANSFORMS"),
        ("INPUT.SIZE", "(448, 448)", "INPUT.SIZE is '(448, 448)', but ViT-B/16 takes"),
        ("MODEL.BACKBONE.NAME", "resnet18", "MODEL.BACKBONE.NAME is 'resnet18'"),
        ("MODEL.INIT_WEIGHTS", "weights.pth", "MODEL.INIT_WEIGHTS"),
        ("TRAINER.COCOOP.PREC", "fp8", "TRAINER.COCOOP.PREC"),
        ("TRAINER.NAME", "DomainMix", "only CoCoOp, CoOp, ZeroshotCLIP, ZeroshotCLIP2 are offered"),
        ("TEST.FINAL_MODEL", "best_val", "TEST.FINAL_MODEL"),
        ("DATASET.NAME", "OfficeHome", "one folder a class"),
        ("SEED", -1, "SEED is -1"),
        ("RESUME", "output/run", "giving its output directory"),
        ("OPTIM.LEARNING_RATE", 1, "OPTIM.LEARNING_RATE is not a key"),
        ("TRAINER.COCOOP.NCTX", 4, "did you mean TRAINER.COCOOP.N_CTX?"),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(key, value, fragment):
    with pytest.raises(UserError) as caught:
        translate({key: value}, "file.yaml")
    assert fragment in str(caught.value)
    assert str(caught.value).startswith("file.yaml: ")


@pytest.mark.parametrize(
    "key", ["VERBOSE", "TEST.NO_TEST", "TRAINER.DDAIG.G_ARCH", "INPUT.GN_MEAN", "OPTIM.ADAM_BETA1"]
)
def test_what_is_harmless_is_left_out_with_a_line(key):
    translation = translate({key: 1}, "file.yaml")
    assert translation.fields == {}
    assert translation.warnings == (f"file.yaml: {key} is ignored; it does not change what is learned.",)


def test_a_data_set_chosen_elsewhere_outranks_the_file():
    translation = read("DATASET: {NAME: OxfordPets}", data__name="folder")
    assert translation.fields == {}
    assert "DATASET.NAME is ignored" in translation.warnings[0]


def test_image_sizes_of_larger_backbones():
    text = "INPUT: {SIZE: '(288, 288)'}\nMODEL: {BACKBONE: {NAME: RN50x4}}"
    assert read(text).fields == {"model.name": "RN50x4-quickgelu", "model.pretrained": "openai"}


def test_backbones_are_open_clip_architectures():
    import open_clip

    for name in BACKBONES.values():
        assert "openai" in open_clip.list_pretrained_tags_by_model(name), name


def test_every_field_that_a_rule_names_exists():
    samples = {
        "DATASET.NAME": "digits",
        "DATASET.SUBSAMPLE_CLASSES": "all",
        "INPUT.TRANSFORMS": ["random_resized_crop", "normalize"],
        "MODEL.BACKBONE.NAME": "RN50",
        "TRAINER.NAME": "CoOp",
        "USE_CUDA": False,
        "PREC": "amp",
    }
    known = set(configuration.field_names())
    named = set()
    for key, rule in {**RULES, **METHOD_RULES}.items():
        try:
            named |= set(rule(samples.get(key, 1)))
        except ValueError as error:  # a choice that is built in; a rule that names a field takes its sample
            assert "is offered" in str(error) or key in ("RESUME", "MODEL.INIT_WEIGHTS"), key
    assert named <= known
    some = {"data.name", "optim.lr", "prompt.n_ctx", "model.precision", "augment.flip", "model.device"}
    assert some <= named


def test_keys_are_told_apart_by_their_case():
    assert is_reference_key("OPTIM.LR") and is_reference_key("SEED")
    assert not is_reference_key("optim.lr") and not is_reference_key("Seed")
