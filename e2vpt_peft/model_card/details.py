"""What a model card says that the model itself does not know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class CardDetails:
    """What a model card should say that the model itself does not know. All of it may be left out.

    Args:
        adapter_id (`str`, *optional*): Where the card's code finds the adapter: its Hub id or folder.
        base_model (`str`, *optional*):
            The backbone's Hub id or folder, as the card's code is to load it. Defaults to where it was loaded from if
            that is on the Hub: the path of a folder is not published unless it is given here.
        task (`str`, *optional*):
            The Hub's name of the task, such as `"image-classification"`. Defaults to that of the backbone's class.
        dataset (`str`, *optional*):
            The training data: a Hub id, or any other name. Of a folder, the card says the name only.
        dataset_config (`str`, *optional*): The configuration of a Hub data set.
        metrics (`Mapping[str, float]`, *optional*):
            Results, as `Trainer.evaluate` returns them: `"eval_accuracy"` is an accuracy on `eval_split`,
            `"test_accuracy"` one on the test split, `"accuracy"` one that is not said to be either.
        eval_split (`str`, defaults to `"validation"`): The split of the data that `"eval_..."` metrics are of.
        pruning (`str`, *optional*): How it was found out which prompts to prune, in Markdown.
        arguments (`Mapping[str, Any]`, *optional*): The training arguments.
        license, language (`str`, *optional*): The licence of the adapter, and the language of its data.
        tags (`list[str]`, *optional*): More tags.
        name (`str`, *optional*): The card's title. Defaults to the name in `adapter_id`.
        processor_id (`str`, *optional*): Where the image processor is. Defaults to the backbone's.
    """

    adapter_id: str | None = None
    base_model: str | None = None
    task: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    metrics: Mapping[str, float] | None = None
    eval_split: str = "validation"
    pruning: str | None = None
    arguments: Mapping[str, Any] | None = None
    license: str | None = None
    language: str | None = None
    tags: list[str] | None = None
    name: str | None = None
    processor_id: str | None = None
