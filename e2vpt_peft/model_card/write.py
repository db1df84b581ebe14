"""Model cards into folders and repositories."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError
from torch import nn

from ..utils.files import write_atomically
from .content import CardContent
from .details import CardDetails
from .facts import card_adapter
from .readme import update_readme

logger = logging.getLogger(__name__)

README = "README.md"
PROCESSOR = "preprocessor_config.json"


def write_model_card(model: nn.Module, folder: str | Path, *, adapter_name: str | None = None, **details: Any) -> None:
    """Write the model card of an adapter into the folder that `save_pretrained` has saved it to.

    A `README.md` that a person wrote, or whose generated part somebody has changed, stays as it is.

    Args:
        model (`nn.Module`): The adapted model.
        folder (`str` or `Path`): The folder.
        adapter_name (`str`, *optional*): The adapter that the card is about; the first active one by default.
        **details: What else the card should say, see [`CardDetails`].

    Raises:
        ValueError: The model has no such E2VPT adapter. Nothing is written.

    Example:

        ```py
        >>> model.save_pretrained("my-adapter")
        >>> write_model_card(model, "my-adapter", dataset="uoft-cs/cifar100", metrics=trainer.evaluate())
        ```
    """
    folder = Path(folder)
    path = folder / README
    found = {"adapter_id": str(folder), "processor_id": str(folder) if (folder / PROCESSOR).exists() else None}
    content = model_card(model, read_card(path), adapter_name=adapter_name, **{**found, **details})
    if content is None:
        logger.warning("%s was written by a person: it stays as it is.", path)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, encode(content))  # in the place of a link, not through it


def push_model_card(
    model: nn.Module,
    repo_id: str,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    adapter_name: str | None = None,
    **details: Any,
) -> CommitInfo | None:
    """Write the model card of an adapter into the repository that `push_to_hub` has pushed it to.

    A card that a person wrote there, or whose generated part somebody has changed, stays as it is.

    Args:
        model (`nn.Module`): The adapted model.
        repo_id (`str`): The repository on the Hub, `"user/name"`.
        token (`str` or `bool`, *optional*): As for `push_to_hub`.
        revision (`str`, *optional*): The branch. The main one by default.
        adapter_name (`str`, *optional*): The adapter that the card is about; the first active one by default.
        **details: What else the card should say, see [`CardDetails`].

    Returns:
        [`~huggingface_hub.CommitInfo`]: The commit, or `None` if the card there stays.

    Raises:
        ValueError: The model has no such E2VPT adapter. Nothing is pushed.

    Example:

        ```py
        >>> model.push_to_hub("user/my-adapter")
        >>> push_model_card(model, "user/my-adapter", dataset="uoft-cs/cifar100", metrics=trainer.evaluate())
        ```
    """
    api = HfApi(token=token)
    has_processor = api.file_exists(repo_id, PROCESSOR, revision=revision)
    found = {"adapter_id": repo_id, "processor_id": repo_id if has_processor else None}
    existing = download_card(repo_id, token=token, revision=revision)
    content = model_card(model, existing, adapter_name=adapter_name, **{**found, **details})
    if content is None:
        logger.warning("The model card of %s was written by a person: it stays as it is.", repo_id)
        return None
    return api.upload_file(
        path_or_fileobj=encode(content),
        path_in_repo=README,
        repo_id=repo_id,
        revision=revision,
        commit_message="Model card",
    )


def model_card(
    model: nn.Module, existing: str | None = None, *, adapter_name: str | None = None, **details: Any
) -> str | None:
    """The README.md of an adapter, in place of an existing one; `None` if that one must stay."""
    content = CardContent(card_adapter(model, adapter_name), CardDetails(**details))
    return update_readme(existing, content.text(), content.metadata())


def read_card(path: Path) -> str | None:
    """A model card in a folder, if there is one."""
    return decode(path.read_bytes()) if path.is_file() else None


def decode(content: bytes) -> str:
    """A README.md as text. What is no UTF-8 in it is kept as it is by [`encode`]."""
    return content.decode(errors="surrogateescape")


def encode(text: str) -> bytes:
    """The bytes of a README.md."""
    return text.encode(errors="surrogateescape")


def download_card(repo_id: str, *, token: str | bool | None = None, revision: str | None = None) -> str | None:
    """The model card of a branch of a repository, if there is one."""
    with tempfile.TemporaryDirectory() as folder:  # not from a cache, which may be older
        try:
            path = HfApi(token=token).hf_hub_download(repo_id, README, revision=revision, local_dir=folder)
        except (RemoteEntryNotFoundError, RevisionNotFoundError):
            return None
        return decode(Path(path).read_bytes())
