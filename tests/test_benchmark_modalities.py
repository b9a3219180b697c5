"""The comparison of what is seen: numbers checked by hand, and flags that dreamer.py accepts."""

import json

import numpy as np

from benchmarks import modalities
from tests.test_benchmark_family import give_run
from training.config import CONFIGS, load_config
from training.sounds import wav


def test_what_tells_is_compared_with_its_absence(tmp_path, monkeypatch):
    monkeypatch.setattr(modalities, "random_return", lambda case: (1.0, 0.1))
    best = modalities.Tone.best()
    for seed in range(3):
        for name, share in (("tone", 0.9), ("tone_blind", 0.1)):
            logdir = tmp_path / "runs" / f"{name}_{seed}"
            give_run(logdir, {1000: 0.0, 2000: share * best})
            with open(logdir / "metrics.jsonl", "a") as file:
                file.writelines(json.dumps({"step": s, "updates": s, "tone_loss": 9.0 - s}) + "\n" for s in (1, 8))
            rows = [{"step": 2000, "mode": "eval", "score": share * best + odd} for odd in (-1, 1)]
            (logdir / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sounds = tmp_path / "runs" / "tone_0" / "openloop" / "tone"
    sounds.mkdir(parents=True)
    (sounds / "000002000.wav").write_bytes(wav(np.zeros((4096, 2), np.float32), 16000))
    page = tmp_path / "page.md"
    page.write_text("<!-- modalities:begin -->\n<!-- modalities:end -->\n")
    assert (
        modalities.main(["--out", str(tmp_path / "runs"), "--cases", "tone", "--finished", "--write", str(page)]) == 0
    )
    text = page.read_text()
    each = f"{0.9 * best:.2f}"
    assert f"| `dummy_tone` | all | {each}, {each}, {each} | {each} ± 0.00 | 0.90 | 8.0 → 1.0 in 8 updates |" in text
    assert f"|  | blind | {0.1 * best:.2f} |" in text and "| random agent | - | 1.00 ± 0.10 |" in text
    assert "(page.png)" in text
    assert (tmp_path / "page.png").stat().st_size > 5000


def test_the_flags_of_its_runs_are_those_of_the_program():
    for case in modalities.CASES.values():
        seen, blind = (load_config(modalities.flags(case, blind), CONFIGS).encoder for blind in (False, True))
        assert {seen.text_keys, seen.audio_keys} == {".*"}
        assert ("$^" in {blind.text_keys, blind.audio_keys}) == bool(case.blind)
