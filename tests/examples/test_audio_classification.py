"""The audio example: its sounds, its pretraining, its table and its check of the saved adapter."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
from transformers import (
    ASTFeatureExtractor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

from tests.support.zoo import WAVES

pytest.importorskip("scipy")
audio_classification = importlib.import_module("audio_classification")

KINDS, VOWELS = audio_classification.KINDS, audio_classification.VOWELS
BRIEF = [
    "--pretraining_sounds=4",
    "--pretraining_epochs=1",
    "--train_per_class=2",
    "--test_per_class=4",
    "--epochs=1",
]


def draw(name: str, seed: int = 0) -> np.ndarray:
    return {**KINDS, **VOWELS}[name](np.random.default_rng(seed))


def loudest_frequency(sound: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(sound))
    return float(np.fft.rfftfreq(len(sound), 1 / audio_classification.RATE)[spectrum.argmax()])


@pytest.mark.parametrize("name", [*KINDS, *VOWELS])
def test_sounds_are_finite_differ_each_time_and_return_with_the_seed(name: str) -> None:
    first, again, other = draw(name), draw(name), draw(name, seed=1)
    assert first.shape == audio_classification.TIME.shape
    assert np.isfinite(first).all() and np.abs(first).max() > 0
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_sounds_are_what_their_names_say() -> None:
    assert 100 <= loudest_frequency(draw("sine")) <= 500
    assert loudest_frequency(draw("rumble")) <= 800 < 2000 <= loudest_frequency(draw("hiss"))
    beats = draw("beats")
    assert 0.3 < (beats == 0).mean() < 0.7
    energy = {
        name: np.mean([np.abs(np.fft.rfft(draw(name, seed))[900:2000]).sum() for seed in range(5)])
        / np.mean([np.abs(np.fft.rfft(draw(name, seed))[60:900]).sum() for seed in range(5)])
        for name in VOWELS
    }
    assert energy["heed"] > energy["who'd"] and energy["head"] > energy["hood"]


def test_generated_data_is_balanced_and_depends_on_the_seed_alone() -> None:
    extractor = ASTFeatureExtractor(num_mel_bins=64, max_length=64)
    first, again, other = (
        audio_classification.generate(VOWELS, 3, extractor, np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    assert first["labels"][:].tolist() == sorted(list(range(len(VOWELS))) * 3)
    assert tuple(first[0]["input_values"].shape) == (64, 64)
    assert (first["input_values"][:] == again["input_values"][:]).all()
    assert not (first["input_values"][:] == other["input_values"][:]).all()


def test_main_pretrains_prints_the_table_and_reloads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head, adapted = audio_classification.main([*BRIEF, f"--output_dir={tmp_path}"])
    printed = capsys.readouterr().out
    assert [head.method, adapted.method] == ["head alone", "E²VPT"]
    assert head.trainable == 6 * 96 + 6
    assert adapted.trainable == head.trainable + 4 * (10 * 96 + 5 * 96)
    assert adapted.file_size == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert "few labels: 12 training sounds (2 per class), 24 test sounds" in printed
    assert "predictions identical" in printed


def test_a_wav2vec2_of_ones_own(tmp_path: Path) -> None:
    backbone = tmp_path / "backbone"
    Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**WAVES)).save_pretrained(backbone)
    Wav2Vec2FeatureExtractor().save_pretrained(backbone)
    head, adapted = audio_classification.main([*BRIEF, f"--model={backbone}", f"--output_dir={tmp_path / 'out'}"])
    assert adapted.trainable == head.trainable + 2 * (10 * 32 + 5 * 32)


def test_a_different_prediction_after_reload_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio_classification, "reload", lambda *_: np.zeros((24, 6), dtype=np.float32))
    with pytest.raises(SystemExit) as failure:
        audio_classification.main([*BRIEF, f"--output_dir={tmp_path}"])
    assert "predicts differently" in str(failure.value.code)
