"""What was learned, as a folder to give away: a few kilobytes of tensors, what they are, and a card that says so.

model.safetensors   the learned parameters, by name
config.json         the method and its options, the class names, which CLIP, and a fingerprint of its weights
README.md           the card that the Hugging Face hub shows
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from cocoop_fast.clip.fingerprint import fingerprint
from cocoop_fast.clip.hub import hub_file, unreachable
from cocoop_fast.clip.weights import HUB
from cocoop_fast.config import ModelConfig, PromptConfig, RunConfig
from cocoop_fast.errors import UserError
from cocoop_fast.files.atomic import write_atomically, write_json
from cocoop_fast.files.parsing import json_value
from cocoop_fast.methods.base import PromptedCLIP
from cocoop_fast.methods.cocoop import CustomCLIP
from cocoop_fast.methods.coop import CoOp
from cocoop_fast.methods.learner import ContextLearner
from cocoop_fast.methods.meta_nets import MetaNetsCLIP
from cocoop_fast.methods.records import knows_other_classes, method_title
from cocoop_fast.readable import listed
from cocoop_fast.runs.checkpoint import load_parameters
from cocoop_fast.variants import name_of

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_FORMAT, _VERSION = "cocoop_fast prompt learner", 1
_KINDS: dict[str, Any] = {
    "prompt": PromptConfig | None,
    "clip": str | None,
    "pretrained": str | None,
    "fingerprint": dict[str, str],
    "classnames": tuple[str, ...] | None,
}


@dataclass(frozen=True)
class SharedLearner:
    """What such a folder holds.

    Args:
        prompt: the method and its options; ``None``: a learner of somebody's own, which the folder does not describe.
        clip: open_clip's or OpenAI's name of the CLIP, "hf-hub:OWNER/NAME" or "demo"; ``None``: it has none.
        pretrained: the tag of its weights, or the name of their file.
        fingerprint: of the CLIP, as :func:`cocoop_fast.clip.fingerprint.fingerprint` makes it.
        classnames: that were trained on; ``None``: a learner of somebody's own that does not say.
        parameters: what was learned, by name.
    """

    prompt: PromptConfig | None
    clip: str | None
    pretrained: str | None
    fingerprint: dict[str, str]
    classnames: tuple[str, ...] | None
    parameters: dict[str, Tensor]

    @property
    def title(self) -> str:
        """The method, as people read it."""
        if self.prompt is None:
            return "A learned prompt"
        return method_title(name_of(RunConfig(prompt=self.prompt)))

    @property
    def clip_title(self) -> str:
        """The CLIP, as people read it."""
        if self.clip is None:
            return "a CLIP without a name"
        return f"{self.clip} ({self.pretrained})" if self.pretrained else self.clip


def learned_by(
    model: PromptedCLIP,
    *,
    clip: ModelConfig | None = None,
    prompt: PromptConfig | None = None,
    classnames: Sequence[str] | None = None,
) -> SharedLearner:
    """What a model has learned, ready to be shared.

    Args:
        model: any method of this package, or a :class:`Learner` of one's own.
        clip: names the CLIP, so that it can be loaded by others; ``None``: who loads it has to bring it.
        prompt, classnames: ``None``: those of the model's learner, if it is a :class:`ContextLearner`.

    Raises:
        UserError: nothing was learned.
    """  # fmt: skip
    learner = model.prompt_learner
    parameters = {name: value.detach().cpu().contiguous() for name, value in learner.named_parameters()}
    if not parameters:
        raise UserError("Zero-shot CLIP learns nothing, so there is nothing to share.")
    if isinstance(learner, ContextLearner):
        if prompt is None and getattr(model, "averaged_with", None) is not None:
            raise UserError(
                "The model's logits are averaged with zero-shot CLIP's, whose prompts it does not name; share its run instead."
            )
        prompt = prompt or _prompt_of(model, learner)
        classnames = classnames or learner.classnames
    pretrained = None if clip is None else clip.pretrained
    if pretrained is not None and Path(pretrained).is_file():
        pretrained = Path(pretrained).name  # where it lies here is nobody's business
    name = None if clip is None else clip.name
    names = None if classnames is None else tuple(classnames)
    return SharedLearner(prompt, name, pretrained, fingerprint(model._whole_clip[0]), names, parameters)


def _prompt_of(model: PromptedCLIP, learner: ContextLearner) -> PromptConfig | None:
    kinds: dict[type, Any] = {CoOp: "coop", CustomCLIP: "cocoop", MetaNetsCLIP: "meta-nets"}
    method = kinds.get(type(model))
    return None if method is None else PromptConfig(method=method, **learner.options())


def save_shared(shared: SharedLearner, folder: Path | str, about: str = "") -> Path:
    """Write the folder, which is made if need be; its other files stay.

    Args:
        about: for the card, Markdown: results, data.

    Raises:
        UserError: it cannot be written.
    """
    folder = Path(folder)
    values = {
        "format": _FORMAT,
        "version": _VERSION,
        **{name: value for name, value in vars(shared).items() if name not in ("prompt", "parameters")},
        "prompt": None if shared.prompt is None else asdict(shared.prompt),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        weights = save(shared.parameters, {"format": "pt"})
        write_atomically(folder / WEIGHTS, lambda file: file.write(weights))
        write_json(folder / CONFIG, values)
        card = model_card(shared, about).encode()
        write_atomically(folder / CARD, lambda file: file.write(card))
    except OSError as error:
        raise UserError(
            f"What was learned cannot be written to {folder}: {error.strerror}.", exit_status=1
        ) from error
    return folder


def load_shared(place: Path | str) -> SharedLearner:
    """Read a folder, or a repository of the hub, ``OWNER/NAME`` with or without ``hf-hub:``. Nothing in it is run.

    Raises:
        UserError: neither is there, or what is there is damaged or something else.
    """
    paths = {name: _file(place, name) for name in (CONFIG, WEIGHTS)}
    try:
        values = json_value(paths[CONFIG].read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("format") != _FORMAT:
            raise UserError(f"{place} has a {CONFIG}, but no learned prompt of cocoop_fast.", exit_status=1)
        if values.get("version") != _VERSION:
            raise UserError(
                f"{place} has a learned prompt of format {values.get('version')}, and this version reads {_VERSION}; "
                "update cocoop_fast.",
                exit_status=1,
            )
        content = {name: TypeAdapter(kind).validate_python(values[name]) for name, kind in _KINDS.items()}
        return SharedLearner(**content, parameters=load_file(paths[WEIGHTS]))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError, ValidationError) as error:
        raise UserError(
            f"The learned prompt in {place} is damaged ({type(error).__name__}); get it again.", exit_status=1
        ) from error


def save_pretrained(
    model: PromptedCLIP, folder: Path | str, *, clip: ModelConfig | None = None, about: str = ""
) -> Path:
    """Write what a model has learned to a folder that can be given away: see :class:`SharedLearner`.

    Args:
        model, clip: as for :func:`learned_by`.
        about: for the card, Markdown.

    Raises:
        UserError: nothing was learned, or it cannot be written.
    """
    return save_shared(learned_by(model, clip=clip), folder, about)


def load_pretrained(model: PromptedCLIP, place: Path | str) -> None:
    """Take over what such a folder, or repository of the hub, has learned. If it does not fit, the model stays as it was.

    Args:
        model: of the same method, on the same CLIP; its classes may be others, unless what was learned belongs to those.
        place: as for :func:`load_shared`.

    Raises:
        UserError: as :func:`load_shared`, or it was learned on another CLIP, by another method or for other classes.
    """
    shared, learner = load_shared(place), model.prompt_learner
    check_clip(shared, model._whole_clip[0], str(place))
    if shared.prompt is not None and isinstance(learner, ContextLearner):
        check_classes(shared, learner.classnames, str(place))
        here, there = learner.options(), asdict(shared.prompt)
        for name in ("csc", "class_position", "attributes", "ablate_image"):
            if here[name] != there[name]:
                raise UserError(
                    f"{place} was learned with {name} {there[name]!r}, and this model has {here[name]!r}; make it with the same.",
                    exit_status=1,
                )
    load_parameters(model, shared.parameters, str(place))


def check_classes(shared: SharedLearner, classnames: Sequence[str], where: str) -> None:
    """Raises a UserError if what was learned belongs to classes, and these are others."""
    bound = shared.prompt is not None and not knows_other_classes(shared.prompt)
    if bound and tuple(classnames) != shared.classnames:
        raise UserError(
            f"What {where} learned belongs to the {len(shared.classnames or ())} classes that it was trained on "
            f"({listed(shared.classnames or ())}), so it cannot choose among others.",
            exit_status=1,
        )


def _file(place: Path | str, name: str) -> Path:
    folder = Path(place)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise UserError(
                f"{place} has no {name}, so it is not a learned prompt that was shared.", exit_status=1
            )
        return folder / name
    repository = str(place).removeprefix(HUB)
    if repository.count("/") != 1 or repository.startswith((".", "/", "~")):
        raise UserError(
            f"There is no folder {place}, and it is no repository of the hub, which is OWNER/NAME."
        )
    try:
        return hub_file(repository, name)
    except Exception as error:  # the hub's client has dozens of its own
        reason = " ".join(str(error).split()).rstrip(".")[:300]
        raise UserError(
            f"There is no folder {place}, and {name} of {repository} could not be had from the hub: {reason}.",
            exit_status=1,
        ) from error


def check_clip(shared: SharedLearner, clip_model: Any, where: str) -> None:
    """Raises a UserError if what was learned is of another CLIP's weights, and warns where that cannot be told."""
    here, there = fingerprint(clip_model), shared.fingerprint
    common = sorted(here.keys() & there.keys())
    if not common:
        warnings.warn(
            f"{where} was learned on weights in {', '.join(there)}, and this CLIP is in {', '.join(here)}, so that it cannot be "
            "told whether these are the same; load it in float32 to be sure.",
            stacklevel=3,
        )
    for kind in common:
        if here[kind] != there[kind]:
            raise UserError(
                f"{where} was learned on {shared.clip_title}, and this CLIP has other weights (fingerprint {there[kind][:12]} "
                f"there, {here[kind][:12]} here); load the CLIP that it was learned on.",
                exit_status=1,
            )


def push_shared(
    shared: SharedLearner,
    repository: str,
    about: str = "",
    *,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Upload the folder to the hub; the repository is made if need be.

    Args:
        repository: OWNER/NAME.
        private, token: as in huggingface_hub; by default public, with the token that ``hf auth login`` keeps.

    Returns:
        Its address.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    repository = repository.removeprefix(HUB)
    reason = unreachable(constants.ENDPOINT)
    if reason is not None:
        raise UserError(
            f"{constants.ENDPOINT} cannot be reached ({reason}), so nothing is uploaded.", exit_status=1
        )
    with TemporaryDirectory() as folder:
        save_shared(shared, folder, about)
        try:
            huggingface_hub.create_repo(repository, private=private, token=token, exist_ok=True)
            huggingface_hub.upload_folder(
                repo_id=repository,
                folder_path=folder,
                token=token,
                commit_message=f"{shared.title} on {shared.clip_title}",
            )
        except Exception as error:  # of the hub's client, or of HTTP
            reason = " ".join(str(error).split()).rstrip(".")[:300]
            raise UserError(
                f"{repository} could not be uploaded: {reason}. Is the name OWNER/NAME, and did you log in with `hf auth login`?",
                exit_status=1,
            ) from error
    return f"{constants.ENDPOINT}/{repository}"


def model_card(shared: SharedLearner, about: str = "") -> str:
    """The card's Markdown, with the header that the hub reads."""
    names = shared.classnames or ()
    count = sum(value.numel() for value in shared.parameters.values())
    method = "learner" if shared.prompt is None else shared.prompt.method
    use = 'predictor = Predictor.from_pretrained("OWNER/NAME")  # or a folder with these files'
    parts = [
        "---",
        "library_name: cocoop_fast",
        "pipeline_tag: image-classification",
        f"tags: [clip, prompt-learning, {method}]",
        *(
            [f"base_model: {shared.clip.removeprefix(HUB)}"]
            if shared.clip and shared.clip.startswith(HUB)
            else []
        ),
        "---",
        "",
        f"# {shared.title} on {shared.clip_title}",
        "",
        f"{count:,} learned numbers, for the frozen CLIP {shared.clip_title}, whose weights have the fingerprint",
        *(f"`{kind} {digest}`" for kind, digest in shared.fingerprint.items()),
        "",
        *([f"Trained on {len(names):,} classes: {listed(names)}.", ""] if names else []),
        *([about.strip(), ""] if about else []),
        "## Use",
        "",
        "```python",
        "from cocoop_fast import Predictor",
        "",
        use,
        'predictor.predict(["photo.jpg"])',
        "```",
        "",
        "## Citation",
        "",
        "Zhou, Yang, Loy, Liu: Conditional Prompt Learning for Vision-Language Models, CVPR 2022, arXiv:2203.05557.",
        "",
    ]
    return "\n".join(parts)
