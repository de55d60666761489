"""Training: whole models, adapters, or only the state that every sequence starts from; and the demo model."""

from rwkv_lab.train.batches import held_out_bits, in_batches
from rwkv_lab.train.compare import METHODS, Compared, compare_methods
from rwkv_lab.train.data import CORPORA, Corpus, load_corpus
from rwkv_lab.train.demo import demo_base, demo_folder, demo_state
from rwkv_lab.train.examples import Example, Examples, load_examples
from rwkv_lab.train.planning import TrainPlan, plan_training
from rwkv_lab.train.recipe import ADAPTER_KINDS, AUTOCASTS, DTYPES, RECIPES, Recipe, Tuning, choose_recipe
from rwkv_lab.train.resume import resume_path
from rwkv_lab.train.trainer import Sample, TrainResult, train
from rwkv_lab.train.tuned import open_tuned

__all__ = [
    "ADAPTER_KINDS",
    "AUTOCASTS",
    "CORPORA",
    "DTYPES",
    "METHODS",
    "RECIPES",
    "Compared",
    "Corpus",
    "Example",
    "Examples",
    "Recipe",
    "Sample",
    "TrainPlan",
    "TrainResult",
    "Tuning",
    "choose_recipe",
    "compare_methods",
    "demo_base",
    "demo_folder",
    "demo_state",
    "held_out_bits",
    "in_batches",
    "load_corpus",
    "load_examples",
    "open_tuned",
    "plan_training",
    "resume_path",
    "train",
]
