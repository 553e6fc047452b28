//! vedge's operators inside a tract plan.

use crate::exec::Exec;
use crate::kernels::attention::{Arithmetic, Attention};
use crate::kernels::conv::{Conv, Filter};
use crate::kernels::copy::Copy;
use crate::kernels::depthwise::Bottleneck;
use crate::kernels::linear::{Linear, Weights};
use crate::kernels::merge::{Match, Merge};
use crate::kernels::requantize::{Requantize, Table};
use crate::kernels::windows::Windows;
use crate::kernels::{Activation, Norm};
use std::fmt;
use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::*;

/// What a fused operator computes. Inputs and outputs are float32.
#[derive(Clone, Debug)]
pub enum Fused {
    /// Rows times weights; a second input is the residual.
    Linear(Box<Linear>),
    /// Two linear layers in a row, such as an MLP; a second input is the residual.
    Mlp(Box<[Linear; 2]>),
    /// Convolution of a picture, channels last.
    Conv(Box<Conv>),
    /// Pointwise layer, depthwise convolution, pointwise layer, channels last; a second input is the residual.
    Bottleneck(Box<Bottleneck>),
    /// Scaled dot-product attention; inputs as its views number them.
    Attention(Box<Attention>),
    /// Attention within windows, with the linear layer before it.
    Windows(Box<Windows>),
    /// Decides which tokens become one, from their keys.
    Match(Match),
    /// Makes one of the tokens that were matched: values, places, and where they count unequally, sizes.
    Merge(Merge),
    /// LayerNorm over the last axis.
    LayerNorm(Norm),
    /// An element-wise function.
    Activation(Activation),
    /// Rounds to the integers that a file quantizes to.
    Requantize(Requantize),
    /// An element-wise function of values that are rounded to 256 steps.
    Table(Table),
    /// Moves data.
    Copy(Copy),
}

impl Fused {
    /// Operator class, as `inspect` shows it.
    pub fn class(&self) -> &'static str {
        match self {
            Fused::Linear(_) => "linear",
            Fused::Mlp(_) => "mlp",
            Fused::Conv(c) if matches!(c.filter, Filter::Depthwise(_)) => "depthwise",
            Fused::Conv(_) => "conv",
            Fused::Bottleneck(_) => "bottleneck",
            Fused::Attention(_) => "attention",
            Fused::Windows(_) => "windows",
            Fused::Match(_) => "match",
            Fused::Merge(_) => "merge",
            Fused::LayerNorm(_) => "layer_norm",
            Fused::Activation(_) => "activation",
            Fused::Requantize(_) => "requantize",
            Fused::Table(_) => "table",
            Fused::Copy(_) => "copy",
        }
    }

    /// Whether it computes in integers.
    pub fn is_integer(&self) -> bool {
        match self {
            Fused::Linear(l) => matches!(l.weights, Weights::I8(..)),
            Fused::Mlp(layers) => layers.iter().all(|l| matches!(l.weights, Weights::I8(..))),
            Fused::Conv(c) => c.is_integer(),
            Fused::Bottleneck(b) => [&b.expand, &b.project].iter().all(|l| matches!(l.weights, Weights::I8(..))),
            Fused::Attention(a) => a.arithmetic != Arithmetic::Float,
            Fused::Windows(w) => matches!(w.linear.weights, Weights::I8(..)),
            _ => false,
        }
    }

    /// Multiply-accumulates for an output of so many elements.
    pub fn macs(&self, elements: usize) -> usize {
        match self {
            Fused::Linear(l) => elements * l.k(),
            Fused::Mlp(layers) => {
                elements / layers[1].n() * (layers[0].k() * layers[0].n() + layers[1].k() * layers[1].n())
            }
            Fused::Conv(c) => c.macs(),
            Fused::Bottleneck(b) => b.macs(),
            Fused::Attention(a) => a.macs(),
            Fused::Windows(w) => w.macs(),
            Fused::Match(m) => m.macs(),
            Fused::Merge(_) | Fused::LayerNorm(_) | Fused::Activation(_) => 0,
            Fused::Requantize(_) | Fused::Table(_) | Fused::Copy(_) => 0,
        }
    }

    fn run(&self, exec: &Exec, inputs: &[&[f32]], out: &mut [f32]) {
        match self {
            Fused::Linear(l) => l.run(exec, inputs[0], inputs.get(1).copied(), out),
            Fused::Mlp(layers) => layers[0].run_with(&layers[1], exec, inputs[0], inputs.get(1).copied(), out),
            Fused::Conv(c) => c.run(exec, inputs[0], out),
            Fused::Bottleneck(b) => b.run(exec, inputs[0], inputs.get(1).copied(), out),
            Fused::Attention(a) => a.run(exec, inputs, out),
            Fused::Windows(w) => w.run(exec, inputs[0], out),
            Fused::Copy(c) => c.run(exec, inputs[0], out),
            Fused::Match(m) => m.run(exec, inputs[0], out),
            Fused::Merge(m) => m.run(inputs[0], inputs[1], inputs.get(2).copied(), out),
            Fused::LayerNorm(norm) => {
                let k = norm.gamma.len();
                let block = exec.block(out.len() / k, 48, 1);
                exec.chunks(out, block * k, &|b, out| {
                    let row = |i: usize| &inputs[0][(b * block + i) * k..][..k];
                    exec.kernels.layer_norm(norm, row, out, &mut []);
                });
            }
            Fused::Requantize(r) => {
                let grid = r.grid(exec.kernels, inputs[0]);
                element_wise(exec, inputs[0], out, &|x| grid.round(exec.kernels, x));
            }
            Fused::Table(table) => element_wise(exec, inputs[0], out, &|x| table.apply(exec.kernels, x)),
            Fused::Activation(a) => element_wise(exec, inputs[0], out, &|x| exec.activate(*a, x)),
        }
    }
}

/// Copies `x` and changes it in place, a part on each thread.
fn element_wise(exec: &Exec, x: &[f32], out: &mut [f32], change: &(dyn Fn(&mut [f32]) + Sync)) {
    let size = out.len().div_ceil(exec.threads()).next_multiple_of(1024);
    exec.chunks(out, size, &|b, out| {
        out.copy_from_slice(&x[b * size..][..out.len()]);
        change(out);
    });
}

/// A [`Fused`] operator as a tract operator with a fixed output shape.
#[derive(Clone)]
pub struct FusedOp {
    /// What it computes.
    pub fused: Arc<Fused>,
    /// Where it runs.
    pub exec: Arc<Exec>,
    /// Shape of the output.
    pub shape: TVec<usize>,
}

impl fmt::Debug for FusedOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {:?}", self.fused.class(), self.shape)
    }
}

impl PartialEq for FusedOp {
    fn eq(&self, other: &FusedOp) -> bool {
        Arc::ptr_eq(&self.fused, &other.fused)
    }
}

impl Eq for FusedOp {}

impl Op for FusedOp {
    fn name(&self) -> StaticName {
        format!("Vedge.{}", self.fused.class()).into()
    }

    op_as_typed_op!();
}

impl EvalOp for FusedOp {
    fn eval_out_of_plan(&self, _: TVec<TValue>) -> TractResult<Option<TVec<TValue>>> {
        Ok(None)
    }

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let mut out = output(&self.shape)?;
        let views: TVec<_> = inputs.iter().map(|i| i.to_plain_array_view::<f32>()).collect::<TractResult<_>>()?;
        let slices: TVec<&[f32]> =
            views.iter().map(|v| v.as_slice().context("input is not contiguous")).collect::<TractResult<_>>()?;
        let mut view = out.to_plain_array_view_mut::<f32>()?;
        let out_slice = view.as_slice_mut().context("output is not contiguous")?;
        let macs = self.fused.macs(out_slice.len());
        self.exec.measure(self.fused.class(), macs, || self.fused.run(&self.exec, &slices, out_slice));
        drop(view);
        Ok(tvec![out.into_tvalue()])
    }
}

impl TypedOp for FusedOp {
    fn output_facts(&self, _: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(tvec![f32::fact(&self.shape)])
    }

    as_op!();
}

/// A tensor for an operator to fill; its elements are not set, since every operator writes all of them.
fn output(shape: &[usize]) -> TractResult<Tensor> {
    // SAFETY: any bits are a valid f32, and `Fused::run` overwrites each element.
    unsafe { Tensor::uninitialized::<f32>(shape) }
}
