"""Training: whole models, adapters, or only the state that every sequence starts from; and the demo model.

Names are imported on first use.
"""

from typing import TYPE_CHECKING

from rwkv_lab.lazy_names import found_on_use
from rwkv_lab.train import kinds as _kinds  # noqa: F401  # makes the kinds of training known

if TYPE_CHECKING:
    from rwkv_lab.train.batches import held_out_bits, in_batches
    from rwkv_lab.train.compare import Compared, compare_methods, compared_kinds
    from rwkv_lab.train.data import CORPORA, Corpus, load_corpus
    from rwkv_lab.train.demo import demo_base, demo_folder, demo_state
    from rwkv_lab.train.examples import Example, Examples
    from rwkv_lab.train.held_out import Measurement, measure_held_out
    from rwkv_lab.train.material import Fit
    from rwkv_lab.train.models import open_trained
    from rwkv_lab.train.planning import TrainPlan, make_plan, plan_training
    from rwkv_lab.train.resume import resume_path
    from rwkv_lab.train.samples import Continuation, Question, questions
    from rwkv_lab.train.spec import KINDS, TrainOptions, TrainSpec
    from rwkv_lab.train.token_files import TokenCorpus
    from rwkv_lab.train.trainer import TrainResult, run_training, train
    from rwkv_lab.train.verify import measure_again, verify_training

__all__ = [
    "CORPORA",
    "KINDS",
    "Compared",
    "Continuation",
    "Corpus",
    "Example",
    "Examples",
    "Fit",
    "Measurement",
    "Question",
    "TokenCorpus",
    "TrainOptions",
    "TrainPlan",
    "TrainResult",
    "TrainSpec",
    "compare_methods",
    "compared_kinds",
    "demo_base",
    "demo_folder",
    "demo_state",
    "held_out_bits",
    "in_batches",
    "load_corpus",
    "make_plan",
    "measure_again",
    "measure_held_out",
    "open_trained",
    "plan_training",
    "questions",
    "resume_path",
    "run_training",
    "train",
    "verify_training",
]

found_on_use(
    __name__,
    {
        "CORPORA": "rwkv_lab.train.data",
        "KINDS": "rwkv_lab.train.spec",
        "Compared": "rwkv_lab.train.compare",
        "Continuation": "rwkv_lab.train.samples",
        "Corpus": "rwkv_lab.train.data",
        "Example": "rwkv_lab.train.examples",
        "Examples": "rwkv_lab.train.examples",
        "Fit": "rwkv_lab.train.material",
        "Measurement": "rwkv_lab.train.held_out",
        "Question": "rwkv_lab.train.samples",
        "TokenCorpus": "rwkv_lab.train.token_files",
        "TrainOptions": "rwkv_lab.train.spec",
        "TrainPlan": "rwkv_lab.train.planning",
        "TrainResult": "rwkv_lab.train.trainer",
        "TrainSpec": "rwkv_lab.train.spec",
        "compare_methods": "rwkv_lab.train.compare",
        "compared_kinds": "rwkv_lab.train.compare",
        "demo_base": "rwkv_lab.train.demo",
        "demo_folder": "rwkv_lab.train.demo",
        "demo_state": "rwkv_lab.train.demo",
        "held_out_bits": "rwkv_lab.train.batches",
        "in_batches": "rwkv_lab.train.batches",
        "load_corpus": "rwkv_lab.train.data",
        "make_plan": "rwkv_lab.train.planning",
        "measure_again": "rwkv_lab.train.verify",
        "measure_held_out": "rwkv_lab.train.held_out",
        "open_trained": "rwkv_lab.train.models",
        "plan_training": "rwkv_lab.train.planning",
        "questions": "rwkv_lab.train.samples",
        "resume_path": "rwkv_lab.train.resume",
        "run_training": "rwkv_lab.train.trainer",
        "train": "rwkv_lab.train.trainer",
        "verify_training": "rwkv_lab.train.verify",
    },
)
