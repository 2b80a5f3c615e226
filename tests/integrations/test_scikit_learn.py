"""The estimator: scikit-learn's own checks, what X and y may be, and that it trains as a run does."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator, check_methods_subset_invariance
from tiny_models import tiny_clip
from tiny_runs import loaded_tiny_clip, tiny_config, use_tiny_clip, write_images

from cocoop_fast import Predictor, PromptClassifier, UserError
from cocoop_fast.clip.load import clip_in_memory
from cocoop_fast.config import DataConfig
from cocoop_fast.data import load_dataset
from cocoop_fast.data.few_shot import sample_shots
from cocoop_fast.evaluation.evaluate import test_transform
from cocoop_fast.experiments import shared
from cocoop_fast.experiments.experiment import run
from cocoop_fast.integrations import scikit_learn
from cocoop_fast.runs.directory import read_run

NAMES = ["red fox", "polar bear", "wolf"]
Y = np.array([0, 1, 2] * 4)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Estimators load a tiny CLIP whatever name they are given."""
    use_tiny_clip(monkeypatch)
    scikit_learn._shared.cache_clear()
    yield
    scikit_learn._shared.cache_clear()


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), len(Y))


def quick(**parameters):
    return PromptClassifier(
        **{"classnames": NAMES, "model": "tiny", "epochs": 1, "batch_size": 4, **parameters}
    )


class OfAnyWidth(PromptClassifier):
    """Takes points of any space for image features: scikit-learn's checks have blobs in the plane."""

    def _in_clips_space(self, features, clip):
        width = clip.model.text_projection.shape[1]
        drawn = torch.Generator().manual_seed(0)
        way = torch.randn(features.shape[1] + 1, width, generator=drawn, dtype=torch.float64)
        return super()._in_clips_space(features.double() @ way[1:] + way[0], clip)


@pytest.fixture
def smallest(monkeypatch):
    def put(dtype=torch.float32):
        clip = clip_in_memory(tiny_clip(layers=1, width=16, heads=1, embed_dim=16, dtype=dtype))
        monkeypatch.setattr(shared, "load_clip", lambda config: clip)
        scikit_learn._shared.cache_clear()

    return put


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["cocoop", "linear-probe"])
def test_scikit_learns_own_checks(method, smallest):
    smallest()
    estimator = OfAnyWidth(method=method, model="tiny", ctx_init="a", epochs=1, batch_size=512)
    # One image alone and among others differ by float32's last bits; the next test has them in float64.
    expected = {"check_methods_subset_invariance": "float32"}
    results = check_estimator(estimator, on_skip=None, on_fail=None, expected_failed_checks=expected)
    failed = {one["check_name"]: one["exception"] for one in results if one["status"] == "failed"}
    assert not failed
    assert sum(one["status"] == "passed" for one in results) > 45


@pytest.mark.filterwarnings("ignore")
def test_an_image_is_classified_the_same_alone_and_among_others(smallest):
    smallest(torch.float64)
    estimator = OfAnyWidth(model="tiny", ctx_init="a", epochs=1, batch_size=512)
    check_methods_subset_invariance("PromptClassifier", estimator)


def test_it_trains_as_a_run_does(tmp_path):
    run(tiny_config(tmp_path, data__subset="all", optim__batch_size=4))
    _, newest = read_run(tmp_path)
    drawn = sample_shots(load_dataset(DataConfig()), 2, seed=1)
    images = [drawn.read(sample) for sample in drawn.train]
    y = [sample.label for sample in drawn.train]
    own = {"augment.crop_scale": drawn.crop_scale, "augment.flip": drawn.flip}
    estimator = quick(classnames=drawn.classnames, epochs=2, options=own).fit(images, y)
    assert estimator.learned_.keys() == newest.parameters.keys()
    for name, value in newest.parameters.items():
        assert torch.equal(estimator.learned_[name], value), name


def test_the_global_random_state_stays(paths):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    quick().fit(paths, Y)
    assert torch.equal(torch.rand(1), expected)


def test_images_of_every_kind_and_features(paths):
    images = [Image.open(path) for path in paths]
    estimator = quick(augment=False).fit(paths, Y)
    expected = estimator.predict_proba(paths)
    assert expected.shape == (len(Y), 3) and np.allclose(expected.sum(axis=1), 1)
    features = quick().encode(paths)
    assert features.shape == (len(Y), 64)
    views = torch.stack([test_transform(loaded_tiny_clip())(image.convert("RGB")) for image in images])
    for given in (
        images,
        [str(path) for path in paths],
        np.array([str(path) for path in paths]),
        np.stack([np.asarray(image) for image in images]),
        views,
        views.numpy(),
        features,
        features.tolist(),
    ):
        assert np.allclose(estimator.predict_proba(given), expected, atol=1e-5)
    for given in (images, views, features):
        assert np.allclose(clone(estimator).fit(given, Y).predict_proba(paths), expected, atol=1e-5)
    assert estimator.fit(features, Y).n_features_in_ == 64
    assert not hasattr(estimator.fit(paths, Y), "n_features_in_")


def test_augmentation_is_the_default(paths):
    given = quick().fit(paths, Y).learned_["ctx"]
    assert not torch.equal(given, quick(augment=False).fit(paths, Y).learned_["ctx"])


def test_labels_are_numbers_names_or_keys(paths):
    by_number = quick(augment=False).fit(paths, Y)
    assert by_number.classes_.tolist() == [0, 1, 2] and by_number.classnames_ == tuple(NAMES)
    by_name = quick(augment=False).fit(paths, [NAMES[label] for label in Y])
    assert by_name.classes_.tolist() == sorted(NAMES) == list(by_name.classnames_)
    alone = quick(augment=False, classnames=None).fit(paths, [NAMES[label] for label in Y])
    assert alone.classnames_ == by_name.classnames_
    ids = {"n3": "wolf", "n1": "red fox", "n2": "polar bear"}
    by_key = quick(augment=False, classnames=ids).fit(paths, [f"n{label + 1}" for label in Y])
    assert by_key.classes_.tolist() == ["n1", "n2", "n3"] and by_key.classnames_ == tuple(NAMES)
    predicted = by_number.predict(paths)
    assert by_key.predict(paths).tolist() == [f"n{label + 1}" for label in predicted]
    assert by_key.score(paths, [f"n{label + 1}" for label in Y]) == by_number.score(paths, Y)
    with pytest.warns(UserWarning, match="called by their numbers, 0, 1, 2 and so on"):
        quick(classnames=None).fit(paths, Y)


def test_every_class_has_a_column_though_a_fold_lacks_it(paths):
    some = Y < 2
    estimator = quick().fit([path for path, has in zip(paths, some, strict=True) if has], Y[some])
    assert estimator.predict_proba(paths).shape == (len(Y), 3)


@pytest.mark.parametrize("method", ["cocoop", "zeroshot", "linear-probe"])
def test_cross_validation_and_searches(method, paths):
    named = [NAMES[label] for label in Y]
    scores = cross_val_score(quick(method=method), paths, named, cv=2, error_score="raise")
    assert scores.shape == (2,) and ((0 <= scores) & (scores <= 1)).all()


def test_a_search_over_features(paths):
    features = quick().encode(paths)
    search = GridSearchCV(
        make_pipeline(quick()), {"promptclassifier__lr": [0.001, 0.01]}, cv=2, scoring="neg_log_loss"
    )
    assert search.fit(features, Y).best_params_["promptclassifier__lr"] in (0.001, 0.01)


def test_other_classes(paths):
    estimator = quick().fit(paths, Y)
    learned = {name: value.clone() for name, value in estimator.learned_.items()}
    assert estimator.set_classnames(["cat", "dog", "cow", "hen"]) is estimator
    assert estimator.classes_.tolist() == [0, 1, 2, 3] and estimator.classnames == NAMES
    assert estimator.predict_proba(paths).shape == (len(Y), 4)
    again = pickle.loads(pickle.dumps(estimator))
    assert np.allclose(again.predict_proba(paths), estimator.predict_proba(paths), atol=1e-6)
    estimator.set_classnames({7: "wolf", 3: "red fox"})
    assert set(estimator.predict(paths)) <= {3, 7} and estimator.classnames_ == ("red fox", "wolf")
    assert all(torch.equal(value, learned[name]) for name, value in estimator.learned_.items())
    with pytest.raises(UserError, match="linear probe knows the 3 classes"):
        quick(method="linear-probe").fit(paths, Y).set_classnames(["cat", "dog"])


def test_a_pickle_has_what_was_learned_and_no_clip(paths):
    estimator = quick().fit(paths, Y)
    stored = pickle.dumps(estimator)
    assert len(stored) < 50_000  # the tiny CLIP alone has 9 MB of token embeddings
    scikit_learn._shared.cache_clear()
    assert np.array_equal(pickle.loads(stored).predict_proba(paths), estimator.predict_proba(paths))


def test_what_was_learned_can_be_shared(paths, tmp_path):
    estimator = quick().fit(paths, Y)
    predictor = Predictor.from_pretrained(estimator.save_pretrained(tmp_path))
    best = [ranked[0][0] for ranked in predictor.predict(paths)]
    assert best == [NAMES[label] for label in estimator.predict(paths)]


def test_a_clip_in_memory(paths):
    model = tiny_clip(layers=2)
    estimator = quick(model=model, augment=False).fit(paths, Y)
    assert np.isfinite(estimator.predict_proba(paths)).all()
    assert clone(estimator).model is not model  # scikit-learn copies what is no estimator


def test_an_epoch_is_told_if_asked(paths, capsys):
    quick().fit(paths, Y)
    assert capsys.readouterr().out == ""
    quick(verbose=True, epochs=2).fit(paths, Y)
    assert [line[:10] for line in capsys.readouterr().out.splitlines()] == ["epoch 1/2:", "epoch 2/2:"]


@pytest.mark.parametrize(
    ("parameters", "change", "message"),
    [
        ({}, lambda x, y: (np.ones((12, 5)), y), "5 dimensions, but those of this CLIP have 64; make them with `encode`"),
        ({}, lambda x, y: (np.zeros((12, 64)), y), "only zeros in row 0"),
        ({}, lambda x, y: (x[0], y), "single image; give a list"),
        ({}, lambda x, y: (np.zeros((12, 8, 8, 3)), y), r"float64 of \(12, 8, 8, 3\); arrays of images are bytes"),
        ({}, lambda x, y: ([*x[:-1], "no such.png"], y), r"1 of the images in `X` cannot be read: no such.png \(missing\)"),
        ({}, lambda x, y: (x, [*y[:-1], 9]), "label 9, which is none of the classes 0, 1, 2; `classnames`"),
        ({}, lambda x, y: (x, None), "requires y to be passed"),
        ({"classnames": "wolf"}, lambda x, y: (x, y), "is the text 'wolf'; give a list"),
        ({"classnames": ["crane", "crane"]}, lambda x, y: (x, ["crane"] * 12), "Two classes are called 'crane'"),
        ({"classnames": {"a": "cat"}}, lambda x, y: (x, y), "maps 'a' to names, but labels are int64"),
        ({"ctx_init": "a photo of", "n_ctx": 7}, lambda x, y: (x, y), "`n_ctx` is 7, but `ctx_init` 'a photo of'"),
        ({"options": {"data.root": "x"}}, lambda x, y: (x, y), "`options` has 'data.root'; what it may have"),
        ({"options": {"optim.speed": 3}}, lambda x, y: (x, y), "PromptClassifier: `optim.speed` is not a known field"),
        ({"method": "svm"}, lambda x, y: (x, y), "`prompt.method` is 'svm'"),
    ],
)  # fmt: skip
def test_what_cannot_be_understood(parameters, change, message, paths):
    x, y = change(paths, Y.tolist())
    with pytest.raises(UserError, match=message):
        quick(**parameters).fit(x, y)


def test_what_needs_a_fit_or_images(paths):
    with pytest.raises(NotFittedError):
        quick().predict(paths)
    with pytest.raises(NotFittedError):
        quick().set_classnames(NAMES)
    with pytest.raises(UserError, match="holds features already"):
        quick().encode(np.ones((2, 64)))


def test_a_failed_fit_leaves_what_was_fitted(paths):
    estimator = quick().fit(paths, Y)
    expected = estimator.predict_proba(paths)
    with pytest.raises(UserError):
        estimator.set_params(lr=0.1).fit(["no such.png"] * 12, Y)
    assert np.array_equal(estimator.predict_proba(paths), expected)


def test_the_demo_model_is_not_for_photographs(paths):
    scikit_learn._shared.cache_clear()
    with pytest.warns(UserWarning, match="The demo CLIP knows digits and letters alone"):
        quick(model="demo").fit(paths, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quick(model="tiny").fit(paths, Y)


def test_importing_the_package_does_not_import_scikit_learn():
    code = "import sys, cocoop_fast; print('sklearn' in sys.modules, 'torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False", "False"]
