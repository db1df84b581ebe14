from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCardData

from e2vpt_peft import write_model_card
from e2vpt_peft.model_card.readme import BEGIN, END, has_persons_words, is_hub_id, update_readme

from .common import PERSONS, adapted, card, generated, metadata


class TestCardsThatPersonsWrote:
    def test_they_stay_to_the_byte(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = tmp_path / "README.md"
        for content in (PERSONS, b"Hello", b"---\n[not: metadata\n---\nHello"):
            path.write_bytes(content)
            caplog.clear()
            write_model_card(adapted(), tmp_path)
            assert path.read_bytes() == content
            assert "was written by a person: it stays as it is" in caplog.text

    def test_a_generated_part_that_somebody_changed_stays(self, tmp_path: Path) -> None:
        text = card(adapted(), tmp_path).replace("## Prompts", "## Prompts, which are few")
        (tmp_path / "README.md").write_text(text)
        assert card(adapted(num_visual_prompts=3), tmp_path) == text

    def test_what_stands_outside_the_generated_part_is_kept(self, tmp_path: Path) -> None:
        begin, end = "<!-- e2vpt_peft writes", "<!-- e2vpt_peft: end -->"
        text = card(adapted(), tmp_path, name="flowers").replace(begin, f"Mine, above.\n{begin}")
        text = text.replace(end, f"{end}\n\nMine, below.")
        for content in (text, text.replace("\n", "\r\n")):
            (tmp_path / "README.md").write_bytes(content.encode())
            new = card(adapted(num_visual_prompts=3), tmp_path, name="flowers")
            assert new == text.replace(generated(text), generated(new)) and "Mine, above.\n" in new
            assert new.endswith(f"{end}\n\nMine, below.\n") and "| visual prompts | 3 per" in new

    def test_metadata_that_somebody_changed_is_kept(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {"name": "flowers", "dataset": "me/flowers", "base_model": "google/vit-base"}
        text = card(adapted(), tmp_path, metrics={"test_accuracy": 0.5}, **options)
        text = text.replace("google/vit-base\n", "google/vit-large\nlicense: mit\n", 1).replace(
            "- e2vpt\n", "- mine\n"
        )
        other = "model-index:\n- name: flowers\n  results:\n"
        assert other in text
        by_hand = "  - task: {type: image-classification}\n    dataset: {name: Trees, type: me/trees}\n"
        by_hand += "    metrics: [{type: accuracy, value: 0.25}]\n"
        (tmp_path / "README.md").write_text(text.replace(other, other + by_hand))
        data = metadata(card(adapted(), tmp_path, metrics={"test_accuracy": 0.75}, **options))
        assert data.base_model == "google/vit-large" and data.license == "mit" and {"mine", "e2vpt"} <= set(data.tags)
        results = [(one.dataset_type, one.metric_value) for one in data.eval_results]
        assert sorted(results) == [("me/flowers", 0.75), ("me/trees", 0.25)]

    def test_metadata_that_nobody_changed_is_written_anew(self, tmp_path: Path) -> None:
        card(adapted(), tmp_path, dataset="me/flowers", metrics={"accuracy": 0.5})
        data = metadata(card(adapted(), tmp_path, dataset="me/trees"))
        assert data.datasets == ["me/trees"] and data.eval_results is None


class TestCardsThatNobodyWrote:
    def test_the_form_that_peft_saves_is_replaced(self, tmp_path: Path) -> None:
        model = adapted()
        model.save_pretrained(tmp_path)
        assert "[More Information Needed]" in (tmp_path / "README.md").read_text()
        assert card(model, tmp_path).count("\n# ") == 1

    def test_a_form_with_something_filled_in_stays(self, tmp_path: Path) -> None:
        model = adapted()
        model.save_pretrained(tmp_path)
        filled = (tmp_path / "README.md").read_text().replace("[More Information Needed]", "Ann", 1)
        (tmp_path / "README.md").write_text(filled)
        assert card(model, tmp_path) == filled

    def test_saving_and_writing_again_changes_nothing(self, tmp_path: Path) -> None:
        model = adapted()
        text = card(model, tmp_path, base_model="google/vit-base", dataset="me/flowers", metrics={"accuracy": 0.5})
        model.save_pretrained(tmp_path)
        again = card(model, tmp_path, base_model="google/vit-base", dataset="me/flowers", metrics={"accuracy": 0.5})
        assert again == text

    def test_another_version_of_peft_does_not_make_it_a_persons(self, tmp_path: Path) -> None:
        text = card(adapted(), tmp_path)
        (tmp_path / "README.md").write_text(re.sub(r"- PEFT .*", "- PEFT 0.1.0\n- PEFT 0.2.0", text))
        assert card(adapted(), tmp_path) == text


def test_whether_a_person_has_written_or_changed_anything(tmp_path: Path) -> None:
    own = card(adapted(), tmp_path, name="flowers")
    adapted().save_pretrained(tmp_path / "form")
    form = (tmp_path / "form" / "README.md").read_text()
    for untouched in (None, "", "---\ntags: [x]\n---\n", own, own.replace("\n", "\r\n"), form):
        assert not has_persons_words(untouched)
    for touched in (
        PERSONS.decode(),
        own.replace("## Prompts", "## Few prompts"),
        own + "\nMine.\n",
        own.replace("- e2vpt\n", "- mine\n"),
        form.replace("[More Information Needed]", "Ann", 1),
    ):
        assert touched not in (own, form) and has_persons_words(touched)


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("me/flowers", True),
        ("flowers", True),
        ("/home/me/flowers", False),
        ("a/b/c", False),
        ("me/flow ers", False),
        ("", False),
        (None, False),
    ],
)
def test_names_that_can_be_those_of_a_repository(name: Any, is_id: bool) -> None:
    assert is_hub_id(name) is is_id


def test_a_folder_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "flowers").mkdir(parents=True)
    assert not is_hub_id("me/flowers") and is_hub_id("me/trees")


def test_a_section_that_quotes_the_end_mark_is_renewed() -> None:
    metadata = ModelCardData(library_name="peft")
    once = update_readme(None, f"old {END} text\n", metadata)
    assert once is not None and once.count(END) == 1
    again = update_readme(once + "kept\n", "new\n", metadata)
    assert again is not None and "new" in again and "old" not in again and again.endswith("kept\n")


def test_many_beginnings_are_looked_at_once() -> None:
    """A regular expression that looks for the end behind each of them takes minutes."""
    beginning = BEGIN.format("0" * 16, "0" * 16)
    for text in (beginning * 20_000, END + beginning * 20_000, "<!-- e2vpt_peft writes " * 50_000):
        assert update_readme(text, "new", ModelCardData()) is None
        assert has_persons_words(text)
