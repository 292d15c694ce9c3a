"""Draw overview.png: the table of a composite of S experts above the states of a few images on their way to row 0.

python docs/images/overview.py [runs/quickstart/experts]    after `make quickstart`, which trains these experts
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch

from lightning_tdisent import DPMSolver, load_model
from lightning_tdisent.evaluation.pictures import reverse_strip
from lightning_tdisent.files import whole

SIGNAL, NOISE, INK = "#3b6ea5", "#d9d9d9", "#333333"
OUT = Path(__file__).with_name("overview.png")


def draw(source: str, seeds: range = range(3)) -> None:
    """Write the figure for the experts of one folder."""
    model = load_model(source)
    strip, rows = reverse_strip(model, DPMSolver(), seeds, columns=model.states.S + 1)
    figure, axes = plt.subplots(
        1 + len(seeds), len(rows), figsize=(9, 4.2), gridspec_kw={"height_ratios": [1, *[1] * len(seeds)]}
    )
    figure.subplots_adjust(left=0.09, right=0.99, top=0.81, bottom=0.02, wspace=0.25, hspace=0.12)
    for column, s in enumerate(rows):
        table_entry(axes[0, column], float(model.states.a[s, 0]), s, int(model.states.index[s]))
        for ax, image in zip(axes[1:, column], strip[:, column], strict=True):
            ax.imshow(image[0], cmap="gray", vmin=0, vmax=255)
            ax.set_axis_off()
    for column, s in enumerate(rows[:-1]):
        left, right = axes[0, column].get_position(), axes[0, column + 1].get_position()
        start, end, y = (left.x0 + left.x1) / 2 + 0.008, (right.x0 + right.x1) / 2 - 0.008, 0.925
        figure.text((start + end) / 2, y + 0.025, f"expert {s}", ha="center", fontsize=8.5, color=INK)
        style = {"arrowstyle": "-|>", "mutation_scale": 10, "color": INK, "linewidth": 1}
        figure.add_artist(FancyArrowPatch((start, y), (end, y), transform=figure.transFigure, **style))
    words = ["the table:\nsignal $a^2$\nnoise $b^2$", *(f"seed {seed}" for seed in seeds)]
    for ax, text in zip(axes[:, 0], words, strict=True):
        box = ax.get_position()
        figure.text(0.005, (box.y0 + box.y1) / 2, text, va="center", fontsize=8.5, color=INK)
    with whole(OUT) as stream:
        figure.savefig(stream, dpi=110, format="png", metadata={"Software": None})
    print(f"{OUT}: {OUT.stat().st_size:,} bytes")


def table_entry(ax: Axes, a: float, s: int, index: int) -> None:
    """Draw one row of the table as a bar of its share of signal and noise."""
    ax.bar([0], [a * a], color=SIGNAL, width=0.7)
    ax.bar([0], [1 - a * a], bottom=[a * a], color=NOISE, width=0.7)
    ax.set(xlim=(-0.5, 0.5), ylim=(0, 1))
    ax.set_title(f"row {s}\nt = {index}", fontsize=8.5, color=INK, pad=2)
    ax.set_axis_off()


if __name__ == "__main__":
    draw(*sys.argv[1:2] or ["runs/quickstart/experts"])
