"""A trained classifier as one ONNX file: image tower, Meta-Net, and the class tree or what is fixed of the text features."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cocoop_fast.engine.constants import compute_constants
from cocoop_fast.engine.contexts import ContextRows, Contexts, ShiftedContext, dense_contexts
from cocoop_fast.engine.torch_tower import TorchTower
from cocoop_fast.errors import UserError
from cocoop_fast.experiments.predict import Predictor
from cocoop_fast.files.atomic import write_atomically
from cocoop_fast.methods import LinearProbe, ZeroShot
from cocoop_fast.methods.base import LearnedPromptCLIP, PromptedCLIP
from cocoop_fast.methods.learner import ContextLearner, Learner
from cocoop_fast.runs.directory import read_run
from cocoop_fast.variants import name_of

# Cosines of unit vectors in float32, each the end of two towers whose sums are taken in another order.
COSINE_BOUND = 2e-5
_OPSET = 18
_MOST_BYTES = 2_000_000_000  # of one protocol buffer


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        file: the model: input ``image`` (B, 3, H, W) float32, preprocessed; output ``logits`` (B, K) float32. Its metadata
            hold ``classnames``, ``mean``, ``std`` and ``image_size`` as JSON.
        text: "tree", computed for each image, or "fixed".
        nbytes: of the file.
        difference: the largest between onnxruntime's logits and torch's, on random images.
    """

    file: Path
    text: str
    nbytes: int
    difference: float


class _Classifier(nn.Module):
    """The model in traceable operations: (B, 3, H, W) images to (B, K) logits."""

    fixed: Tensor | None
    vectors: Tensor | None

    def __init__(self, model: PromptedCLIP) -> None:
        super().__init__()
        self.image_encoder = model.image_encoder
        self.logit_scale = model.logit_scale
        self.probe = model.prompt_learner if isinstance(model, LinearProbe) else None
        self.learner: Learner | None = None
        self.tower: TorchTower | None = None
        fixed: Tensor | None = None  # unit length
        beside = model.averaged_with if isinstance(model, LearnedPromptCLIP) else None
        vectors: Tensor | None = None
        if isinstance(model, LearnedPromptCLIP):
            some = torch.ones(2, model.embed_dim) / model.embed_dim**0.5
            contexts = model.prompt_learner.contexts(some)
            if _is_shared(contexts, class_specific=model.tree_encoder.tree.class_specific):
                fixed = model.text_features(some)[0]
            else:
                self.learner = model.prompt_learner
                if isinstance(self.learner, ContextLearner):
                    vectors = self.learner.vectors().detach()  # without the table of words that some are from
                self.tower = TorchTower(
                    compute_constants(model.tree_encoder.frozen.text_weights(), model.tree_encoder.tree)
                )
                self.own_context = model.tree_encoder.tree.class_specific
        elif isinstance(model, ZeroShot):
            fixed = model.mean_features
        if fixed is not None:
            fixed = fixed / fixed.norm(dim=-1, keepdim=True)
        if beside is not None:
            beside = beside / beside.norm(dim=-1, keepdim=True)
        self.register_buffer("fixed", fixed)
        self.register_buffer("beside", beside)
        self.register_buffer("vectors", vectors)

    def forward(self, image: Tensor) -> Tensor:
        features = self.image_encoder(image)
        if self.probe is not None:
            return self.probe(features)
        features = features / features.norm(dim=-1, keepdim=True)
        scaled = features * self.logit_scale.exp()
        own = self._own(features, scaled)
        return own if self.beside is None else (own + scaled @ self.beside.T) / 2

    def _own(self, features: Tensor, scaled: Tensor) -> Tensor:
        if self.fixed is not None:
            return scaled @ self.fixed.T
        assert self.tower is not None and self.learner is not None
        if isinstance(self.learner, ContextLearner) and self.vectors is not None:
            contexts = dense_contexts(self.learner.shifted(self.vectors, features))
        else:
            contexts = dense_contexts(self.learner.contexts(features))
        if self.own_context:
            contexts = contexts.flatten(-3, -2)
        text = self.tower.encode(ContextRows(None, contexts))[:, self.tower.constants.leaf_of_class]
        text = text / text.norm(dim=-1, keepdim=True)
        return torch.einsum("be,bke->bk", scaled, text)


def _is_shared(contexts: Contexts, *, class_specific: bool) -> bool:
    """Whether all images have the same contexts."""
    return not isinstance(contexts, ShiftedContext) and contexts.ndim == (3 if class_specific else 2)


@torch.no_grad()
def export_onnx(run_dir: Path | str, file: Path, *, classnames: Sequence[str] | None = None) -> Exported:
    """Write the classifier of a run, in float32, and compare it with torch.

    Args:
        run_dir: what ``experiment.run`` wrote.
        file: to write, whole or not at all.
        classnames: classes to choose from, as for :meth:`Predictor.from_run`; fixed in the file.

    Raises:
        UserError: no run there, class names that cannot be used, packages that are not installed, a model of more than 2 GB,
            or one whose ONNX form does not compute the same.
    """
    _check_installed()
    if not file.parent.is_dir():
        raise UserError(f"The folder {file.parent} of --onnx is not there; make it first.")
    if file.is_dir():
        raise UserError(f"--onnx {file} is a folder; name a file.")
    config, _ = read_run(run_dir)
    single = replace(
        config,
        model=replace(config.model, precision="fp32", device="cpu", backend="torch", image_backend="torch"),
    )
    predictor = Predictor.from_run(run_dir, classnames=classnames, config=single)
    model, clip = predictor.model, predictor.clip
    assert isinstance(model, PromptedCLIP)
    classifier = _Classifier(model).eval()
    shape = (3, clip.image_size, clip.image_size)
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    expected = model(images)
    classifier(images)  # constants that are made when they are first asked for are now real tensors
    if sum(one.nbytes for one in (*classifier.parameters(), *classifier.buffers())) > _MOST_BYTES:
        raise UserError("The model is larger than the 2 GB that one ONNX file can hold.")
    about = {
        "classnames": list(predictor.classnames),
        "mean": list(clip.mean),
        "std": list(clip.std),
        "image_size": clip.image_size,
        "model": clip.name,
        "method": name_of(config),
    }
    content = _to_onnx(classifier, images[:2], about)
    difference = float((_by_onnxruntime(content, images) - expected).abs().max())
    scale = 1.0 if classifier.probe is not None else float(model.logit_scale.exp())
    size = float(expected.abs().max()) if classifier.probe is not None else 1.0
    if not difference <= COSINE_BOUND * scale * size:
        raise UserError(
            f"onnxruntime's logits differ from torch's by up to {difference:.2g}, which is more than rounding; nothing "
            "is written. Please report it with the versions of torch, onnxscript and onnxruntime.",
            exit_status=1,
        )
    write_atomically(file, lambda out: out.write(content))
    return Exported(file, "fixed" if classifier.tower is None else "tree", len(content), difference)


def _to_onnx(classifier: nn.Module, images: Tensor, about: dict[str, object]) -> bytes:
    with _silent():
        # Traced by itself first: the exporter would rather fix the number of images than fail.
        batch = {"image": {0: torch.export.Dim("batch")}}
        traced = torch.export.export(classifier, (images,), dynamic_shapes=batch)
        program = torch.onnx.export(
            traced,
            input_names=["image"],
            output_names=["logits"],
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props.update({name: json.dumps(value) for name, value in about.items()})
    return program.model_proto.SerializeToString()


def _by_onnxruntime(content: bytes, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    [logits] = session.run(None, {"image": images.numpy()})
    return torch.from_numpy(logits)


@contextmanager
def _silent() -> Iterator[None]:
    """The exporter tells of each of its steps; what goes wrong in it is an exception."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


def _check_installed() -> None:
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise UserError(
            f"Export to ONNX needs {error.name}, which is not installed: pip install 'cocoop-fast[onnx]'."
        ) from error
    del onnx, onnxruntime, onnxscript
