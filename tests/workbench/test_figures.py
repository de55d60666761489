"""Figures are drawn for any sizes, any names, and values that no scale can show."""

import io

import matplotlib
import numpy as np
import pytest
import torch

from rwkv_lab import plotting
from rwkv_lab.analysis.deltas import BINS, Delta
from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.merge.effect import MergeEffect, TensorEffect
from rwkv_lab.workbench.inspect import figures as inspect_figures
from rwkv_lab.workbench.merge import figures


def delta(name, relative=0.1, new=False) -> Delta:
    histogram = np.zeros(BINS, dtype=np.int64)
    histogram[[0, 120, 125]] = 5, 7, 9
    return Delta(name, (3, 7), new, relative, 0.01, 0.5, histogram)


def text_of(figure) -> str:
    texts = figure.findobj(matplotlib.text.Text)
    return "\n".join(t.get_text() for t in texts)


def test_what_lies_behind_a_text_is_dark_on_a_dark_page():
    figure = plotting.titled(2, "Rates", "of a model")
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75}
    text = figure.subplots().text(0.5, 0.5, "12", bbox=box)
    plotting.dark_png(figure)
    assert max(text.get_bbox_patch().get_facecolor()[:3]) < 0.2 < 0.8 < min(text.get_color()[:3])
    assert text.get_bbox_patch().get_edgecolor()[3] == 0


def test_grey_lines_are_light_on_a_dark_page():
    figure = plotting.titled(2, "Rates", "of a model")
    axes = figure.subplots()
    bars = axes.errorbar([1], [1], xerr=[[0.5], [0.5]], color="#333333", capsize=2)
    (marked,) = axes.plot([1, 2], [1, 2], "o-", color="black")
    plotting.dark_png(figure)
    for colour in (bars.lines[2][0].get_color()[0], marked.get_color(), marked.get_markerfacecolor()):
        assert min(colour[:3]) > 0.6


@pytest.mark.parametrize("n_layer", [1, 3, 12, 61])
def test_heat_map_has_a_cell_per_layer_and_matrix(n_layer):
    changes = [delta(f"blocks.{i}.{m}.weight") for i in range(n_layer) for m in ("att.key", "ffn.key")]
    figure = figures.moved_per_layer(changes, n_layer, "tuned into base, method overlay")
    (image,) = figure.axes[0].get_images()
    assert image.get_array().shape == (2, n_layer)
    text = text_of(figure)
    assert "att.key.weight" in text and "tuned into base, method overlay" in text and "Frobenius" in text


def test_zero_nan_and_new_tensors_are_told_apart_from_small_ones():
    changes = [delta("blocks.0.a", 0.0), delta("blocks.1.a", 0.5), delta("blocks.0.b", float("nan"), new=True)]
    figure = figures.moved_per_layer([*changes, delta("emb.weight", 0.25)], 2, "")
    image = figure.axes[0].get_images()[0].get_array()
    assert image.mask.tolist() == [[True, False], [True, True]]
    assert "+" in text_of(figure).split("\n") and "emb.weight 0.25" in text_of(figure)


def test_the_map_of_what_arrived_marks_what_did_not_change():
    bf16 = torch.bfloat16
    tensors = [
        TensorEffect("blocks.0.att.key.weight", bf16, 9, 9, 2.0, 1.0, True),
        TensorEffect("blocks.1.att.key.weight", bf16, 9, 0, 2.0, 0.0, False),
        TensorEffect("emb.weight", bf16, 9, None, None, None, True),
    ]
    text = text_of(figures.arrived(MergeEffect(tuple(tensors)), 2, "lora into base"))
    assert "2 of 3 targets changed; 25 % of the asked-for change arrived" in text and "×" in text
    assert "emb.weight 1" in text
    plotting.png(figures.arrived(MergeEffect(()), 2, ""))


def test_histogram_counts_every_weight_that_moved():
    figure = figures.delta_histogram([delta("a"), delta("b")], "")
    bars = figure.axes[0].patches
    assert sum(bar.get_height() for bar in bars) == 2 * (7 + 9)
    assert bars[0].get_x() == 2.0**-7 and "23.8%" in text_of(figure)


@pytest.mark.parametrize("name", ["$x^$ \\frac", "\u202eevil\x1b", "blocks.99999.x", "a" * 500, ""])
def test_hostile_names_are_drawn(name):
    changes = [delta(name), delta(f"blocks.0.{name}x")]
    plotting.png(figures.moved_per_layer(changes, 1, name))


def test_a_file_of_ten_thousand_matrices_makes_no_poster():
    values = {f"blocks.0.m{i}": 1.0 for i in range(10_000)}
    figure = plotting.layer_map(values, 1, "t", "s", "u")
    assert figure.get_size_inches()[1] < 20 and "first 60 of 10000" in text_of(figure)


def test_training_figures():
    figure = plotting.bits_bars({"english": {"base": 2.0, "merged": 1.5}, "python": {"base": 3.0}}, "s")
    assert [bar.get_width() for bar in figure.axes[0].patches] == [2.0, 3.0, 1.5]


def test_sizes_add_up(demo_folder):
    with open_checkpoint(demo_folder / "demo-base.pth") as ck:
        figure = inspect_figures.sizes_by_part(ck.info, "demo")
        total = sum(bar.get_width() for bar in figure.axes[0].patches)
        assert total * 1e6 == pytest.approx(sum(t.nbytes for t in ck.info.values()))


def test_a_figure_is_a_png_of_useful_size(in_full):
    from PIL import Image

    width, _ = Image.open(io.BytesIO(plotting.png(figures.delta_histogram([delta("a")], "")))).size
    assert width == 1296


def test_shares_are_coloured_from_zero_to_one():
    figure = plotting.layer_map({"blocks.0.a": 0.4, "blocks.1.a": 1.0}, 2, "t", "s", "u", shares=True)
    assert figure.axes[0].images[0].get_clim() == (0, 1)
    assert figure.axes[1].get_yscale() == "linear"
