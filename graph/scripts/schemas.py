"""Make graph/src/schemas.txt: what ONNX says of its operators' operands and attributes.

Run with `pip install onnx==1.23.2 && python schemas.py`.
"""

from pathlib import Path

import onnx

FILE = Path(__file__).resolve().parent.parent / "src" / "schemas.txt"
DOMAINS = {"": "", "ai.onnx.ml": "ai.onnx.ml."}
# A letter for each kind of attribute; capitals are lists.
KINDS = dict(INT="i", FLOAT="f", STRING="s", TENSOR="t", GRAPH="g", SPARSE_TENSOR="p", TYPE_PROTO="y",
             INTS="I", FLOATS="F", STRINGS="S", TENSORS="T", GRAPHS="G", SPARSE_TENSORS="P", TYPE_PROTOS="Y")
OPTIONS = dict(Single="r", Optional="o", Variadic="v")


def operands(formal, least):
    """A letter for each operand: required, optional, or any number; then the least number of them."""
    return "".join(OPTIONS[operand.option.name] for operand in formal) + str(least)


def described(schema):
    attributes = sorted(schema.attributes.values(), key=lambda attribute: attribute.name)
    attributes = [f"{a.name}:{KINDS[a.type.name]}{'!' if a.required else ''}" for a in attributes]
    return " ".join([operands(schema.inputs, schema.min_input), operands(schema.outputs, schema.min_output), *attributes])


def lines(schemas):
    """One for each version that changed any of it."""
    before = None
    for schema in schemas:
        name = DOMAINS[schema.domain] + schema.name
        if before != (name, described(schema)):
            yield f"{name} {schema.since_version} {described(schema)}"
        before = (name, described(schema))


schemas = [s for s in onnx.defs.get_all_schemas_with_history() if s.domain in DOMAINS and not s.deprecated]
schemas.sort(key=lambda s: (s.domain, s.name, s.since_version))
newest = {domain: max(s.since_version for s in schemas if s.domain == domain) for domain in DOMAINS}
header = [
    "# Made by graph/scripts/schemas.py from onnx " + onnx.__version__ + ".",
    "# Operator, the version that brought it, its inputs and outputs (required, optional, variadic; the least number),",
    "# and its attributes (int, float, string, tensor, graph, sparse tensor, type; capitals are lists; ! is required).",
    *(f"@ {name or '.'} {newest[domain]}" for domain, name in DOMAINS.items()),
]
FILE.write_text("\n".join(header + [*lines(schemas)]) + "\n")
