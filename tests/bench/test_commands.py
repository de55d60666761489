"""`python -m rwkv_lab.bench` with words it cannot use, devices that are not there, and an end before its time."""

import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from rwkv_lab.bench.__main__ import main
from rwkv_lab.bench.engines import expected_answers
from rwkv_lab.bench.operators import Shape, measure_operators
from rwkv_lab.errors import ParameterError
from rwkv_lab.resources import kernels_folder


@pytest.mark.parametrize("value", ["0", "-3", "1.5", "many"])
@pytest.mark.parametrize(
    ("job", "flag"),
    [
        *(("models", flag) for flag in ("--threads", "--rounds", "--lengths", "--batches")),
        ("growth", "--contexts"),
        ("merge", "--lora-rank"),
        ("merge", "--rounds"),
    ],
)
def test_numbers_begin_with_1(job, flag, value, capsys):
    with pytest.raises(SystemExit) as end:
        main([job, flag, value])
    assert end.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(f"argument {flag}: {value!r} is no whole number of at least 1")


@pytest.mark.parametrize(("device", "says"), [("gpu9", "There is no device 'gpu9'"), ("meta", "cannot be measured")])
def test_devices_that_there_are_none_of(device, says, tmp_path):
    with pytest.raises(SystemExit, match=f"^ParameterError: .*{says}"):
        main(["wkv", "--device", device, "--report", str(tmp_path / "r")])
    assert not (tmp_path / "r").exists()
    with pytest.raises(ParameterError, match="There is no device 'gpu9'"):
        measure_operators(Shape(length=4), ["reference"], 1, "gpu9")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_there_is_nothing_to_measure_on_it(tmp_path):
    with pytest.raises(SystemExit, match="^DeviceError: Nothing is measured: torch finds no CUDA device for 'cuda:1'"):
        main(["models", "--device", "cuda:1", "--report", str(tmp_path)])
    rows, _ = measure_operators(Shape(length=4), ["reference"], 1, "cuda", ["wkv7"])
    assert [row.samples for row in rows] == [[]] and "cuda failed" in rows[0].problem


def test_a_job_without_any_figure_of_ours_is_a_failure(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^RwkvLabError: Nothing of ours was measured: wkv .There is no wkv backend"):
        main(["wkv", "--backends", "abacus", "--lengths", "4", "--rounds", "1", "--report", str(tmp_path)])
    assert (tmp_path / "wkv.json").exists()


def test_the_long_wait_before_the_first_row_is_announced(tiny, caplog):
    with caplog.at_level(logging.INFO, "rwkv_lab.bench"):
        expected_answers(tiny("7.0"), [5], 1)
    assert "v7.0.pth: computing the expected logits, token by token in torch.float64" in caplog.text


def test_sigterm_leaves_nothing_behind(tiny, tmp_path):
    """While a peer answers, which would take a minute."""
    mark, here = tmp_path / "asked", tmp_path / "here"
    here.mkdir()
    script = tmp_path / "peer.py"
    script.write_text(f"import time\nopen({str(mark)!r}, 'w').close()\ntime.sleep(60)\n")
    peer = f"slow={sys.executable} {script} {{task}} {{model}} {{tokens}} {{out}}"
    words = ["models", "--models", str(tiny("7.0")), "--dtypes", "fp32", "--lengths", "5", "--batches", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rwkv_lab.bench", *words, "--peers", peer, "--report", str(tmp_path / "r")],
        cwd=here,
        env=os.environ | {"TMPDIR": str(here), "PYTHONPATH": str(kernels_folder().parent), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not mark.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    assert list(here.iterdir())  # what there is to clean up
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=50)
    assert process.returncode == 143 and "Traceback" not in err
    assert list(here.iterdir()) == []
