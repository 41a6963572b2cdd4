//! What each quantised operator computes. Those of `com.microsoft` are as
//! <https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md> has them.

use onnx_protobuf::{AttributeProto, NodeProto};

use super::constants::{Grid, dequantised, unpacked};
use super::{Codes, Meaning, Product, Rounding, Scheme, Writer};
use crate::{ElementType, NodeExt as _, attribute};

const STANDARD: [&str; 7] = [
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "ConvInteger",
    "QLinearMatMul",
    "QLinearConv",
];
const MICROSOFT: [&str; 19] = [
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeMatMul",
    "DynamicQuantizeLSTM",
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "GatherBlockQuantized",
    "QAttention",
    "QEmbedLayerNormalization",
    "QGemm",
    "QLinearAdd",
    "QLinearMul",
    "QLinearSigmoid",
    "QLinearLeakyRelu",
    "QLinearSoftmax",
    "QLinearConcat",
    "QLinearReduceMean",
    "QLinearWhere",
    "QLinearGlobalAveragePool",
];

pub(super) fn is_quantised(node: &NodeProto) -> bool {
    let microsoft = node.domain == "com.microsoft";
    STANDARD.iter().any(|op| node.is(op)) || (microsoft && MICROSOFT.contains(&node.op_type.as_str()))
}

/// An operand, the empty name where it is not given.
fn operand(node: &NodeProto, at: usize) -> &str {
    node.input.get(at).map_or("", String::as_str)
}

/// An operand that must be given.
fn needed(node: &NodeProto, at: usize) -> Option<&str> {
    Some(operand(node, at)).filter(|name| !name.is_empty())
}

/// A scale and a zero point among the operands.
fn scheme(node: &NodeProto, scale: usize, zero: usize, grid: Grid) -> Scheme<'_> {
    Scheme { scale: operand(node, scale), zero: operand(node, zero), grid }
}

fn attributes(node: &NodeProto, names: &[&str]) -> Vec<AttributeProto> {
    node.attribute.iter().filter(|a| names.contains(&a.name.as_str())).cloned().collect()
}

impl<'g> Writer<'g> {
    /// Spells a quantised operator; `None` where it does more than is understood.
    pub(super) fn spell(&mut self, node: &'g NodeProto) -> Option<()> {
        let output = node.output.first().filter(|o| !o.is_empty())?;
        match node.op_type.as_str() {
            "QuantizeLinear" => self.quantize_linear(node, output),
            "DequantizeLinear" => self.dequantize_linear(node, output),
            "DynamicQuantizeLinear" => self.dynamic_quantize_linear(node),
            "MatMulInteger" => self.matmul_integer(node, output),
            "QLinearMatMul" => self.linear(node, "MatMul", &[(0, 1, 2), (3, 4, 5)], (6, 7), vec![]),
            "QLinearAdd" => self.linear(node, "Add", &[(0, 1, 2), (3, 4, 5)], (6, 7), vec![]),
            "QLinearMul" => self.linear(node, "Mul", &[(0, 1, 2), (3, 4, 5)], (6, 7), vec![]),
            "QLinearSigmoid" => self.linear(node, "Sigmoid", &[(0, 1, 2)], (3, 4), vec![]),
            "QLinearLeakyRelu" => self.linear(node, "LeakyRelu", &[(0, 1, 2)], (3, 4), attributes(node, &["alpha"])),
            "QLinearSoftmax" => self.linear(node, "Softmax", &[(0, 1, 2)], (3, 4), attributes(node, &["axis"])),
            "QLinearReduceMean" if self.opset < 18 => {
                self.linear(node, "ReduceMean", &[(0, 1, 2)], (3, 4), attributes(node, &["axes", "keepdims"]))
            }
            "QLinearConcat" => {
                let parts: Vec<_> = (2..node.input.len()).step_by(3).map(|at| (at, at + 1, at + 2)).collect();
                self.linear(node, "Concat", &parts, (0, 1), attributes(node, &["axis"]))
            }
            "QLinearWhere" => self.linear_where(node, output),
            "QGemm" => self.gemm(node, output),
            "MatMulIntegerToFloat" => {
                let a = self.real(needed(node, 0)?, scheme(node, 2, 4, Grid::COLUMNS))?;
                self.matmul_and_bias(node, &a, (3, 5, 6), output)
            }
            "DynamicQuantizeMatMul" => {
                let a = self.rounded_dynamically(needed(node, 0)?, output)?;
                self.matmul_and_bias(node, &a, (2, 3, 4), output)
            }
            "MatMulNBits" => self.matmul_n_bits(node, output),
            "GatherBlockQuantized" => self.gather_block_quantized(node, output),
            "QAttention" => self.attention(node),
            "QEmbedLayerNormalization" => self.embed_layer_normalization(node),
            _ => None,
        }
    }

    /// The result under the node's own name.
    fn give(&mut self, value: &str, output: &str) -> Option<()> {
        self.op_as("Identity", &[value], output);
        Some(())
    }

    fn quantize_linear(&mut self, node: &NodeProto, output: &str) -> Option<()> {
        let grid = Grid { axis: if node.attribute("axis").is_some() { node.int("axis", 1) } else { 1 }, block: 0 };
        let scheme = scheme(node, 1, 2, grid);
        let given = i32::try_from(node.int("output_dtype", 0)).ok().filter(|&t| t != 0);
        let data_type = self.type_of(scheme.zero).or(given).unwrap_or_else(|| ElementType::U8.onnx());
        self.quantise(needed(node, 0)?, scheme, data_type, output)
    }

    fn type_of(&self, value: &str) -> Option<i32> {
        self.constants.data_type(value).or_else(|| self.codes.get(value).map(|codes| codes.data_type))
    }

    fn dequantize_linear(&mut self, node: &NodeProto, output: &str) -> Option<()> {
        let grid = Grid { axis: node.int("axis", 1), block: node.int("block_size", 0) };
        let real = self.real(needed(node, 0)?, scheme(node, 1, 2, grid))?;
        match self.pinned.contains(output) {
            false => self.constants.values(&real).ok().flatten().map(|values| self.constant(output, values)),
            true => None,
        }
        .or_else(|| self.give(&real, output))
    }

    /// `scale = (max(x, 0) - min(x, 0)) / 255`.
    fn dynamic_quantize_linear(&mut self, node: &NodeProto) -> Option<()> {
        let [value, scale, zero] = node.output.as_slice() else { return None };
        if node.output.iter().any(|o| self.pinned.contains(o.as_str())) {
            return None;
        }
        let x = needed(node, 0)?;
        let data_type = ElementType::U8.onnx();
        let codes = |value: &str| Codes { value: value.to_owned(), data_type };
        if self.rounding == Rounding::Dropped {
            // The real numbers themselves, of scale one.
            self.constant(scale, ndarray::arr0(1.0).into_dyn());
            self.ones.insert(scale.clone());
            self.constant(zero, ndarray::arr0(0.0).into_dyn());
            self.codes.insert(value.clone(), codes(x));
            return Some(());
        }
        let edge = |writer: &mut Self, reduce: &str, bound: &str| {
            let edge = writer.op_with(reduce, &[x], vec![attribute::int("keepdims", 0)], value);
            writer.with_number(&edge, bound, 0.0)
        };
        let high = edge(self, "ReduceMax", "Max");
        let low = edge(self, "ReduceMin", "Min");
        let range = self.op("Sub", &[&high, &low], value);
        let step = self.with_number(&range, "Div", 255.0);
        // Zeros alone have no range.
        let step = self.with_number(&step, "Max", f32::MIN_POSITIVE);
        self.give(&step, scale)?;
        let steps = self.op("Div", &[&low, &step], value);
        let steps = self.op("Neg", &[&steps], value);
        let origin = self.op("Round", &[&steps], value);
        self.codes.insert(zero.clone(), codes(&origin));
        let scheme = Scheme { scale, zero, grid: Grid::COLUMNS };
        self.quantise(x, scheme, data_type, value)
    }

    /// A value as it is after it was quantised and read again.
    fn rounded_dynamically(&mut self, x: &str, like: &str) -> Option<String> {
        if self.rounding == Rounding::Dropped {
            return Some(x.to_owned());
        }
        let [value, scale, zero] = ["quantised", "scale", "zero"].map(|part| self.fresh(like, part));
        let node = NodeProto {
            op_type: "DynamicQuantizeLinear".to_owned(),
            input: vec![x.to_owned()],
            output: vec![value.clone(), scale.clone(), zero.clone()],
            ..NodeProto::default()
        };
        self.dynamic_quantize_linear(&node)?;
        self.real(&value, Scheme { scale: &scale, zero: &zero, grid: Grid::COLUMNS })
    }

    /// `(a - zero) (b - zero)`, of integers.
    fn matmul_integer(&mut self, node: &NodeProto, output: &str) -> Option<()> {
        let (a, b) = (needed(node, 0)?, needed(node, 1)?);
        let centred = |zero: usize| Scheme { scale: "", zero: operand(node, zero), grid: Grid::COLUMNS };
        let right = self.real(b, centred(3))?;
        let meaning = self.meanings.get(a).filter(|m| m.zero == self.key(operand(node, 2), 0.0)).cloned();
        // What is no longer rounded is divided by its scale where the weight is.
        let divided = meaning.and_then(|Meaning { value, scale, .. }| {
            let scale = scale.strip_prefix('=')?.parse::<f32>().ok()?;
            Some((value, self.values(&right)? / scale))
        });
        let value = match divided {
            Some((value, weight)) => {
                let name = self.fresh(&right, "divided");
                self.constant(&name, weight);
                self.products.insert(output.to_owned(), Product { input: value.clone(), weight: name.clone() });
                self.op("MatMul", &[&value, &name], output)
            }
            None => {
                let left = self.real(a, centred(2))?;
                if self.constants.is_constant(&right) {
                    let product = Product { input: left.clone(), weight: right.clone() };
                    self.products.insert(output.to_owned(), product);
                }
                self.op("MatMul", &[&left, &right], output)
            }
        };
        if let Some(product) = self.products.get(output).cloned() {
            self.products.insert(value.clone(), product);
        }
        self.codes.insert(output.to_owned(), Codes { value, data_type: ElementType::I32.onnx() });
        Some(())
    }

    /// An operator on real numbers, whose result is quantised. Operands and result are given by where their value, scale and
    /// zero point are.
    fn linear(
        &mut self,
        node: &NodeProto,
        operator: &str,
        operands: &[(usize, usize, usize)],
        result: (usize, usize),
        attributes: Vec<AttributeProto>,
    ) -> Option<()> {
        let output = node.output.first()?;
        let mut real = Vec::new();
        for &(value, scale, zero) in operands {
            real.push(self.real(needed(node, value)?, scheme(node, scale, zero, Grid::COLUMNS))?);
        }
        let inputs: Vec<&str> = real.iter().map(String::as_str).collect();
        let y = self.op_with(operator, &inputs, attributes, output);
        self.quantise_result(node, &y, result, output)
    }

    fn quantise_result(&mut self, node: &NodeProto, y: &str, result: (usize, usize), output: &str) -> Option<()> {
        let scheme = scheme(node, result.0, result.1, Grid::COLUMNS);
        let data_type = self.type_of(scheme.zero).or_else(|| self.type_of(needed(node, 0)?));
        self.quantise(y, scheme, data_type.unwrap_or_else(|| ElementType::U8.onnx()), output)
    }

    fn linear_where(&mut self, node: &NodeProto, output: &str) -> Option<()> {
        let x = self.real(needed(node, 1)?, scheme(node, 2, 3, Grid::COLUMNS))?;
        let y = self.real(needed(node, 4)?, scheme(node, 5, 6, Grid::COLUMNS))?;
        let chosen = self.op("Where", &[needed(node, 0)?, &x, &y], output);
        self.quantise_result(node, &chosen, (7, 8), output)
    }

    /// `alpha A B + C`, where `C` is in units of `alpha` and the scales of `A` and `B`.
    fn gemm(&mut self, node: &NodeProto, output: &str) -> Option<()> {
        let a = self.real(needed(node, 0)?, scheme(node, 1, 2, Grid::COLUMNS))?;
        let axis = if node.int("transB", 0) == 0 { -1 } else { 0 };
        let b = self.real(needed(node, 3)?, scheme(node, 4, 5, Grid { axis, block: 0 }))?;
        let mut operands = vec![a, b];
        if let Some(c) = needed(node, 6) {
            let unit = self.values(operand(node, 4))? * self.constants.single(operand(node, 1))?;
            let bias = dequantised(&self.values(c)?, Some(&(unit * node.float("alpha", 1.0))), None, Grid::COLUMNS)?;
            let name = self.fresh(c, "real");
            self.constant(&name, bias);
            operands.push(name);
        }
        let inputs: Vec<&str> = operands.iter().map(String::as_str).collect();
        let y = self.op_with("Gemm", &inputs, attributes(node, &["alpha", "transA", "transB"]), output);
        match needed(node, 7) {
            Some(_) => self.quantise_result(node, &y, (7, 8), output),
            None => self.give(&y, output),
        }
    }

    /// `a B + bias`; `B` is the second operand, and its scale, zero point and the bias are where it is said.
    fn matmul_and_bias(
        &mut self,
        node: &NodeProto,
        a: &str,
        (scale, zero, bias): (usize, usize, usize),
        output: &str,
    ) -> Option<()> {
        let b = self.real(needed(node, 1)?, scheme(node, scale, zero, Grid::COLUMNS))?;
        let product = self.op("MatMul", &[a, &b], output);
        match needed(node, bias) {
            Some(bias) => self.op_as("Add", &[&product, bias], output),
            None => self.give(&product, output)?,
        }
        Some(())
    }

    /// A product with a weight `[n, blocks, bytes]`, whose rows are columns of the matrix.
    fn matmul_n_bits(&mut self, node: &NodeProto, output: &str) -> Option<()> {
        let [k, n, bits, block] =
            [("K", 0), ("N", 0), ("bits", 4), ("block_size", 0)].map(|(name, default)| node.int(name, default));
        let [rows, columns, bits, block] = [k, n, bits, block].map(|size| usize::try_from(size).ok());
        let (rows, columns, bits, block) = (rows?, columns?, bits?, block.filter(|&b| b > 0)?);
        if needed(node, 4).is_some() || node.int("weight_prepacked", 0) != 0 {
            return None;
        }
        let blocks = rows.div_ceil(block);
        let shaped = |values: ndarray::ArrayD<f32>, width: usize| {
            values.into_shape_with_order(ndarray::IxDyn(&[columns, width])).ok()
        };
        let bytes = self.values(needed(node, 1)?)?;
        let width = bytes.len().checked_div(columns)?;
        let mut whole = unpacked(&shaped(bytes, width)?, bits, (8 / bits.clamp(1, 8)) * width)?;
        whole = whole.slice_axis(ndarray::Axis(1), (0..rows.min(whole.shape()[1])).into()).to_owned();
        let scale = shaped(self.values(needed(node, 2)?)?, blocks)?;
        let zero = match needed(node, 3) {
            None => ndarray::ArrayD::from_elem(ndarray::IxDyn(&[1]), 2f32.powi(bits as i32 - 1)),
            Some(zero) if self.constants.is_float(zero) => shaped(self.values(zero)?, blocks)?,
            Some(zero) => {
                let bytes = self.values(zero)?;
                let width = bytes.len().checked_div(columns)?;
                unpacked(&shaped(bytes, width)?, bits, blocks)?
            }
        };
        let weight = dequantised(&whole, Some(&scale), Some(&zero), Grid { axis: 1, block: block as i64 })?;
        if weight.shape() != [columns, rows] {
            return None;
        }
        let name = self.fresh(needed(node, 1)?, "real");
        self.constant(&name, weight.reversed_axes().as_standard_layout().into_owned());
        let product = self.op("MatMul", &[needed(node, 0)?, &name], output);
        match needed(node, 5) {
            Some(bias) => self.op_as("Add", &[&product, bias], output),
            None => self.give(&product, output)?,
        }
        Some(())
    }

    /// Rows of a table whose scales go with blocks.
    fn gather_block_quantized(&mut self, node: &NodeProto, output: &str) -> Option<()> {
        let (table, bits) = (needed(node, 0)?, usize::try_from(node.int("bits", 4)).ok()?);
        let packed = self.constants.data_type(table)? == ElementType::U8.onnx();
        let grid = Grid { axis: node.int("quantize_axis", 1), block: node.int("block_size", 128) };
        let mut values = self.values(table)?;
        let unpack = |values: ndarray::ArrayD<f32>| {
            let each = 8usize.checked_div(bits)?;
            let columns = values.shape().last()?.checked_mul(each)?;
            unpacked(&values, bits, columns)
        };
        let mut zero = needed(node, 3).map(|zero| self.values(zero)).map_or(Some(None), |z| z.map(Some))?;
        let scale = self.values(needed(node, 2)?)?;
        if packed {
            values = unpack(values)?;
            zero = Some(match zero {
                None => ndarray::ArrayD::from_elem(ndarray::IxDyn(&[1]), 2f32.powi(bits as i32 - 1)),
                Some(zero) => {
                    let unpacked = unpack(zero)?;
                    let columns = (*scale.shape().last()?).min(*unpacked.shape().last()?);
                    let last = ndarray::Axis(unpacked.ndim().checked_sub(1)?);
                    unpacked.slice_axis(last, (0..columns).into()).to_owned()
                }
            });
        }
        let real = dequantised(&values, Some(&scale), zero.as_ref(), grid)?;
        let name = self.fresh(table, "real");
        self.constant(&name, real);
        let axis = attribute::int("axis", node.int("gather_axis", 0));
        let rows = self.op_with("Gather", &[&name, needed(node, 1)?], vec![axis], output);
        self.give(&rows, output)
    }

    /// `com.microsoft`'s own operators, on real numbers.
    fn fused(&mut self, node: &NodeProto, operator: &str, inputs: Vec<String>, attributes: &[&str]) -> Option<()> {
        self.written.nodes.push(NodeProto {
            op_type: operator.to_owned(),
            domain: node.domain.clone(),
            name: node.name.clone(),
            input: inputs,
            output: node.output.clone(),
            attribute: self::attributes(node, attributes),
            ..NodeProto::default()
        });
        Some(())
    }

    fn attention(&mut self, node: &NodeProto) -> Option<()> {
        if needed(node, 8).is_some() {
            return None;
        }
        let x = self.real(needed(node, 0)?, scheme(node, 3, 6, Grid::COLUMNS))?;
        let weight = self.real(needed(node, 1)?, scheme(node, 4, 7, Grid::COLUMNS))?;
        let inputs = vec![x, weight, operand(node, 2).to_owned(), operand(node, 5).to_owned()];
        let attributes = ["num_heads", "unidirectional", "mask_filter_value", "scale", "do_rotary"];
        self.fused(node, "Attention", inputs, &attributes)
    }

    fn embed_layer_normalization(&mut self, node: &NodeProto) -> Option<()> {
        let mut inputs: Vec<String> = (0..8).map(|at| operand(node, at).to_owned()).collect();
        for (at, table) in (2..7).enumerate() {
            if let Some(value) = needed(node, table) {
                inputs[table] = self.real(value, scheme(node, 8 + at, 13 + at, Grid::COLUMNS))?;
            }
        }
        self.fused(node, "EmbedLayerNormalization", inputs, &["epsilon"])
    }
}
