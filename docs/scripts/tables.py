#!/usr/bin/env python3
"""Makes the tables of README.md and docs/ from the reports that docs/scripts/measure.sh left in a folder.

Usage: docs/scripts/tables.py FOLDER

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. A row whose reports are not in the folder is left out;
a table without any row stays as it is.
"""

import json
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/transfer.md", "docs/performance.md")
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

MINILM_SST2, MINILM_MRPC, MINI = "MiniLM, 6 layers, SST-2", "MiniLM, 6 layers, MRPC", "BERT, 3 layers of 128, SST-2"


class Reports:
    """The folder's reports by name; `None` for one that is not there."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.build = self.json("build")
        if self.build is None:
            sys.exit(f"{folder} has no build.json: docs/scripts/measure.sh makes it")

    def text(self, name):
        file = self.folder / name
        return file.read_text() if file.is_file() else None

    def json(self, name):
        text = self.text(f"{name}.json")
        return text and json.loads(text)

    def student(self, name):
        """How a student was made, and how it and its teacher did: a report of `rewrite`, two models of `eval`."""
        report, evaluation = self.json(name), self.json(f"{name}.eval")
        return report and evaluation and (report, *evaluation["models"])

    def caption(self, *conditions):
        build = self.build
        vectors = " with AVX-512" if build["avx512"] else ""
        parts = [
            f"Commit {build['commit']}",
            f"{build['processor']} (family {build['family']}, model {build['model']}){vectors}",
            f"{build['cores']} cores",
            f"onnxruntime {build['onnxruntime']}",
            *conditions,
        ]
        return "\n".join(textwrap.wrap(f"*{'; '.join(parts)}.*", 120, break_long_words=False))


def table(head, rows, caption, words=1):
    """Markdown; the first columns hold `words`, the others figures. Nothing without rows."""
    if not rows:
        return None
    lines = [head, ["---"] * words + ["---:"] * (len(head) - words), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{caption}\n"


def seconds(value):
    return f"{value:.0f} s"


def megabytes(value):
    return f"{value / 1e6:.0f} MB"


def entry(entries, model, engine, length=None):
    """Of a model and engine, and of a length where several were timed."""
    for e in entries:
        if e["model"].endswith(model) and e["engine"] == engine and length in (None, e["seq"]):
            return e
    raise KeyError((model, engine, length))


def ratio(bench, model, engine, length=None):
    """A paired ratio to the first model on the first engine, with its quartiles."""
    found = entry(bench["ratios"], model, engine, length)
    return f"{found['median']:.2f} ({found['lower']:.2f} to {found['upper']:.2f})"


def results(reports):
    """README.md: three students."""
    rows = []
    for label, name in ((MINILM_SST2, "sst2-blockwise"), (MINILM_MRPC, "mrpc-blockwise"), (MINI, "quickstart")):
        student, bench = reports.student(name), reports.json(f"{name}-bench")
        if student and bench:
            report, first, second = student
            time = ratio(bench, f"{name}.onnx", "tract")
            figures = [f"{first['value']:.3f}", f"{second['value']:.3f}", f"{100 * second['agreement']:.1f} %", time]
            rows.append([label, *figures, seconds(report["seconds"])])
    head = ["Model, task", "Teacher's accuracy", "Student's", "They agree on", "Time of a run", "Rewriting takes"]
    return table(head, rows, reports.caption("texts of up to 64 tokens, MRPC's 128", "seed 0"))


def quickstart(reports):
    """README.md: the end of what its first command prints."""
    text = reports.text("quickstart.txt")
    if not text:
        return None
    text = text[text.index("Of fixtures/") :].replace(str((reports.folder / "quickstart.onnx").resolve()), "ma.onnx")
    return "```text\n" + "\n".join(line.rstrip() for line in text.rstrip().splitlines()) + "\n```\n"


def stages(reports):
    """docs/transfer.md: what each stage reaches."""
    rows = []
    for label, prefix in ((MINILM_SST2, "sst2"), (MINILM_MRPC, "mrpc"), (MINI, "mini")):
        for stage in ("closed-form", "blockwise", "full"):
            if student := reports.student(f"{prefix}-{stage}"):
                rows.append([label, f"`{stage}`", *reached(student)])
                label = ""
    return table(["Model, task", "Stage", *REACHED], rows, reports.caption("seed 0"), words=2)


def text(reports):
    """docs/transfer.md: what text is worth."""
    rows = []
    for label, name in (
        (f"{MINILM_SST2}: the task's text", "sst2-blockwise"),
        (f"{MINILM_SST2}: random tokens, with the tokenizer", "sst2-made-up"),
        (f"{MINI}: the task's text", "mini-blockwise"),
        (f"{MINI}: `fixtures/reviews`", "quickstart"),
    ):
        if student := reports.student(name):
            rows.append([label, *reached(student)])
    return table(["Calibrated on", *REACHED], rows, reports.caption("seed 0"))


REACHED = ["Teacher's accuracy", "Student's", "They agree on", "Overflow on odd inputs", "Takes", "Memory"]


def reached(student):
    report, first, second = student
    odd = report["odd_inputs"]
    return [
        f"{first['value']:.3f}",
        f"{second['value']:.3f}",
        f"{100 * second['agreement']:.1f} %",
        f"{odd['overflow']} of {odd['sequences']}",
        seconds(report["seconds"]),
        megabytes(report["peak_memory"]),
    ]


def variants(reports):
    """docs/transfer.md: what stands in the place of softmax."""
    rows = []
    for label, name in (
        (MINILM_SST2, "sst2-closed-form"),
        ("", "sst2-network"),
        ("", "sst2-per-layer"),
        ("", "sst2-shared"),
        ("", "sst2-no-tables"),
        ("", "sst2-hidden-32"),
        (MINILM_MRPC, "mrpc-closed-form"),
        ("", "mrpc-network"),
    ):
        if student := reports.student(name):
            report, _, second = student
            rows.append(
                [
                    label,
                    spelling(report["options"]["approximator"]),
                    f"{second['value']:.3f}",
                    f"{100 * second['agreement']:.1f} %",
                    seconds(report["seconds"]),
                    f"{report['bytes_after'] / 1e6:.1f} MB",
                ]
            )
    head = ["Model, task", "Options", "Accuracy", "Agrees on", "Takes", "File"]
    return table(head, rows, reports.caption("`--transfer closed-form`", "seed 0"), words=2)


def spelling(options):
    """The options that say what stands in the place of softmax."""
    if options["form"] == "hinges":
        return "`--softmax hinges`"
    share = {"per-head": "head", "per-layer": "layer", "shared": "all"}[options["sharing"]]
    tables = "" if options["length_tables"] else " --length-tables off"
    return f"`--softmax network --share {share} --hidden {options['hidden']}{tables}`"


def lengths(reports):
    """docs/performance.md: texts of one length, one at a time."""
    rows = []
    for threads in (1, 2):
        bench = reports.json(f"lengths-{threads}")
        for length in sorted({r["seq"] for r in bench["results"]}) if bench else ():
            teacher = entry(bench["results"], "model.onnx", "onnxruntime", length)
            columns = [
                ratio(bench, model, engine, length)
                for model, engine in (
                    ("model.onnx", "plain-tract"),
                    ("model.onnx", "tract"),
                    ("hinges.onnx", "onnxruntime"),
                    ("hinges.onnx", "tract"),
                    ("network.onnx", "onnxruntime"),
                    ("network.onnx", "tract"),
                )
            ]
            rows.append([f"{length} tokens, {count(threads)}", f"{teacher['median_ms']:.1f} ms", *columns])
    head = [
        "",
        "Teacher, onnxruntime",
        "Teacher, plain tract",
        "Teacher, tract",
        "Hinges, onnxruntime",
        "Hinges, tract",
        "Network, onnxruntime",
        "Network, tract",
    ]
    return table(head, rows, reports.caption("batch 1, 20 rounds"))


def count(threads):
    return "1 thread" if threads == 1 else f"{threads} threads"


def texts(reports):
    """docs/performance.md: a file's texts, in batches of like lengths."""
    rows = []
    for threads in (1, 2):
        if bench := reports.json(f"texts-{threads}"):
            columns = [
                f"{entry(bench['results'], model, engine)['texts_per_second']:.0f}"
                for model in ("model.onnx", "sst2-blockwise.onnx")
                for engine in ("onnxruntime", "tract")
            ]
            rows.append([count(threads), *columns])
    head = ["Texts a second", *(f"{m}, {e}" for m in ("Teacher", "Student") for e in ("onnxruntime", "tract"))]
    return table(head, rows, reports.caption("batches of 8"))


TABLES = {made.__name__: made for made in (results, quickstart, stages, text, variants, lengths, texts)}


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    reports, unused = Reports(sys.argv[1]), set(TABLES)

    def replace(found):
        before, name, after = found.groups()
        if name not in TABLES:
            sys.exit(f"no table is called {name}")
        unused.discard(name)
        made = TABLES[name](reports)
        print(f"{name}: {'made' if made else 'left as it is, without reports'}")
        return f"{before}\n{made}\n{after}" if made else found.group()

    for page in (ROOT / page for page in PAGES):
        page.write_text(MARKED.sub(replace, page.read_text()))
    if unused:
        sys.exit(f"no page has {', '.join(sorted(unused))}")


if __name__ == "__main__":
    main()
