"""The reference's configuration files and keys become ours, or are refused by name."""

import re
from pathlib import Path

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

    assert built.warnings == (
        "Not said, and so as in the reference: DATASET.SUBSAMPLE_CLASSES all, DATASET.NUM_SHOTS -1 (all images).",
    )
    assert (config.model.name, config.model.pretrained) == ("ViT-B-16-quickgelu", "openai")
    assert config.model.precision == "auto"  # fp16 where it was written for, a GPU
    assert config.prompt == default.prompt  # the defaults are that file's
    assert (config.optim.lr, config.optim.warmup_epochs, config.optim.warmup_lr) == (0.002, 1, 1e-5)
    assert (config.optim.batch_size, config.optim.epochs) == (1, 10)
    assert (config.eval_batch_size, config.data.workers, config.print_freq) == (100, 8, 20)
    assert (config.augment.crop_scale, config.augment.flip) == ((0.08, 1.0), 0.5)


def test_the_method_follows_from_the_section(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text(COOP_YAML)
    assert configuration.build(files=[path]).config.prompt.method == "coop"
    fields = read(COOP_YAML).fields
    assert (fields["optim.batch_size"], fields["optim.epochs"], fields["print_freq"]) == (32, 200, 5)


def test_a_method_chosen_elsewhere_outranks_the_section():
    translation = read(COCOOP_YAML, prompt__method="zeroshot")
    assert translation.fields["prompt.method"] == "zeroshot"
    assert "prompt.ctx_init" not in translation.fields
    assert [w for w in translation.warnings if "TRAINER.COCOOP.CTX_INIT is ignored" in w]


def test_trainer_name_decides_between_two_sections(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text("TRAINER: {NAME: CoOp, COOP: {N_CTX: 8}, COCOOP: {N_CTX: 4}}")
    assert configuration.build(files=[path]).config.prompt.n_ctx == 8
    assert configuration.build(files=[path], pairs=["TRAINER.NAME", "CoCoOp"]).config.prompt.n_ctx == 4
    path.write_text("TRAINER: {COOP: {N_CTX: 8}, COCOOP: {N_CTX: 4}}")
    with pytest.raises(UserError, match=r"both TRAINER\.COCOOP and TRAINER\.COOP"):
        configuration.build(files=[path])


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
        (["TRAINER.COOP.CTX_INIT", "False"], "prompt.ctx_init", ""),
        (["TRAINER.COOP.CTX_INIT", "False"], "prompt.n_ctx", 16),
        (["TRAINER.COOP.CSC", "True"], "prompt.csc", True),
        (["TRAINER.COOP.CSC", "True"], "prompt.ctx_init", ""),
        (["TRAINER.COOP.CLASS_TOKEN_POSITION", "middle"], "prompt.class_position", "middle"),
    ],
)
def test_trailing_pairs_of_the_reference(pairs, field, expected):
    section = any(key.startswith("TRAINER.") for key in pairs)
    value = configuration.build(pairs=pairs if section else ["TRAINER.NAME", "CoCoOp", *pairs]).config
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
        ("TRAINER.COOP.CTX_INIT", True, "the words that the context begins as are wanted"),
        ("TRAINER.COOP.CTX_INIT", "True", "the words that the context begins as are wanted"),
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
        "CTX_INIT": "a",
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


def test_the_migration_page_has_every_key():
    page = (Path(__file__).parents[2] / "docs/migration.md").read_text()
    table = page.split("## Every key", 1)[1].split("\n## ", 1)[0]
    listed = {
        key
        for row in table.splitlines()
        if row.startswith("|")
        for key in re.findall(r"`([A-Z_0-9.]+)`", row.split("|")[1])
    }
    expected = set(RULES) | {f"TRAINER.*.{key}" for key in METHOD_RULES}
    assert {key.replace("TRAINER..", "TRAINER.*.") for key in listed} >= {
        key for key in expected if "*" not in key
    }
    assert {f"TRAINER.*.{key}" for key in METHOD_RULES} <= set(re.findall(r"`(TRAINER\.\*\.[A-Z_]+)`", table))


# -- every file of the reference: what its train.py would learn, by its own table of defaults -----------------------

DATA_SETS = {
    "caltech101": "Caltech101", "dtd": "DescribableTextures", "eurosat": "EuroSAT", "fgvc_aircraft": "FGVCAircraft",
    "food101": "Food101", "imagenet": "ImageNet", "imagenet_a": "ImageNetA", "imagenet_r": "ImageNetR",
    "imagenet_sketch": "ImageNetSketch", "imagenetv2": "ImageNetV2", "oxford_flowers": "OxfordFlowers",
    "oxford_pets": "OxfordPets", "stanford_cars": "StanfordCars", "sun397": "SUN397", "ucf101": "UCF101",
}  # fmt: skip
# Of each file in configs/trainers: backbone, context as it says (words or a length), epochs.
TRAINERS_FILES = {
    "CoCoOp/vit_b16_c16_ep10_batch1": ("ViT-B/16", 16, 10),
    "CoCoOp/vit_b16_c4_ep10_batch1": ("ViT-B/16", 4, 10),
    "CoCoOp/vit_b16_c4_ep10_batch1_ctxv1": ("ViT-B/16", "a photo of a", 10),
    "CoCoOp/vit_b16_c8_ep10_batch1": ("ViT-B/16", 8, 10),
    "CoOp/rn101": ("RN101", None, 200),
    "CoOp/rn101_ep50": ("RN101", None, 50),
    "CoOp/rn50": ("RN50", None, 200),
    "CoOp/rn50_ctxv1": ("RN50", "a photo of a", 200),
    "CoOp/rn50_ep100": ("RN50", None, 100),
    "CoOp/rn50_ep50": ("RN50", None, 50),
    "CoOp/rn50_ep50_ctxv1": ("RN50", "a photo of a", 50),
    "CoOp/rn50_val": ("RN50", None, None),
    "CoOp/vit_b16": ("ViT-B/16", None, 200),
    "CoOp/vit_b16_ctxv1": ("ViT-B/16", "a photo of a", 200),
    "CoOp/vit_b16_ep100": ("ViT-B/16", None, 100),
    "CoOp/vit_b16_ep100_ctxv1": ("ViT-B/16", "a photo of a", 100),
    "CoOp/vit_b16_ep50": ("ViT-B/16", None, 50),
    "CoOp/vit_b16_ep50_ctxv1": ("ViT-B/16", "a photo of a", 50),
    "CoOp/vit_b32": ("ViT-B/32", None, 200),
    "CoOp/vit_b32_ep50": ("ViT-B/32", None, 50),
}


def imitation(tmp_path, name):
    """A file of configs/trainers by its name, with the keys that it has there."""
    trainer, (backbone, context, epochs) = name.split("/")[0], TRAINERS_FILES[name]
    text = COOP_YAML if trainer == "CoOp" else COCOOP_YAML
    values = yaml.safe_load(text)
    values["MODEL"]["BACKBONE"]["NAME"] = backbone
    values.pop("TRAINER")
    if trainer == "CoCoOp":
        words = isinstance(context, str)
        options = {"N_CTX": 4 if words else context, "CTX_INIT": context if words else "", "PREC": "fp16"}
        values["TRAINER"] = {"COCOOP": options}
    elif context:
        values["TRAINER"] = {"COOP": {"CTX_INIT": context}}
    if epochs is None:  # for evaluation: it says nothing of training
        del values["OPTIM"], values["TRAIN"]
    else:
        values["OPTIM"]["MAX_EPOCH"] = epochs
    path = tmp_path / "configs/trainers" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


def set_up(tmp_path, name):
    path = tmp_path / "configs/datasets" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'DATASET:\n  NAME: "{DATA_SETS[name]}"')
    return path


@pytest.mark.parametrize("name", TRAINERS_FILES)
def test_every_file_of_a_trainer_learns_what_it_learns_there(tmp_path, name):
    backbone, context, epochs = TRAINERS_FILES[name]
    built = configuration.build(files=[imitation(tmp_path, name)])
    config, words = built.config, isinstance(context, str)
    assert config.prompt.method == name.split("/")[0].lower()
    assert config.prompt.ctx_init == (context if words else "")
    assert words or config.prompt.n_ctx == (context or 16)
    assert (config.data.subset, config.data.shots) == ("all", 0)
    assert config.model.name == BACKBONES[backbone]
    assert config.optim.epochs == epochs
    recipe = [line for line in built.warnings if "published recipe of coop is used" in line]
    assert bool(recipe) == (epochs is None)
    assert not recipe or "OPTIM.NAME adam" in recipe[0]
    # And for another trainer, as `train.py --trainer` would.
    other = configuration.build(files=[imitation(tmp_path, name)], pairs=["TRAINER.NAME", "ZeroshotCLIP2"])
    assert (other.config.prompt.method, other.config.prompt.ensemble) == ("zeroshot", "select")


@pytest.mark.parametrize("name", DATA_SETS)
def test_every_file_of_a_data_set(tmp_path, name):
    files = [set_up(tmp_path, name), imitation(tmp_path, "CoCoOp/vit_b16_c4_ep10_batch1_ctxv1")]
    config = configuration.build(
        files=files, pairs=["DATASET.ROOT", "DATA", "DATASET.NUM_SHOTS", "16"]
    ).config
    assert config.data.name == name
    assert (config.data.subset, config.data.shots, config.prompt.method) == ("all", 16, "cocoop")
    with pytest.raises(UserError, match="trainer of the reference these keys are for: DATASET"):
        configuration.build(files=files[:1])


def test_folder_section_and_trainer_have_to_agree(tmp_path):
    path = tmp_path / "configs/trainers/CoOp/file.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("TRAINER: {COCOOP: {N_CTX: 4}}")
    with pytest.raises(UserError, match=r"in configs/trainers/CoOp, but the keys are for cocoop; say which"):
        configuration.build(files=[path])
    assert configuration.build(files=[path], pairs=["TRAINER.NAME", "CoCoOp"]).config.prompt.n_ctx == 4
    assert (
        configuration.build(files=[path], options={"prompt.method": ("--method", "coop")}).config.prompt.n_ctx
        == 16
    )
    foreign = tmp_path / "configs/trainers/MaPLe/file.yaml"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("OPTIM: {LR: 0.1}")
    with pytest.raises(UserError, match="MaPLe are for a trainer that is not offered"):
        configuration.build(files=[foreign])


def test_what_our_own_options_say_outranks_the_references_defaults(tmp_path):
    options = {
        "data.subset": ("--subset", "base"),
        "data.shots": ("--shots", 4),
        "prompt.n_ctx": ("--n-ctx", 2),
    }
    config = configuration.build([imitation(tmp_path, "CoOp/rn50")], options).config
    assert (config.data.subset, config.data.shots, config.prompt.n_ctx) == ("base", 4, 2)
    words = {"prompt.ctx_init": ("--ctx-init", "a sketch of a")}
    assert (
        configuration.build([imitation(tmp_path, "CoOp/rn50")], words).config.prompt.ctx_init
        == "a sketch of a"
    )


def test_a_protocol_says_classes_shots_and_methods_itself(tmp_path):
    config = configuration.build(pairs=["OPTIM.LR", "0.1"], protocol=True).config
    assert (config.data, config.prompt) == (RunConfig().data, RunConfig().prompt)
    config = configuration.build([imitation(tmp_path, "CoOp/vit_b16")], protocol=True).config
    assert (config.data.subset, config.data.shots) == (None, 16)
    assert (config.prompt.n_ctx, config.prompt.ctx_init) == (16, "")
