"""Make the small models from which the loader's fuzzing starts: each of one kind of thing that a file can hold.

Run with `pip install onnx==1.23.2 && python generate.py`.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HERE = Path(__file__).resolve().parent
FLOAT, HALF, INT = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64


def constant(name, *shape, dtype=np.float32):
    return numpy_helper.from_array(np.arange(np.prod(shape)).reshape(shape).astype(dtype), name)


def save(name, nodes, inputs, outputs, constants=(), opset=17, functions=(), domains=()):
    value = lambda given: helper.make_tensor_value_info(*given)
    graph = helper.make_graph(nodes, name, [value(i) for i in inputs], [value(o) for o in outputs], list(constants))
    imports = [helper.make_opsetid("", opset)] + [helper.make_opsetid(domain, 1) for domain in domains]
    model = helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=8)
    (HERE / f"{name}.onnx").write_bytes(model.SerializeToString())


node = helper.make_node
X = ("x", FLOAT, ["b", "n", 4])
Y = ("y", FLOAT, None)

save("linear", [node("MatMul", ["x", "w"], ["xw"]), node("Add", ["xw", "c"], ["y"])], [X], [Y],
     [constant("w", 4, 4), constant("c", 4)])
save("norm", [node("LayerNormalization", ["x", "g", "c"], ["y"], axis=-1)], [X], [Y], [constant("g", 4), constant("c", 4)])
save("half", [node("Cast", ["x"], ["h"], to=HALF), node("Mul", ["h", "w"], ["m"]), node("Cast", ["m"], ["y"], to=FLOAT)],
     [X], [Y], [constant("w", 4, dtype=np.float16)])
save("einsum", [node("Einsum", ["x", "w"], ["y"], equation="bnc,chd->bnhd")], [X], [Y], [constant("w", 4, 2, 2)])
save("onehot", [node("OneHot", ["i", "depth", "values"], ["o"]), node("MatMul", ["o", "w"], ["y"])], [("i", INT, ["n"])], [Y],
     [constant("w", 3, 4), numpy_helper.from_array(np.array(3), "depth"), constant("values", 2)])
save("attention", [node("Attention", ["x", "x", "x", "m"], ["y"], scale=0.5)],
     [("x", FLOAT, ["b", 2, "n", 4]), ("m", TensorProto.BOOL, ["b", 1, "n", "n"])], [Y], opset=23)
fused = dict(domain="com.microsoft")
save("fused", [
    node("EmbedLayerNormalization", ["i", "", "w", "p", "", "g", "c", "k"], ["e", "l"], **fused),
    node("Attention", ["e", "qkv", "b", "l"], ["a"], num_heads=2, **fused),
    node("SkipLayerNormalization", ["e", "a", "g", "c"], ["s"], **fused),
    node("BiasGelu", ["s", "c"], ["f"], **fused),
    node("FusedMatMul", ["f", "sq"], ["y"], alpha=0.5, transB=1, **fused),
], [("i", TensorProto.INT32, ["b", "n"]), ("k", TensorProto.INT32, ["b", "n"])], [Y],
     [constant("w", 8, 4), constant("p", 8, 4), constant("g", 4), constant("c", 4), constant("qkv", 4, 12), constant("b", 12),
      constant("sq", 4, 4)], domains=["com.microsoft"])
twice = helper.make_function("here", "Twice", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)])
save("function", [node("Twice", ["x"], ["t"], domain="here"), node("Twice", ["t"], ["y"], domain="here")], [X], [Y],
     functions=[twice], domains=["here"])
branch = lambda op: helper.make_graph([node(op, ["x"], ["z"])], op, [], [helper.make_tensor_value_info("z", FLOAT, None)])
save("subgraphs", [node("If", ["q"], ["y"], then_branch=branch("Relu"), else_branch=branch("Neg"))],
     [X, ("q", TensorProto.BOOL, [])], [Y])
typed = [helper.make_tensor("f", FLOAT, [2], [1.0, 2.0]), helper.make_tensor("i", INT, [2], [1, 2]),
         helper.make_tensor("h", HALF, [1], [1.0]), helper.make_tensor("s", TensorProto.STRING, [1], [b"s"])]
save("typed", [node("Mul", ["x", "f"], ["y"]), node("Constant", [], ["k"], value=typed[1])], [("x", FLOAT, [2])], [Y], typed)
outside = TensorProto(name="w", data_type=FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
for key, value in (("location", "w.data"), ("offset", "0"), ("length", "16")):
    outside.external_data.add(key=key, value=value)
save("external", [node("Mul", ["x", "w"], ["y"])], [X], [Y], [outside])
