from __future__ import annotations

import os
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import ViTImageProcessor

from e2vpt_peft import write_model_card
from e2vpt_peft.model_card.write import model_card, read_card

from ..support.models import tiny_vit
from .common import adapted, card


def test_mistakes(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    with pytest.raises(ValueError, match="adapter_name='other' is no E2VPT adapter of this model"):
        write_model_card(adapted(), folder, adapter_name="other")
    with pytest.raises(ValueError, match="adapter_name is needed: the active E2VPT adapters are"):
        write_model_card(get_peft_model(tiny_vit(), LoraConfig(target_modules=["q_proj"])), folder)
    with pytest.raises(TypeError, match="datasett"):
        write_model_card(adapted(), folder, datasett="cifar100")
    assert not folder.exists()


def test_the_image_processor_beside_the_adapter_is_used(tmp_path: Path) -> None:
    ViTImageProcessor().save_pretrained(tmp_path)
    assert f'AutoImageProcessor.from_pretrained("path/to/{tmp_path.name}")' in card(adapted(), tmp_path)


def test_a_folder_that_is_not_there_is_made(tmp_path: Path) -> None:
    text = card(adapted(), tmp_path / "runs" / "flowers", name="flowers")
    assert read_card(tmp_path / "runs" / "flowers" / "README.md") == text
    assert "\n# flowers\n" in text


def test_where_there_is_no_card_none_is_read(tmp_path: Path) -> None:
    assert read_card(tmp_path / "README.md") is None


def test_the_code_of_a_card_finds_the_adapter_in_its_folder_unless_told_otherwise(tmp_path: Path) -> None:
    assert f'PeftModel.from_pretrained(backbone, "path/to/{tmp_path.name}")' in card(adapted(), tmp_path)
    assert 'PeftModel.from_pretrained(backbone, "me/flowers")' in card(adapted(), tmp_path, adapter_id="me/flowers")


def test_a_persons_card_has_no_other_in_its_place() -> None:
    assert model_card(adapted(), "# Flowers\n\nTrained by hand.\n") is None
    text = model_card(adapted(), name="flowers")
    assert text is not None and model_card(adapted(), text, name="flowers") == text


class TestLinks:
    def test_a_link_is_replaced_and_not_followed(self, tmp_path: Path) -> None:
        folder, outside = tmp_path / "adapter", tmp_path / "outside.txt"
        folder.mkdir()
        (folder / "README.md").symlink_to(outside)
        write_model_card(adapted(), folder)
        assert not outside.exists() and not (folder / "README.md").is_symlink()
        outside.write_text(text := (folder / "README.md").read_text())
        (folder / "README.md").unlink()
        (folder / "README.md").symlink_to(outside)  # as in the Hub's cache
        write_model_card(adapted(), folder, metrics={"accuracy": 0.5})
        assert outside.read_text() == text and "0.5" in (folder / "README.md").read_text()

    def test_a_pipe_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "README.md")
        write_model_card(adapted(), tmp_path)
        assert (tmp_path / "README.md").is_file()


def test_words_in_another_encoding_are_kept_to_the_byte(tmp_path: Path) -> None:
    write_model_card(adapted(), tmp_path)
    path = tmp_path / "README.md"
    path.write_bytes(path.read_bytes() + "Blüten\n".encode("latin-1"))
    write_model_card(adapted(), tmp_path, metrics={"accuracy": 0.5})
    assert path.read_bytes().endswith("Blüten\n".encode("latin-1")) and b"0.5" in path.read_bytes()
    path.write_bytes(persons := "# Blüten\n".encode("latin-1"))
    write_model_card(adapted(), tmp_path)
    assert path.read_bytes() == persons


def test_a_new_card_is_written_without_a_word_of_huggingface_hub(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_model_card(adapted(), tmp_path)
    write_model_card(adapted(), tmp_path)
    (tmp_path / "README.md").write_text("# Flowers\n")
    write_model_card(adapted(), tmp_path)
    assert "metadata block" not in caplog.text
