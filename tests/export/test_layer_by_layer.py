"""A model that is read layer by layer as it is computed, beside the same model in memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from random_models import SIZES, make_layout, relative_rms, write_model
from tuned_files import write_state

from rwkv_lab import RWKV_Dual, merge
from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.export.families.rwkv import RwkvFileReference, RwkvReference
from rwkv_lab.export.family import Text
from rwkv_lab.export.layer_by_layer import LayerByLayer, _Reading

TEXTS = [Text([np.arange(6).reshape(2, 3), np.array([[7], [8]])], True), Text([np.array([[256, 0]])], False)]


@pytest.mark.parametrize("version", ["4.0", "5.0", "5.1", "5.2", "6.0", "7.0"])
def test_it_computes_what_the_model_in_memory_does(version, tmp_path):
    write_model(tmp_path / "M.pth", make_layout(version, **SIZES))
    if version == "7.0":  # with a state that was tuned
        write_state(tmp_path / "state.pth", tmp_path / "M.pth")
        merge(tmp_path / "M.pth", tmp_path / "state.pth", tmp_path / "T.pth")
    path = tmp_path / ("T.pth" if version == "7.0" else "M.pth")
    whole, read = RwkvReference(RWKV_Dual.from_pretrained(path), "bytes"), RwkvFileReference(path, "bytes")
    for theirs, mine in zip(whole.read(TEXTS), read.read(TEXTS), strict=True):
        for (logits, state), (found, after) in zip(theirs, mine, strict=True):
            assert relative_rms(found, logits) < 1e-5
            assert after.keys() == state.keys()
            for name, part in state.items():
                assert relative_rms(after[name], part) < 1e-5
    ids = np.array([[1, 2, 3, 4]])
    whole_logits, _ = whole.run(ids)
    first, state = read.run(ids[:, :1])
    assert relative_rms(first, whole_logits[:, :1]) < 1e-4  # token by token, and at once
    assert relative_rms(read.run(ids[:, 1:], state)[0], whole_logits[:, 1:]) < 1e-4
    assert len(read.seconds([ids, ids])) == 2 and min(read.seconds([ids])) > 0
    assert read.tokens_of("ab") == whole.tokens_of("ab") == [98, 99]


def test_states_do_not_keep_all_tokens_in_memory(tmp_path):
    model = LayerByLayer(write_model(tmp_path / "M.pth", make_layout("7.0", **SIZES)))
    reading = _Reading(Text([np.arange(60)[None]], True))
    model._run([reading])
    parts = [part for layers in reading.states for state in layers for part in state]
    assert len(parts) == 3 * 3 and all(part.untyped_storage().nbytes() == part.nbytes for part in parts)
    assert all(parameter.is_meta for parameter in model.model.parameters())  # the last layer is given back, too


_TAKEN = """
import sys
from pathlib import Path
import numpy as np
from rwkv_lab.export.family import Text
from rwkv_lab.export.layer_by_layer import LayerByLayer
from rwkv_lab.machine import memory_of
model = LayerByLayer(Path(sys.argv[1]))
texts = [Text([np.arange(8)[None]], False)]
for pieces in model.read(texts):
    list(pieces)
before = memory_of("RssAnon")
for _ in range(3):
    for pieces in model.read(texts):
        list(pieces)
print(memory_of("RssAnon") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_one_layer_is_in_memory_and_not_the_model(tmp_path):
    layout = make_layout("7.0", **SIZES | {"n_layer": 8, "n_head": 8, "dim_ffn": 2048})
    write_model(tmp_path / "M.pth", layout)
    with open_checkpoint(tmp_path / "M.pth") as ck:
        parameters = sum(info.numel for info in ck.info.values())
    done = subprocess.run(
        [sys.executable, "-c", _TAKEN, tmp_path / "M.pth"], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) < 4 * parameters / 8  # of float32: what one layer takes
