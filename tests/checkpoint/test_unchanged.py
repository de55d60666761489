"""A plan is refused once the files that it was made from have changed."""

import os

import pytest
import torch

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.checkpoint.unchanged import file_states, refuse_changed
from rwkv_lab.errors import ParameterError


@pytest.fixture
def states(tmp_path):
    path = tmp_path / "a.pth"
    write_checkpoint(path, {"emb.weight": torch.zeros(4, 4)})
    with open_checkpoint(path) as ck:
        return file_states(ck)


def test_an_unchanged_file_passes(states):
    refuse_changed(states)


def test_a_file_of_another_size_is_refused(states):
    with open(states[0].path, "ab") as file:
        file.write(b"x")
    with pytest.raises(ParameterError, match="a.pth has changed since the plan was made"):
        refuse_changed(states)


def test_a_file_that_was_written_again_is_refused(states):
    os.utime(states[0].path, ns=(0, states[0].modified + 1))
    with pytest.raises(ParameterError, match="Make the plan again"):
        refuse_changed(states)


def test_a_file_that_is_gone_is_refused(states):
    states[0].path.unlink()
    with pytest.raises(ParameterError, match="No such file"):
        refuse_changed(states)
