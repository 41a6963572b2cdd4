"""Reads the graph that `onnx-mabert inspect --graph` prints, and finds the blocks of one encoder layer in it."""

import re
from collections import Counter
from dataclasses import dataclass

BLOCKS = ("queries", "scores", "softmax", "context", "output", "norm 1", "widen", "activation", "narrow", "norm 2")

SIZES = {"Shape", "Gather", "Unsqueeze", "Concat"}
MOVES = {"Reshape", "Transpose", "Slice"}
ARITHMETIC = {"MatMul", "Add", "Mul", "Div"}

NODE = re.compile(r"^(%\d+)\S* = (\w+)\((.*)\)$")


@dataclass(frozen=True)
class Node:
    """One line of the text. `operands` are computed values; constants are left out."""

    value: str
    operator: str
    operands: tuple


class Graph:
    """All nodes but constants, in the order of computation."""

    def __init__(self, text):
        self.nodes = []
        constants = set()
        for value, operator, arguments in filter(None, map(parse, text.splitlines())):
            if operator == "Constant":
                constants.add(value)
            else:
                operands = tuple(a for a in arguments if a.startswith("%") and a not in constants)
                self.nodes.append(Node(value, operator, operands))
        self.makers = {node.value: node for node in self.nodes}

    def ancestors(self, value):
        """The values that `value` is computed from, itself among them."""
        reached, waiting = set(), [value]
        while waiting:
            value = waiting.pop()
            if value in self.makers and value not in reached:
                reached.add(value)
                waiting += self.makers[value].operands
        return reached

    def layer_end(self, index):
        """The value of the stream after layer `index`: a norm's, or the residual sum's where no norm is left."""
        norms = [node.value for node in self.nodes if node.operator == "LayerNormalization"]
        if norms:
            return norms[2 * (index + 1)]
        activation = [node for node in self.nodes if node.operator == "Relu"][2 * index + 1]
        reached = {activation.value}
        for node in self.nodes:
            if reached & set(node.operands):
                if node.operator == "Add" and len(node.operands) == 2:
                    return node.value
                reached.add(node.value)
        raise ValueError(f"layer {index} has no end")


def parse(line):
    """Value, operator and arguments of a node's line. Lists in brackets are constants or attributes: left out."""
    found = NODE.match(line)
    if not found:
        return None
    value, operator, arguments = found.groups()
    return value, operator, re.sub(r"\[[^\]]*\]", "", arguments).split(", ")


class Layer:
    """The nodes that layer `index` computes and the layers before it do not."""

    def __init__(self, graph, index):
        self.graph = graph
        self.stream, self.end = graph.layer_end(index - 1), graph.layer_end(index)
        inside = graph.ancestors(self.end) - graph.ancestors(self.stream)
        self.nodes = [node for node in graph.nodes if node.value in inside]
        # Three maps or one for queries, keys and values; then one each.
        *self.queries, self.output, self.widen, self.narrow = filter(self.is_linear_map, self.nodes)
        self.softmax = next(node for node in self.nodes if node.operator in ("Softmax", "Relu"))

    def text_operands(self, node):
        """How many operands depend on the stream. Masks and tables by length do not."""
        return sum(operand == self.stream or self.stream in self.graph.ancestors(operand) for operand in node.operands)

    def is_linear_map(self, node):
        return node.operator == "MatMul" and len(node.operands) == 1 == self.text_operands(node)

    def kind(self, node):
        if node.operator == "Relu":
            return "relu"
        if node.operator in SIZES:
            return "sizes"
        if node.operator in MOVES:
            return "moves"
        product = node.operator in ("Mul", "Div") and self.text_operands(node) > 1
        return "other" if product or node.operator not in ARITHMETIC else "arithmetic"

    def kinds(self):
        return Counter(self.kind(node) for node in self.nodes)

    def not_matrix_arithmetic(self):
        return Counter(node.operator for node in self.nodes if self.kind(node) == "other")

    def blocks(self):
        """The operators of each block. Those that move values or compute sizes are in none."""
        blocks = {name: Counter() for name in BLOCKS}
        for node in self.nodes:
            if self.kind(node) not in ("sizes", "moves"):
                blocks[self.block(node)][node.operator] += 1
        return blocks

    def block(self, node):
        linear_maps = {map_.value: "queries" for map_ in self.queries}
        linear_maps |= {self.output.value: "output", self.widen.value: "widen", self.narrow.value: "narrow"}
        # The map itself, its bias, and the residual sum after that.
        behind = node
        for _ in range(3):
            if behind.value in linear_maps:
                return linear_maps[behind.value]
            if behind.operator != "Add":
                break
            behind = next((self.graph.makers[o] for o in behind.operands if self.leads_to_map(o, linear_maps)), behind)
        if node.operator == "LayerNormalization":
            return "norm 2" if node.value == self.end else "norm 1"
        if node == self.softmax:
            return "softmax"
        if node.value in self.graph.ancestors(self.softmax.value):
            return "scores"
        return "context" if node.value in self.graph.ancestors(self.output.value) else "activation"

    def leads_to_map(self, operand, linear_maps):
        node = self.graph.makers.get(operand)
        return node and (
            operand in linear_maps or node.operator == "Add" and any(o in linear_maps for o in node.operands)
        )
