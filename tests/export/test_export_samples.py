"""Texts to compare on: what cannot be compared on is refused before any work, by the plan and by the export."""

import pytest
from random_models import make_layout, write_model
from tuned_files import write_state

from rwkv_lab.errors import FormatExportError, ValidationError
from rwkv_lab.export import ConfigurationManager, plan_export, run
from rwkv_lab.export.families.rwkv import Rwkv


@pytest.mark.parametrize(
    ("vocab_size", "given", "error", "says"),
    [
        (70, {"test_input_samples": ["a text"]}, ValidationError, "are texts, and the model has no tokenizer: name it"),
        (257, {"test_input_samples": ["a", "b"]}, ValidationError, "no text of two tokens or more"),
        (257, {"tokenizer": "words.json"}, FormatExportError, "tokenizer: There is no tokenizer 'words.json'"),
        (257, {"tokenizer": "world"}, FormatExportError, "tokenizer: The tokenizer world has tokens up to 65529"),
    ],
)
@pytest.mark.parametrize("tuned", [False, True])
def test_what_cannot_be_compared_on_is_refused_before_any_work(
    vocab_size, given, error, says, tuned, tmp_path, monkeypatch
):
    base = write_model(tmp_path / "B.pth", make_layout("7.0", n_layer=1, vocab_size=vocab_size))
    given |= dict(checkpoint_path=base, output_directory=tmp_path / "out", naming_pattern="it")
    if tuned:
        given |= dict(checkpoint_path=write_state(tmp_path / "S.pth", base), base_model_name=str(base))
    monkeypatch.setattr(Rwkv, "merge", None)  # no work
    configuration = ConfigurationManager(environment={}).resolve(**given)
    with pytest.raises(error, match=says):
        plan_export([configuration])
    with pytest.raises(error, match=says):
        run(configuration)
    assert not (tmp_path / "out").exists()


def test_what_is_not_used_is_not_refused(tmp_path):
    """Where nothing is compared no text is read, and without graphs no tokenizer."""
    base = write_model(tmp_path / "B.pth", make_layout("7.0", n_layer=1))
    resolve = ConfigurationManager(environment={}).resolve
    given = dict(checkpoint_path=base, output_directory=tmp_path / "out")
    plan_export([resolve(**given, test_input_samples=["a text"], run_validation_tests=False)])
    plan_export([resolve(**given, tokenizer="world", export_onnx=False)])
    plan_export([resolve(**given)])  # on random tokens
