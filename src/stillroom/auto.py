"""AutoDistiller: search a method's pipelines on a data set, see which choices matter, recommend pipelines for another.

    recipe = Recipe.load("distiller", student="bert-2x64", teacher="./tuned", data="./reviews")
    study = search(run_pipeline(recipe, "runs/auto"), "runs/auto.db", trials=30, features=data_features(texts))
    importances(study)                                        # which choice moves the score (fANOVA)
    Recommender().fit(results("runs/auto.db")).recommend(data_features(others), top_n=3)

The search needs ``optuna`` (``pip install 'stillroom[auto]'``), the recommender does not. A pipeline is a mapping of
choices; :func:`options_of` turns one into the method's options (arXiv 2109.11105, section on AutoDistiller; the
regressor is a choice made here).
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stillroom.data.texts import TextData, Texts
from stillroom.errors import TrainingDiverged, UserError, nearest
from stillroom.files import make_folder
from stillroom.recipe import Recipe

Pipeline = dict[str, Any]
Space = Mapping[str, Sequence[Any]]

DISTILLER: dict[str, list[Any]] = {
    "augmentation": ["none", "edits", "mixup"],
    "layer_map": ["skip", "last", "emd"],
    "intermediate": ["none", "ce", "mse", "l2", "cosine", "pkd", "mi-0.1", "mi-0.5", "mi-0.9"],
    "prediction": ["ce", "mse"],
    "intermediate_weight": [0.1, 1.0, 10.0],
}
"""The choices of the method ``distiller``; ``mi-0.1`` is MI-alpha with alpha = 0.1."""


def options_of(pipeline: Pipeline) -> dict[str, Any]:
    """The pipeline as options of the method ``distiller``."""
    options = dict(pipeline)
    kind, _, alpha = str(options.get("intermediate", "")).partition("-")
    if alpha:
        options |= {"intermediate": kind, "alpha": float(alpha)}
    return options


# --- what a data set is like ------------------------------------------------------------------------------------------
def data_features(data: Texts | TextData) -> dict[str, float]:
    """Numbers that tell data sets apart: the logarithm of the number of texts, classes, the labels' entropy in nats,
    mean and standard deviation of the words in a text, and the share of words that occur once."""
    if isinstance(data, TextData):
        labels = data.labels.tolist()
    else:
        labels = [] if data.labels is None else data.labels.tolist()
    words = [text.split() for text in data.texts]
    lengths = [len(row) for row in words]
    counts = Counter(word for row in words for word in row)
    shares = [count / len(labels) for count in Counter(labels).values()]
    return {
        "log_texts": math.log(len(words)),
        "classes": float(len(data.classes)),
        "label_entropy": -sum(p * math.log(p) for p in shares),
        "mean_words": float(np.mean(lengths)),
        "sd_words": float(np.std(lengths)),
        "words_once": sum(count == 1 for count in counts.values()) / max(len(counts), 1),
    }


# --- search -----------------------------------------------------------------------------------------------------------
def search(
    objective: Callable[[Pipeline], float],
    study: str | Path,
    trials: int,
    *,
    space: Space = DISTILLER,
    name: str = "distiller",
    features: Mapping[str, float] | None = None,
    sampler: Literal["tpe", "random"] = "tpe",
    seed: int = 0,
) -> Any:
    """Try pipelines until the study holds ``trials`` finished ones; returns the ``optuna`` study.

    objective: pipeline -> score, larger is better; the student's score as a share of its teacher's makes data sets
    comparable. study: an SQLite file. The search goes on where it was stopped; what a killed process left unfinished
    counts as failed, and so does a training that diverges. features: kept with the study for the recommender.
    Raises UserError without optuna, and for a study of another space.
    """
    optuna = _optuna()
    path = Path(study)
    make_folder(path.parent)
    choices = json.dumps({key: list(values) for key, values in space.items()})
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        found = optuna.create_study(
            study_name=name, storage=f"sqlite:///{path.absolute()}", direction="maximize", load_if_exists=True
        )
    except Exception as problem:  # of optuna, sqlalchemy or sqlite
        said = str(problem).strip().splitlines() or [type(problem).__name__]
        raise UserError(f"no study can be kept in {path} ({said[0]:.200})", cure="give another file") from None
    if found.user_attrs.get("space", choices) != choices:
        raise UserError(
            f"study {name!r} in {path} searches another space", cure="give it another name, or another file"
        )
    found.set_user_attr("space", choices)
    if features is not None:
        found.set_user_attr("features", dict(features))
    done = optuna.trial.TrialState.COMPLETE
    for trial in found.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        found.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    kinds = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    if sampler not in kinds:
        raise UserError(f"unknown sampler {sampler!r}{nearest(sampler, kinds)}", cure=f"one of: {', '.join(kinds)}")

    def ask(trial: Any) -> float:
        return float(objective({key: trial.suggest_categorical(key, list(values)) for key, values in space.items()}))

    failures = 0
    while (finished := len(found.get_trials(deepcopy=False, states=(done,)))) < trials:
        found.sampler = kinds[sampler](seed=seed + len(found.get_trials(deepcopy=False)))
        found.optimize(ask, n_trials=1, catch=(TrainingDiverged,))
        grown = len(found.get_trials(deepcopy=False, states=(done,))) > finished
        failures = 0 if grown else failures + 1
        if failures == 10:
            raise UserError("ten pipelines in a row diverged", cure="lower the recipe's learning rates")
    return found


def run_pipeline(recipe: Recipe, folder: str | Path, score: str = "accuracy") -> Callable[[Pipeline], float]:
    """An objective for :func:`search`: runs ``recipe`` with a pipeline's options in a sub-folder of ``folder`` and
    returns the student's ``score`` on the test split as a share of the last teacher's."""

    def objective(pipeline: Pipeline) -> float:
        from stillroom.run import run

        place = Path(folder)
        number = len(list(place.iterdir())) if place.is_dir() else 0
        tree = recipe.to_dict()
        tree["options"] = {**tree["options"], **options_of(pipeline)}
        scores = run(Recipe.from_dict(tree), place / f"{number:04}").scores
        if not scores:
            raise UserError(f"data {recipe.data!r} give no test scores", cure="give data with a test split")
        teacher = scores[list(scores)[-1]][score]
        return scores["student"][score] / teacher

    return objective


def importances(study: Any) -> dict[str, float]:
    """The share of the score's variance that each choice explains (fANOVA), largest first; they sum to 1."""
    optuna = _optuna()
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError("the search over pipelines needs optuna", cure="pip install 'stillroom[auto]'") from None
    return optuna


# --- recommendation ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Result:
    """One finished trial: what the data were like, the pipeline, its score."""

    features: Mapping[str, float]
    pipeline: Mapping[str, Any]
    score: float


def results(*studies: str | Path) -> list[Result]:
    """All finished trials of all studies in these SQLite files that know their data's features."""
    optuna = _optuna()
    found = []
    for path in map(Path, studies):
        if not path.is_file():
            raise UserError(f"there is no study in {path}", cure="give the file that search() wrote")
        storage = f"sqlite:///{path.absolute()}"
        for name in optuna.get_all_study_names(storage):
            study = optuna.load_study(study_name=name, storage=storage)
            features = study.user_attrs.get("features")
            for trial in study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)) if features else ():
                found.append(Result(features, trial.params, float(trial.value)))
    return found


class Recommender:
    """Predicts a pipeline's score from the data's features and the pipeline's choices (one-hot), by gradient-boosted
    trees, and ranks all pipelines of a space for new data."""

    def __init__(self, space: Space = DISTILLER, seed: int = 0) -> None:
        from sklearn.ensemble import GradientBoostingRegressor

        self.space = {key: list(values) for key, values in space.items()}
        # Rows and columns are sampled for each tree: greedy trees on all of them never split on a feature and a choice
        # that matter only together.
        self.model = GradientBoostingRegressor(
            n_estimators=300, max_depth=4, learning_rate=0.05, subsample=0.7, max_features=0.7, random_state=seed
        )
        self.keys: list[str] = []

    def fit(self, rows: Sequence[Result]) -> Recommender:
        """Raises UserError for fewer than two results and for a pipeline that is not of the space."""
        if len(rows) < 2:
            raise UserError(f"{len(rows)} results are too few to learn from", cure="search some pipelines first")
        self.keys = sorted(rows[0].features)
        x = np.stack([self._row(row.features, row.pipeline) for row in rows])
        self.model.fit(x, [row.score for row in rows])
        return self

    def predict(self, features: Mapping[str, float], pipelines: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Predicted scores, ``[len(pipelines)]``."""
        if not self.keys:
            raise UserError("the recommender has seen no results", cure="call fit first")
        return self.model.predict(np.stack([self._row(features, pipeline) for pipeline in pipelines]))

    def recommend(self, features: Mapping[str, float], top_n: int = 3) -> list[Pipeline]:
        """The ``top_n`` pipelines of the space with the best predicted scores, best first."""
        every = [dict(zip(self.space, choice, strict=True)) for choice in itertools.product(*self.space.values())]
        order = np.argsort(-self.predict(features, every), kind="stable")
        return [every[i] for i in order[:top_n]]

    def _row(self, features: Mapping[str, float], pipeline: Mapping[str, Any]) -> np.ndarray:
        if sorted(features) != self.keys:
            raise UserError(
                f"the data have the features {', '.join(sorted(features))}, the results {', '.join(self.keys)}",
                cure="make all of them with data_features",
            )
        row = [float(features[key]) for key in self.keys]
        for key, values in self.space.items():
            if pipeline.get(key) not in values:
                raise UserError(
                    f"a pipeline's {key} is {pipeline.get(key)!r}", cure=f"one of: {', '.join(map(str, values))}"
                )
            row += [float(pipeline[key] == value) for value in values]
        return np.array(row)
