"""Checkpoints of trainings in folders: which is the latest, and which are not taken."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from random_models import make_layout, random_tensors, write_model
from safetensors.torch import save_file

from rwkv_lab.errors import CheckpointValidationError
from rwkv_lab.export import CheckpointDetector
from rwkv_lab.train import resume_path, train

LAYOUT = make_layout("7.0", n_layer=1)


def at(path: Path, seconds: int) -> Path:
    for file in (path, *(path.iterdir() if path.is_dir() else ())):
        os.utime(file, (seconds, seconds))
    return path


def trainer_checkpoint(folder: Path, step: int, state: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    save_file(random_tensors(LAYOUT), path / "model.safetensors", {"format": "pt"})
    torch.save({"state": {}}, path / "optimizer.pt")
    if state:
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def rwkv_checkpoint(folder: Path, name: str, seed: int = 0) -> Path:
    torch.save(random_tensors(LAYOUT, seed=seed), folder / name)
    return folder / name


def test_folders_of_trainer_by_their_steps(tmp_path):
    for step in (500, 1000, 90):
        at(trainer_checkpoint(tmp_path, step), 1000 - step // 10)  # copied in any order
    at(trainer_checkpoint(tmp_path, 1500, state=False), 2000)
    (tmp_path / "checkpoint-2000").mkdir()
    detector = CheckpointDetector(tmp_path)
    assert [one.name for one in detector.list_available_checkpoints()] == [
        *("checkpoint-1500", "checkpoint-1000", "checkpoint-500", "checkpoint-90")
    ]
    latest = detector.detect_latest_checkpoint()
    assert (latest.name, latest.step, latest.kind) == ("checkpoint-1000", 1000, "model")
    assert latest.passed_over == (
        "checkpoint-1500 was not taken: it is still being written: it has no trainer_state.json, which comes last",
    )
    assert detector.detect_latest_checkpoint("checkpoint-90").step == 90


def test_numbered_files_and_the_final_one(tmp_path):
    for number in (0, 9, 10, 2):
        at(rwkv_checkpoint(tmp_path, f"rwkv-{number}.pth"), 100)
    (tmp_path / "train_log.txt").write_text("")
    detector = CheckpointDetector(str(tmp_path))
    assert [one.step for one in detector.list_available_checkpoints()] == [10, 9, 2, 0]
    at(rwkv_checkpoint(tmp_path, "rwkv-final.pth"), 50)
    assert detector.detect_latest_checkpoint().name == "rwkv-final.pth"
    at(rwkv_checkpoint(tmp_path, "other.pth"), 200)  # of another training, later
    assert detector.detect_latest_checkpoint().name == "other.pth"


def test_damaged_ones_are_passed_over_and_named(tmp_path):
    for number in range(4):
        rwkv_checkpoint(tmp_path, f"rwkv-{number}.pth")
    data = (tmp_path / "rwkv-3.pth").read_bytes()
    (tmp_path / "rwkv-3.pth").write_bytes(data[: len(data) // 2])  # as while it is written
    changed = bytearray((tmp_path / "rwkv-2.pth").read_bytes())
    place = changed.find(random_tensors(LAYOUT)["head.weight"].numpy().tobytes())
    changed[place] ^= 1  # one bit of a tensor
    (tmp_path / "rwkv-2.pth").write_bytes(changed)
    (tmp_path / "rwkv-4.pth.tmp").write_bytes(data)
    (tmp_path / ".rwkv-5.pth").write_bytes(data)
    found = CheckpointDetector(tmp_path).detect_latest_checkpoint()
    assert found.name == "rwkv-1.pth" and len(found.passed_over) == 3
    by_name = {line.split()[0]: line for line in found.passed_over}
    assert "damaged, or still being written" in by_name["rwkv-3.pth"]
    assert "head.weight" in by_name["rwkv-2.pth"] and "temporary" in by_name["rwkv-4.pth.tmp"]
    for name, says in {
        "rwkv-3.pth": "cannot be exported",
        "rwkv-2.pth": "checksum",
        "rwkv-11.pth": "did you mean",
    }.items():
        with pytest.raises(CheckpointValidationError, match=says):
            CheckpointDetector(tmp_path).detect_latest_checkpoint(name)
    with pytest.raises(CheckpointValidationError, match="has no checkpoint '../x'"):
        CheckpointDetector(tmp_path).detect_latest_checkpoint("../x")


def test_trainings_of_our_own(tmp_path, demo_folder):
    base = str(demo_folder / "demo-base.pth")
    out = tmp_path / "runs"
    out.mkdir()
    train("lora", out / "A.pth", base=base, steps=2, batch_size=1, ctx_len=16, rank=2, samples=False)
    detector = CheckpointDetector(out)
    found = detector.detect_latest_checkpoint()
    assert (found.name, found.step, found.kind) == ("A.pth", 2, "lora")
    facts = detector.get_checkpoint_metadata(found.path)
    assert facts["step"] == 2 and facts["training"]["kind"] == "lora" and facts["fingerprint"].startswith("records:")
    shutil.copy(out / "A.pth", resume_path(out / "A.pth"))
    with pytest.raises(CheckpointValidationError, match="its training has not ended: A.pth.resume.safetensors"):
        detector.detect_latest_checkpoint()


def test_one_file_one_folder_or_nothing(tmp_path):
    path = write_model(tmp_path / "Mode.safetensors", LAYOUT)
    assert CheckpointDetector(path).detect_latest_checkpoint().path == path
    folder = trainer_checkpoint(tmp_path, 5)
    assert CheckpointDetector(folder).detect_latest_checkpoint().path == folder
    with pytest.raises(CheckpointValidationError, match="no file .*Model.safetensors; did you mean Mode.safe"):
        CheckpointDetector(tmp_path / "Model.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/text.txt").write_text("x")
    with pytest.raises(CheckpointValidationError, match="has no checkpoint that can be exported"):
        CheckpointDetector(tmp_path / "empty").detect_latest_checkpoint()
    with pytest.raises(CheckpointValidationError, match="text.txt cannot be exported: it is damaged, or still"):
        CheckpointDetector(tmp_path / "empty/text.txt").detect_latest_checkpoint()
