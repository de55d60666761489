"""What the cells of peft.ipynb call, in their order. Each shows its part, and notes it for result and report."""

import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from IPython.display import display

from rwkv_lab.checkpoint import Checkpoint, file_facts, open_checkpoint
from rwkv_lab.checks import Check
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.merge.refusals import method_of
from rwkv_lab.model import RWKV_Dual, bits_per_byte, load_state
from rwkv_lab.peft import Adapter, open_adapter
from rwkv_lab.peft.spectra import Spectrum, adapter_spectra, cosine, delta, model_spectra
from rwkv_lab.train import load_corpus
from rwkv_lab.workbench import figures, mode_figures, peft_figures
from rwkv_lab.workbench.parameters import input_path
from rwkv_lab.workbench.run import Run
from rwkv_lab.workbench.tables import Table

HELD_OUT = 4096  # bytes of text that layers are dropped on
CTX_LEN = 256
TOKENS = 128  # of the text along which a state's effect is followed


@dataclass
class Tuning:
    """What was found: of an adapter or a fine-tune its spectra, of a state its matrices `[L,H,V,K]`."""

    kind: str
    spectra: list[Spectrum] = field(default_factory=list)
    state: torch.Tensor | None = None


def describe(run: Run) -> str:
    """Say what the tuned file is, and what of the model it trains.

    Raises:
        RwkvLabError: a file that cannot be opened, is no tuning, or does not go with the base.
    """
    run.begin_again()
    c = run.config
    with run.timed("open"), open_checkpoint(input_path(c.base)) as base, open_checkpoint(_tuned(run)) as tuned:
        run.record.inputs = [file_facts(base), file_facts(tuned)]
        kind = method_of(tuned)
        frozen = sum(t.numel for t in base.info.values())
        trained = sum(t.numel for t in tuned.info.values())
        rows = [("tuned file", f"{tuned.path.name}: {tuned.kind}"), ("base", str(base.layout)),
                ("values trained", f"{trained:,}"), ("values of the base, frozen", f"{frozen:,}"),
                ("share trained", f"{trained / frozen:.3%}")]  # fmt: skip
        run.record.metrics |= {"kind": tuned.kind, "trained": trained, "frozen": frozen}
        run.page.headline = f"{tuned.path.name} trains {trained / frozen:.2%} as many values as its base has."
        run.page.facts = rows
    display(Table(run.page.headline, ("", ""), rows))
    return kind
