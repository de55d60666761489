"""Training: whole models, adapters, or only the state that every sequence starts from; and the demo model."""

from rwkv_lab.train import kinds as _kinds  # noqa: F401  # makes the kinds of training known
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
