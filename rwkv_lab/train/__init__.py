"""Training: whole models, adapters, or only the state that every sequence starts from; and the demo model."""

from rwkv_lab.train.data import CORPORA, Corpus, load_corpus
from rwkv_lab.train.demo import demo_base, demo_folder, demo_state
from rwkv_lab.train.recipe import ADAPTER_KINDS, AUTOCASTS, DTYPES, RECIPES, Recipe, choose_recipe
from rwkv_lab.train.resume import resume_path
from rwkv_lab.train.trainer import Sample, TrainResult, train
from rwkv_lab.train.tuned import open_tuned

__all__ = [
    "ADAPTER_KINDS",
    "AUTOCASTS",
    "CORPORA",
    "DTYPES",
    "RECIPES",
    "Corpus",
    "Recipe",
    "Sample",
    "TrainResult",
    "choose_recipe",
    "demo_base",
    "demo_folder",
    "demo_state",
    "load_corpus",
    "open_tuned",
    "resume_path",
    "train",
]
