"""A whole experiment: train on one set of classes, evaluate on base and new ones, compare methods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from cocoop_fast.config import DataConfig, Method, ResolvedConfig, RunConfig, Subset, to_mapping
from cocoop_fast.data import Dataset
from cocoop_fast.data.few_shot import select_classes
from cocoop_fast.distributed.ranks import ALONE, Ranks
from cocoop_fast.errors import UserError
from cocoop_fast.evaluation.metrics import Metrics, harmonic_mean
from cocoop_fast.experiments.material import Material
from cocoop_fast.experiments.shared import Shared
from cocoop_fast.experiments.training_run import TrainingRun, refuse_other_images
from cocoop_fast.methods import knows_other_classes
from cocoop_fast.methods.records import label_of
from cocoop_fast.readable import html_table
from cocoop_fast.runs import checkpoint, reference_checkpoint
from cocoop_fast.runs.directory import RunDirectory, check_same_run, open_run, read_run, refuse_link
from cocoop_fast.runs.recipe import resolve, with_data, with_method
from cocoop_fast.training.observer import Observer


@dataclass(frozen=True)
class Row:
    """One method's result. Accuracies are percentages; those that were not asked for are ``None``."""

    method: str
    seed: int
    base: float | None
    new: float | None
    h: float | None  # harmonic mean of base and new
    all: float | None
    train_seconds: float
    output_dir: Path
    attributes: tuple[str, ...] = ()  # between learned contexts

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**self.__dict__, "output_dir": str(self.output_dir), "attributes": list(self.attributes)}

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> Row:
        """The inverse."""
        own = {"output_dir": Path(values["output_dir"]), "attributes": tuple(values.get("attributes", ()))}
        return cls(**{**values, **own})


@dataclass(frozen=True)
class Results:
    """Rows in the order in which the methods ran: the configured one first."""

    rows: tuple[Row, ...]
    output_dir: Path

    def _repr_html_(self) -> str:
        """What a notebook shows: a row a method, with those accuracies that were measured."""
        measured = [
            name
            for name in ("base", "new", "h", "all")
            if any(getattr(row, name) is not None for row in self.rows)
        ]
        rows = [
            [
                f"{label_of(row.method, row.attributes)}, seed {row.seed}",
                *("-" if (value := getattr(row, name)) is None else f"{value:.2f}" for name in measured),
                f"{row.train_seconds:.1f}",
            ]
            for row in self.rows
        ]
        titles = [{"h": "H"}.get(name, name.capitalize()) for name in measured]
        return f"<p>Accuracy in percent.</p>{html_table(['Method', *titles, 'Training, s'], rows)}"


def run(
    config: RunConfig,
    *,
    compare: tuple[Method, ...] = (),
    observer: Observer | None = None,
    overwrite: bool = False,
    shared: Shared | None = None,
    ranks: Ranks = ALONE,
) -> Results:
    """Train ``config``'s method, evaluate it, and do the same for the methods in ``compare``.

    With ``data.subset`` "base" the model is trained on the first half of the classes and evaluated on both
    halves (the paper's section 4.1); with "new" or "all" it is trained and evaluated on those classes. Every
    compared method has its own recipe and lives in ``output_dir/<method>``. A directory that holds an
    unfinished run of the same configuration is resumed; a finished one is read, not trained again.

    Args:
        config: as read by :mod:`cocoop_fast.config`; what it leaves open is resolved here.
        compare: further methods; the configured one is left out if named again.
        observer: is told about progress.
        overwrite: discard what the output directory holds.
        shared: with other experiments of this process; ``None``: everything is loaded and encoded anew.
        ranks: that run this together. All get the results; the first alone writes, and should alone observe.

    Raises:
        UserError: anything wrong with the configuration, the data, or the output directory.
    """
    observer, shared = observer or Observer(), shared or Shared()
    dataset = shared.dataset(config.data)
    first = resolve(config, dataset)
    others = [method for method in dict.fromkeys(compare) if method != config.prompt.method]
    plans = [
        first,
        *(resolve(with_method(config, method, first.output_dir / method), dataset) for method in others),
    ]
    material = Material(first, dataset, shared, observer, ranks)
    with opened(plans, material, overwrite=overwrite) as directories:
        rows = [
            _run_method(plan, directory, material) for plan, directory in zip(plans, directories, strict=True)
        ]
        if ranks.is_first:
            known = directories[0].results() or {}
            directories[0].write_results({**known, "rows": [row.to_mapping() for row in rows]})
    return Results(tuple(rows), first.output_dir)


@contextmanager
def opened(
    plans: Sequence[ResolvedConfig], material: Material, *, overwrite: bool
) -> Iterator[list[RunDirectory]]:
    """The run directories of some methods, for this process alone; the first rank's for all.

    All checks come before anything in them changes.

    Raises:
        UserError: a check failed.
    """
    _refuse_untrainable(plans, material.dataset)
    for plan in plans[1:]:
        refuse_link(plan.output_dir)
    if overwrite or any(RunDirectory(plan.output_dir).results() is None for plan in plans):
        for plan in plans:  # is anything wrong with model, images, prompts and class names?
            for subset in material.tested(plan.prompt):
                material.model(plan.prompt, subset)
    if not overwrite:
        for plan in plans:
            material.ranks.from_first(partial(_refuse_other_run, plan, material))
    with ExitStack() as stack:
        # All directories first: that one of them cannot be used should not come out after hours of training.
        if material.ranks.is_first:
            directories = [stack.enter_context(open_run(plan, overwrite=overwrite)) for plan in plans]
        else:
            directories = [RunDirectory(plan.output_dir) for plan in plans]
        material.tell_what_is_used()
        yield directories


def _refuse_untrainable(plans: Sequence[ResolvedConfig], dataset: Dataset) -> None:
    learners = [plan.prompt.method for plan in plans if plan.prompt.method != "zeroshot"]
    if learners and dataset.test_only:
        raise UserError(
            f"{dataset.name} has test images only, so {learners[0]} cannot be trained on it; train on another data set "
            "and evaluate there, or use --method zeroshot."
        )


def _refuse_other_run(plan: ResolvedConfig, material: Material) -> None:
    newest = checkpoint.load_newest(RunDirectory(plan.output_dir).checkpoints)
    if newest is None:
        return
    check_same_run(newest.config, to_mapping(plan), plan.output_dir)
    train = select_classes(material.drawn, plan.data.subset)
    # Images that were left out as unreadable are not in the fingerprint; nothing is read here to find them again.
    refuse_other_images(newest, train, plan.output_dir, classes_alone=plan.data.skip_bad_images)


def _run_method(config: ResolvedConfig, directory: RunDirectory, material: Material) -> Row:
    method, ranks = config.prompt.method, material.ranks
    finished = ranks.from_first(directory.results)
    if finished is not None:
        material.observer.on_message(
            f"The {method} run in {directory.path} is finished; its results are shown."
        )
        return Row.from_mapping(finished["rows"][0])
    training = TrainingRun(config, directory, material)
    training.begin()
    training.trainer.fit(save=training.save, save_every=config.checkpoint_steps)
    training.observer.on_training_end(training.trainer.seconds)
    learned = ranks.from_first(lambda: checkpoint.learned_parameters(training.model))
    subsets = material.tested(config.prompt)
    metrics = material.evaluate(config.prompt, learned, str(directory.path), training.observer, subsets)
    row = _row(config, metrics, training.trainer.seconds)
    if ranks.is_first:
        directory.refuse_gone()
        if "ctx" in learned:
            reference_checkpoint.save(
                directory.prompt_learner,
                training.model,
                config.optim,
                training.trainer.optimizer.state_dict(),
                epochs=config.optim.epochs,
                accuracy=metrics[config.data.subset].accuracy,
            )
        evaluations = {subset: one.summary() for subset, one in metrics.items()}
        directory.write_results({"rows": [row.to_mapping()], "evaluations": evaluations})
    training.observer.on_run_end(directory.path)
    return row


def _row(config: ResolvedConfig, metrics: dict[Subset, Metrics], seconds: float) -> Row:
    accuracy = {subset: one.accuracy for subset, one in metrics.items()}
    if config.reference_compat:  # whose tables are made from its logs
        accuracy = {subset: round(value, 1) for subset, value in accuracy.items()}
    base, new = accuracy.get("base"), accuracy.get("new")
    return Row(
        method=config.prompt.method,
        seed=config.seed,
        base=base,
        new=new,
        h=harmonic_mean(base, new) if base is not None and new is not None else None,
        all=accuracy.get("all"),
        train_seconds=seconds,
        output_dir=config.output_dir,
        attributes=config.prompt.attributes,
    )


def evaluate_run(
    run_dir: Path,
    *,
    subset: Subset | None = None,
    reference_checkpoint: Path | None = None,
    observer: Observer | None = None,
    data: DataConfig | None = None,
    template: str | None = None,
    shortlist: int | None = None,
    shared: Shared | None = None,
    ranks: Ranks = ALONE,
) -> dict[Subset, Metrics]:
    """Evaluate what a run has learned, on its data set or another one.

    Args:
        run_dir: what :func:`run` wrote; its newest checkpoint is used.
        subset: "base", "new" or "all" (all classes together, also for a model trained on half of them);
            ``None``: those the run itself is evaluated on.
        reference_checkpoint: learned parameters from the reference implementation (``model.pth.tar-N`` or its folder)
            instead of the run's own.
        observer: is told about progress.
        data: another data set.
        template: with ``data``, the prompt of zero-shot CLIP there; ``None``: that data set's own.
        shortlist: each image chooses among so many classes, those likeliest without what the image adds to the context
            (:mod:`cocoop_fast.evaluation.shortlist`), and a sample of the images is compared with all classes. What a
            finished run learned, tested on its own data set, has the result noted in ``results.json`` as well. ``None``:
            among all classes, exactly.
        shared, ranks: as for :func:`run`.

    Returns:
        Metrics by subset.

    Raises:
        UserError: no run there, or damaged files or images.
    """
    config, newest = ranks.from_first(lambda: read_run(run_dir))
    asked = config if data is None else with_data(config, data, template)
    if reference_checkpoint is not None:
        return evaluate_reference(
            asked, reference_checkpoint, subset=subset, shortlist=shortlist, observer=observer, ranks=ranks
        )
    trained = tuple(newest.classnames)
    metrics = _evaluate(
        asked, newest.parameters, str(run_dir), subset, observer, shared, trained, ranks, shortlist
    )
    if shortlist is not None and data is None and ranks.is_first:
        _note_shortlists(RunDirectory(run_dir), metrics, observer or Observer())
    return metrics


def _note_shortlists(directory: RunDirectory, metrics: dict[Subset, Metrics], observer: Observer) -> None:
    """Beside the exact results of a finished run; those stay as they are."""
    known = directory.results()
    if known is None:  # a directory with results counts as finished
        observer.on_message(
            f"{directory.path} is not finished, so its results.json does not have this result."
        )
        return
    noted = {**known.get("shortlists", {}), **{subset: one.summary() for subset, one in metrics.items()}}
    try:
        directory.write_results({**known, "shortlists": noted})
    except OSError as error:
        observer.on_message(f"The result could not be noted in results.json: {error}.")


def evaluate_reference(
    config: RunConfig,
    path: Path,
    *,
    subset: Subset | None = None,
    shortlist: int | None = None,
    observer: Observer | None = None,
    ranks: Ranks = ALONE,
) -> dict[Subset, Metrics]:
    """Evaluate a checkpoint that the reference implementation wrote.

    Args:
        config: the method, model and data that it was trained with.
        path: ``model.pth.tar-N`` or its folder. It is read without running any code in it.
        subset, shortlist, observer, ranks: as for :func:`evaluate_run`.

    Raises:
        UserError: a file that cannot be read, or was trained with another method or model.
    """
    loaded = reference_checkpoint.load(path)
    return _evaluate(
        config, loaded.parameters, str(loaded.path), subset, observer, ranks=ranks, shortlist=shortlist
    )


def _evaluate(
    config: RunConfig,
    parameters: dict[str, Tensor],
    where: str,
    subset: Subset | None,
    observer: Observer | None,
    shared: Shared | None = None,
    trained: tuple[str, ...] | None = None,
    ranks: Ranks = ALONE,
    shortlist: int | None = None,
) -> dict[Subset, Metrics]:
    observer, shared = observer or Observer(), shared or Shared()
    dataset = shared.test_set(config.data)
    resolved = resolve(config, dataset)
    if subset is not None:
        resolved = replace(resolved, data=replace(resolved.data, subset=subset))
    prompt = resolved.prompt
    material = Material(resolved, dataset, shared, observer, ranks)
    material.tell_what_is_used()
    subsets = material.tested(prompt) if subset is None else (subset,)
    if trained is not None and not knows_other_classes(prompt):
        for one in subsets:
            if select_classes(dataset, one).classnames != trained:
                raise UserError(
                    f"What this {prompt.method} model learned belongs to the {len(trained)} classes that it "
                    f"was trained on, so it cannot be evaluated on {one} classes of {dataset.name}."
                )
    return material.evaluate(prompt, parameters, where, observer, subsets, shortlist)
