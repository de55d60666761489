"""What refuses a run before it begins, without the libraries that the work itself needs: importing them takes most of
the time of a refusal. Looked at are the modules that a process has imported, never seconds."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from models import LAYOUTS, random_lora, random_model, random_state
from models import SEVEN as LAYOUT

from rwkv_lab.analysis.answers import WEIGHTS
from rwkv_lab.model import RWKV_Dual, generate_stream
from rwkv_lab.model.weight_only import SCHEMES
from rwkv_lab.workbench.chat.parameters import SETTINGS, ChatParameters
from rwkv_lab.workbench.registry import notebook_names

HEAVY = ("torch", "numpy", "matplotlib", "transformers", "ipywidgets", "onnxruntime", "pandas")
# Parameters of each notebook that name files: a missing one, one that is no checkpoint, or no such value.
REFUSED = {
    "benchmark": [{"model": "missing.pth"}, {"model": "broken.pth"}, {"peers": ["unknown"]}],
    "chat": [{"model": "missing.pth"}, {"model": "broken.pth"}, {"weights": "int3"}, {"prompts": "missing.txt"}],
    "convert": [{"source": "missing.pth"}, {"source": "broken.pth"}, {"to": "nothing"}],
    "export": [{"checkpoint_path": "missing.pth"}, {"checkpoint_path": "broken.pth"}, {"config": "missing.yaml"}],
    "inspect": [{"checkpoint": "missing.pth"}, {"checkpoint": "broken.pth"}],
    "merge": [
        {"base": "missing.pth", "tuned": "whole.safetensors"},
        {"base": "whole.safetensors", "tuned": "broken.pth"},
        {"base": "whole.safetensors", "tuned": ["whole.safetensors", "missing.pth"], "method": "ties"},
        {"base": "whole.safetensors", "tuned": "missing.pth", "method": "lora"},
        {"base": "b.pth", "tuned": "t.pth", "alpha": "much"},
        {"data": ["missing.txt"]},
        {"recipe": "missing.yaml"},
    ],
    "modes": [{"model": "missing.pth"}, {"compare_with": "broken.pth"}, {"dtypes": ["int8"]}],
    "peft": [
        {"base": "missing.pth", "adapter": "whole.safetensors"},
        {"adapter": "broken.pth", "base": "b"},
        {"rank": 0},
    ],
    "train": [{"base": "missing.pth"}, {"base": "broken.pth"}, {"kind": "nothing"}, {"data": "missing.txt"}],
}
# Files that can be opened, and do not go with the rest: by their headers.
SEVEN, PACKED = {"base": "seven.pth"}, "packed/model.safetensors"
MISFITS = {
    "benchmark": [{"model": "state8.pth"}],
    "chat": [{"model": "lacks.pth"}, {"model": "state8.pth"}],
    "convert": [
        {"source": "four.pth", "to": "gguf"},
        {"source": "seven.pth", "to": "fla", "size": "7B"},
        {"source": PACKED},
    ],
    "export": [{"checkpoint_path": PACKED}],
    "merge": [
        SEVEN | {"tuned": "four.pth"},
        SEVEN | {"tuned": "four.pth", "method": "state"},
        SEVEN | {"tuned": "deep.pth"},
        SEVEN | {"tuned": "deep.pth", "method": "ties"},
        SEVEN | {"tuned": "four.pth", "method": "passthrough", "parameters": {"layers": ["base[0:1]", "tuned[1:2]"]}},
        SEVEN | {"tuned": "state8.pth"},
        SEVEN | {"tuned": "lora32.pth", "alpha": 8.0},
        {"base": "four.pth", "tuned": "state8.pth"},
        {"base": "lacks.pth", "tuned": "state8.pth"},
        {"base": "int8.pth", "tuned": "state8.pth"},
        {"recipe": "mix.yaml"},
    ],
    "modes": [{"model": "lacks.pth"}, {"compare_with": "state8.pth"}],
    "peft": [
        SEVEN | {"adapter": "four.pth"},
        SEVEN | {"adapter": "lora32.pth", "alpha": 8.0},
        {"base": PACKED, "adapter": "seven.pth"},
        SEVEN | {"adapter": PACKED},
    ],
    "train": [{"base": "lacks.pth"}, {"base": PACKED}],
}
PROGRAM = """
import json, sys
from rwkv_lab.errors import RwkvLabError
from rwkv_lab.workbench import start

heavy, refused = json.loads(sys.argv[1])
for notebook, given in refused:
    try:
        start(notebook, {**given, "report": f"reports/{notebook}"})
        print(f"{notebook} took {given}")
    except RwkvLabError:
        result = json.load(open(f"reports/{notebook}/result.json"))
        if result["status"] != "failed":
            print(f"{notebook} {given}: {result['status']}")
    for name in {*heavy} & {*sys.modules}:
        print(f"{notebook} {given}: {name} was imported")
        heavy.remove(name)
"""


@pytest.fixture
def folder(tmp_path):
    from safetensors.torch import save_file
    from torch import save, zeros

    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04, and then nothing")
    save_file({"blocks.0.att.time_state": zeros(1, 2, 2)}, tmp_path / "whole.safetensors")
    model = random_model()
    others = {"deep": random_model(replace(LAYOUT, n_layer=4)), "four": random_model(LAYOUTS["4.0"])}
    others |= {"state8": random_state(replace(LAYOUT, n_head=2, head_size=8)), "seven": model}
    others |= {"lora32": random_lora(replace(LAYOUT, n_embd=32, dim_att=32, n_head=8), full=False)}
    others |= {"lacks": {n: t for n, t in model.items() if n != "head.weight"}}
    others |= {"int8": model | {"ln_out.weight": zeros(16).char()}}
    for name, tensors in others.items():
        save(tensors, tmp_path / f"{name}.pth")
    RWKV_Dual.from_pretrained(tmp_path / "seven.pth", weights="int8").save_pretrained(tmp_path / "packed")
    (tmp_path / "mix.yaml").write_text(
        "merge_method: ties\nbase_model: seven.pth\nmodels: [{model: deep.pth, parameters: {weight: 1}}]\n"
    )
    return tmp_path


def test_every_notebook_refuses_without_heavy_imports(folder):
    assert {*REFUSED} == {*notebook_names()}
    given = {name: ({"no_such_parameter": 1}, *REFUSED[name], *MISFITS.get(name, ())) for name in REFUSED}
    refused = [(name, one) for name in given for one in given[name]]
    words = [sys.executable, "-c", PROGRAM, json.dumps([HEAVY, refused])]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    said = [line for line in done.stdout.splitlines() if not line.startswith(("FAIL", "report", "The run before"))]
    assert done.returncode == 0 and not said, "\n".join([*said, done.stderr])


def test_a_process_that_starts_kernels_imports_no_torch(folder):
    program = "import sys, rwkv_lab.workbench.batch, rwkv_lab.cli.running; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {*HEAVY} & {*done.stdout.split()} <= {"numpy"}  # which papermill imports, with pyarrow


def test_a_wrong_file_is_refused_before_the_demo_model_is_trained(folder, monkeypatch):
    from rwkv_lab.errors import ParameterError
    from rwkv_lab.workbench import run, start

    monkeypatch.setattr(run, "train_demo", lambda config: pytest.fail("the demo model was asked for"))
    with pytest.raises(ParameterError, match=r"no file .*missing\.txt"):
        start("chat", {"prompts": str(folder / "missing.txt"), "report": str(folder / "report")})


def test_what_chat_states_without_the_model_is_the_models_own():
    from inspect import signature

    assert WEIGHTS == ("none", *SCHEMES)
    own = {name: p.default for name, p in signature(generate_stream).parameters.items()}
    stated = {name: ChatParameters.model_fields[name].default for name in SETTINGS if name != "stop"}
    assert stated == {name: own[name] for name in stated}


def test_a_kernel_in_batch_ends_without_a_search_for_garbage(folder):
    program = (
        "import atexit, gc; atexit.register(lambda: print('kept', gc.get_freeze_count() > 0))\n"
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "InteractiveShell.instance()\n"
        "from rwkv_lab.workbench import start\n"
        "start('inspect', {'checkpoint': 'missing.pth'})"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert "there is no file" in done.stderr and done.stdout.endswith("kept True\n")
