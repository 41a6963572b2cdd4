#!/usr/bin/env python3
"""Draws docs/layer.svg: one layer of the fixture before and after, with the operators that each block of it has.

Usage: docs/scripts/layer.py [PROGRAM], the program being target/release/onnx-mabert where none is named. Everything
counted in the picture is read from `onnx-mabert inspect`.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from graph import BLOCKS, Graph, Layer

ROOT = Path(__file__).resolve().parents[2]
FIXTURE = ROOT / "fixtures/bert-mini-sst2/model.onnx"
PICTURE = ROOT / "docs/layer.svg"
# The middle one of three: the first also prepares the mask, the last is cut down to what the head reads.
LAYER = 1

WIDTH, MARGIN, GAP = 1000, 24, 10
WIDTHS = dict(zip(BLOCKS, (70, 76, 76, 86, 70, 124, 70, 70, 70, 124)))
BOX_HEIGHT, STRIP_HEIGHT = 100, 196
SQUARE, STEP = 9, 12

FOLDED = ("folded", "widen", "ReLU", "narrow", "folded")
TITLES = {
    "before": ("Q, K, V", "scores", "softmax", "context", "output", "norm", "widen", "GELU", "narrow", "norm"),
    "after": ("Q, K, V", "scores, W₁", "ReLU", "W₂, context", "output", *FOLDED),
}
# Operators in the order in which a box lists them.
ORDER = ("LayerNormalization", "Softmax", "Relu", "MatMul", "Erf", "Div", "Mul", "Add")
KINDS = {
    "other": "not matrix arithmetic",
    "relu": "ReLU",
    "arithmetic": "matrix arithmetic",
    "moves": "moving values",
    "sizes": "computing sizes",
}
STYLE = """
  text { font: 12px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
  .heading { font-size: 16px; font-weight: 600 }
  .small { font-size: 11px }
  .title { font-weight: 600 }
  .middle { text-anchor: middle }
  .quiet { fill: #59636e }
  .card { fill: #ffffff; stroke: #d1d9e0 }
  .line, .tip { stroke: #8c959f; stroke-width: 1.5; fill: none }
  .tip { fill: #8c959f; stroke: none }
  .box { stroke-width: 1.2 }
  .arithmetic { fill: #ddf0ff; stroke: #54a3e0 }
  .relu { fill: #d5f5dc; stroke: #3fa55a }
  .other { fill: #ffe3dc; stroke: #e0603f }
  .moves { fill: #e6eaef; stroke: #9aa4af }
  .sizes { fill: #f6f8fa; stroke: #c3cad1 }
  .gone { fill: none; stroke: #9aa4af; stroke-dasharray: 4 4 }
  .square.arithmetic { fill: #54a3e0 }
  .square.relu { fill: #3fa55a }
  .square.other { fill: #e0603f }
  .square.moves { fill: #c3cad1 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc }
    .quiet { fill: #a8b1bc }
    .card { fill: #0d1117; stroke: #3d444d }
    .line { stroke: #656c76 }
    .tip { fill: #656c76 }
    .arithmetic { fill: #10304d; stroke: #3f8fd0 }
    .relu { fill: #12391f; stroke: #3fa55a }
    .other { fill: #4d1c12; stroke: #e5684a }
    .moves { fill: #2b323b; stroke: #656c76 }
    .sizes { fill: #171c23; stroke: #444c56 }
    .gone { stroke: #656c76 }
    .square.arithmetic { fill: #3f8fd0 }
    .square.other { fill: #e5684a }
    .square.moves { fill: #656c76 }
  }
"""


def run(program, *arguments):
    return subprocess.run([program, *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def layer(program, model):
    """One layer of `model`, counted from its graph; what is not matrix arithmetic must be what `inspect` says."""
    found = Layer(Graph(run(program, "inspect", "--graph", model)), LAYER)
    nodes = json.loads(run(program, "inspect", "--json", model))["non_linear"]
    told = sorted(node["operator"] for node in nodes if f"layer.{LAYER}/" in node["node"])
    counted = sorted(found.not_matrix_arithmetic().elements())
    assert told == counted, f"inspect says {told}, the graph {counted}"
    return found


def text(x, y, words, style=""):
    return f'<text x="{x:g}" y="{y:g}" class="{style}">{words}</text>'


def square(x, y, kind):
    return f'<rect class="square {kind}" x="{x:g}" y="{y - 10}" width="{SQUARE}" height="{SQUARE}" rx="2"/>'


def path(style, steps):
    return f'<path class="{style}" d="{steps}"/>'


def box_style(counts, title):
    if not counts:
        return "gone"
    if title in ("softmax", "GELU", "norm"):
        return "other"
    return "relu" if "Relu" in counts else "arithmetic"


def places():
    """Left edge and width of each block."""
    x, found = MARGIN + 13, {}
    for name in BLOCKS:
        found[name] = (x, WIDTHS[name])
        x += WIDTHS[name] + GAP
    return found


def block(x, width, y, title, counts):
    style = box_style(counts, title)
    parts = [f'<rect class="box {style}" x="{x:g}" y="{y:g}" width="{width}" height="{BOX_HEIGHT}" rx="7"/>']
    centre = x + width / 2
    quiet = "" if counts else " quiet"
    parts.append(text(centre, y + 20, title, "title middle" + quiet))
    lines = [f"{name} {counts[name]}" if counts[name] > 1 else name for name in sorted(counts, key=ORDER.index)]
    for row, line in enumerate(lines or ["into the weights"]):
        parts.append(text(centre, y + 40 + 16 * row, line, "quiet middle"))
    return parts


def residual(left, right, y, words):
    """The stream past some blocks: up before them, over them, and down into the last one's sum."""
    top, radius = y - 14, 7
    steps = f"M{left:g} {y + BOX_HEIGHT / 2:g} V{top + radius:g} q0 {-radius} {radius} {-radius} H{right - radius:g} "
    steps += f"q{radius} 0 {radius} {radius} V{y - 3:g}"
    label = text(left + 12, top - 6, words, "small quiet")
    return [path("line", steps), path("tip", f"M{right:g} {y:g} l-4 -7 h8 z"), label]


def strip(y, name, found):
    kinds = found.kinds()
    other = kinds["other"]
    summary = f"{other} of them not matrix arithmetic" if other else "matrix arithmetic and ReLU alone"
    heading = f'<tspan class="heading">{name.capitalize()}</tspan>'
    counted = f'<tspan class="quiet" dx="10">{len(found.nodes)} operators, {summary}</tspan>'
    parts = [text(MARGIN, y, heading + counted)]
    squares = [kind for kind in KINDS for _ in range(kinds[kind])]
    start = WIDTH - MARGIN - STEP * 50 + 3
    parts += [square(start + STEP * place, y, kind) for place, kind in enumerate(squares)]
    top, where = y + 52, places()
    middle = top + BOX_HEIGHT / 2
    parts.append(path("line", f"M{MARGIN} {middle:g} H{WIDTH - MARGIN - 6}"))
    parts.append(path("tip", f"M{WIDTH - MARGIN:g} {middle:g} l-8 -4.5 v9 z"))
    for left, right, words in (("queries", "output", "attention"), ("widen", "narrow", "feed-forward network")):
        parts += residual(where[left][0] - GAP / 2, where[right][0] + where[right][1] / 2, top, words)
    for place, title in zip(BLOCKS, TITLES[name]):
        parts += block(*where[place], top, title, found.blocks()[place])
    return parts


def legend(y, layers):
    parts, x = [], MARGIN
    for kind, words in KINDS.items():
        before, after = (found.kinds()[kind] for found in layers)
        line = f"{words} {before} → {after}"
        parts += [square(x, y, kind), text(x + 16, y - 1.5, line)]
        x += 16 + 6.4 * len(line) + 24
    return parts


def picture(before, after):
    height = 2 * STRIP_HEIGHT + 60
    title = f"One encoder layer before and after: {len(before.nodes)} operators, {before.kinds()['other']} of them not "
    title += f"matrix arithmetic; then {len(after.nodes)}, matrix arithmetic and ReLU alone"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="title">',
        f'<title id="title">{title}</title>',
        f"<style>{STYLE}</style>",
        f'<rect class="card" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="10"/>',
        *strip(36, "before", before),
        *strip(36 + STRIP_HEIGHT, "after", after),
        *legend(height - 22, (before, after)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main():
    program = sys.argv[1] if len(sys.argv) > 1 else ROOT / "target/release/onnx-mabert"
    with tempfile.TemporaryDirectory() as folder:
        student = Path(folder) / "ma.onnx"
        run(program, "-q", "rewrite", FIXTURE, "-o", student, "--transfer", "none", "--softmax", "network")
        PICTURE.write_text(picture(layer(program, FIXTURE), layer(program, student)))


if __name__ == "__main__":
    main()
