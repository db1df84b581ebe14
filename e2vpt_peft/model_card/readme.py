"""Which part of a README.md is this package's to write, so that no card that a person wrote is ever overwritten.

What the package writes stands between two comments, the first of which has checksums of it and of the metadata. It is
written anew as long as its checksum is right. A README.md whose generated part somebody has changed, or that has
none, is that person's and stays as it is, to the byte. The one exception is the form that PEFT and transformers save,
as long as nobody has filled it in.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import HFValidationError, validate_repo_id

BEGIN = (
    "<!-- e2vpt_peft writes what stands between this line and the end mark anew whenever the adapter is saved, unless "
    "somebody changes it. What stands outside is kept. checksums: {} {} -->\n"
)
END = "<!-- e2vpt_peft: end -->"
BEGINNING = re.compile(r"<!-- e2vpt_peft writes [^>]{,400}checksums: (\w{16}) (\w{16}) -->\n")

PEFT_LINE = re.compile(r"### Framework versions|- PEFT \S+")
"""What PEFT adds to every card, whoever wrote it, whenever it saves an adapter."""

TRANSFORMERS_DESCRIPTION = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)
"""All that `push_to_hub` of transformers fills into the form."""

OWN_METADATA = ("base_model", "datasets", "library_name", "model-index", "pipeline_tag", "tags")


def update_readme(existing: str | None, section: str, metadata: ModelCardData) -> str | None:
    """The new content of a README.md.

    Args:
        existing (`str`, *optional*): What it has now, if there is one.
        section (`str`): The generated text.
        metadata ([`~huggingface_hub.ModelCardData`]): The generated metadata.

    Returns:
        `Optional[str]`: `None` if a person wrote what is there, which must not be touched.
    """
    existing = (existing or "").replace("\r\n", "\n")
    text = REGEX_YAML_BLOCK.sub("", existing)
    # What the card quotes cannot end it, nor keep it from being written.
    section = section.replace(END, "").encode(errors="replace").decode()
    enclosed = BEGIN.format(_checksum(section), _checksum(metadata.to_yaml())) + section + END
    if _is_unfilled(text):
        form = _metadata(existing).to_dict()
        kept = {name: value for name, value in form.items() if name not in OWN_METADATA}
        return _render({**kept, **metadata.to_dict()}, f"\n{enclosed}\n")
    found = _find_generated(text)
    if found is None or not found.is_unchanged:
        return None
    present = _metadata(existing)
    is_unchanged = _checksum(present.to_yaml()) == found.metadata_checksum
    joined = metadata.to_dict() if is_unchanged else _join(present, metadata)
    return _render(joined, found.before + enclosed + (found.after or "\n"))


def has_persons_words(existing: str | None) -> bool:
    """Whether a person wrote or changed any part of a README.md."""
    existing = (existing or "").replace("\r\n", "\n")
    text = REGEX_YAML_BLOCK.sub("", existing)
    found = _find_generated(text.strip())
    if found is None or found.before or found.after or not found.is_unchanged:
        return not _is_unfilled(text)
    return found.metadata_checksum != _checksum(_metadata(existing).to_yaml())


class _Generated(NamedTuple):
    """The part of a README.md that this package wrote, and what stands around it."""

    before: str
    section: str
    after: str
    checksum: str
    metadata_checksum: str

    @property
    def is_unchanged(self) -> bool:
        return self.checksum == _checksum(self.section)


def _find_generated(text: str) -> _Generated | None:
    beginning = BEGINNING.search(text)
    end = text.find(END, beginning.end()) if beginning else -1
    if beginning is None or end < 0:
        return None
    section = text[beginning.end() : end]
    return _Generated(text[: beginning.start()], section, text[end + len(END) :], beginning[1], beginning[2])


def _metadata(existing: str) -> Any:
    """The metadata of a card. huggingface_hub logs a warning where there is none."""
    return ModelCard(existing).data if REGEX_YAML_BLOCK.search(existing) else ModelCardData()


def is_hub_id(name: str | None) -> TypeGuard[str]:
    """Whether a name can be that of a repository on the Hub, and is no local path."""
    if name is None:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _is_unfilled(text: str) -> bool:
    """Whether a card has no text, or is the form with nothing filled in."""
    if not text.strip():
        return True
    form = ModelCard.from_template(ModelCardData(library_name="peft")).text.splitlines()
    lines = [line for line in text.splitlines() if not PEFT_LINE.fullmatch(line)]
    return "# Model Card for Model ID" in lines and {*form, TRANSFORMERS_DESCRIPTION}.issuperset(lines)


def _checksum(text: str) -> str:
    # PEFT adds its version wherever it finds the heading for it; that makes the text nobody's own.
    lines = [line for line in text.splitlines() if line and not PEFT_LINE.fullmatch(line)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _join(present: ModelCardData, generated: ModelCardData) -> dict[str, Any]:
    """What stands in the metadata stays, what is missing is added, and results of the same evaluation are renewed."""
    old, new = present.to_dict(), generated.to_dict()
    base_model, tags = old.get("base_model"), old.pop("tags", None) or []
    if isinstance(base_model, str) and not is_hub_id(base_model):
        del old["base_model"]  # PEFT writes the path of a local backbone there, and into a tag
    joined = {**new, **old}
    joined["tags"] = sorted({*new.get("tags", []), *(tag for tag in tags if not tag.startswith("base_model:"))})
    results = list(generated.eval_results or [])
    results += [one for one in present.eval_results or [] if not any(map(one.is_equal_except_value, results))]
    if results:
        name = generated.model_name or present.model_name
        joined["model-index"] = ModelCardData(model_name=name, eval_results=results).to_dict()["model-index"]
    return joined


def _render(metadata: dict[str, Any], text: str) -> str:
    return f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n{text}"
