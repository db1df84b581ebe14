"""The share of right predictions, as a module that `evaluate.load` reads from this folder, without a network."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "Accuracy: the share of predictions that equal their reference."

_INPUTS = """
Args:
    predictions (`list[int]`): Predicted classes.
    references (`list[int]`): True classes.
    normalize (`bool`, defaults to `True`): Return the share of right predictions; `False` returns their number.
    sample_weight (`Optional[list[float]]`): How much each prediction counts; all the same if not given.

Returns:
    `dict[str, float]`: `{"accuracy": ...}`.
"""


class Accuracy(evaluate.Metric):
    """Accuracy with the arguments of the metric `accuracy` on the Hub, but without scikit-learn."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(
        self,
        predictions: list[int],
        references: list[int],
        normalize: bool = True,
        sample_weight: list[float] | None = None,
    ) -> dict[str, float]:
        right = np.asarray(predictions) == np.asarray(references)
        weight = np.ones(len(right)) if sample_weight is None else np.asarray(sample_weight, dtype=float)
        total = float((right * weight).sum())
        return {"accuracy": total / float(weight.sum()) if normalize else total}
