from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from random_models import make_layout, write_model

from rwkv_lab.peft import load_model_and_apply_peft


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """base(version) -> path of a model of that generation with random weights, in float32."""
    folder = tmp_path_factory.mktemp("bases")

    def path(version: str, **sizes) -> Path:
        file = folder / f"{version}-{'-'.join(f'{k}{v}' for k, v in sizes.items())}.safetensors"
        if not file.exists():
            write_model(file, make_layout(version, **sizes))
        return file

    return path


@pytest.fixture
def adapted(base):
    """adapted(version, lora_config, dtype=float32, seed=0) -> the base with fresh adapters."""

    def load(version: str, lora_config, dtype=torch.float32, seed: int = 0, **sizes):
        torch.manual_seed(seed)
        return load_model_and_apply_peft(
            SimpleNamespace(peft_load_path=base(version, **sizes), dtype=dtype), lora_config
        )

    return load
