"""Training: whole models, or only the state that every sequence starts from; and the demo model that tests run on."""

from rwkv_lab.train.data import CORPORA, Corpus, load_corpus
from rwkv_lab.train.demo import demo_base, demo_folder, demo_state
from rwkv_lab.train.trainer import DTYPES, RECIPES, Recipe, Sample, TrainResult, choose_recipe, train

__all__ = [
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
    "train",
]
