"""Benchmarks on tiny models, with samples of milliseconds: what they say is looked at, never how fast it was."""

import pytest
from models import LAYOUTS

from rwkv_lab.bench import operators, speed
from rwkv_lab.bench.models import random_model


@pytest.fixture
def quick(monkeypatch):
    """Floors that are not measured."""
    for module in (speed, operators):
        monkeypatch.setattr(module, "read_rate", lambda: 40.0)
        monkeypatch.setattr(module, "multiply_add_rate", lambda: 500.0)
    monkeypatch.setattr(speed, "matmul_rate", lambda dtype: 900.0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny("7.0") -> path of a small random model of that generation."""
    folder = tmp_path_factory.mktemp("tiny")
    made = {}

    def path(version):
        if version not in made:
            made[version] = folder / f"v{version}.pth"
            random_model(made[version], LAYOUTS[version])
        return made[version]

    return path
