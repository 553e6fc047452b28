//! What must hold before the kernels trust a file: they index by the shapes that it states.

use super::lower::DOMAIN;
use super::ops::Fused;
use crate::error::{Error, Result};
use crate::kernels::NR;
use crate::kernels::attention::{Attention, HeadView, Step};
use crate::kernels::conv::{Conv, Filter, Geometry};
use crate::kernels::depthwise::{Depthwise, Taps};
use crate::kernels::linear::Linear;
use crate::kernels::merge::{Match, Merge};
use crate::kernels::windows::Windows;
use crate::onnx::{Graph, absurd, elements};
use std::collections::HashSet;

/// Elements of one input or buffer that vedge takes; far beyond any picture.
pub const LIMIT: u128 = 1 << 28;

/// Inputs of an integer layer up to which 32-bit sums of u8 × i8 are exact.
pub const EXACT_INPUTS: usize = (i32::MAX / (255 * 128)) as usize;

/// Checks that every value is produced once, before it is used, and that nothing poses as a fused operator.
///
/// # Errors
/// [`Error::BadModel`] with the node.
pub fn graph(g: &Graph) -> Result<()> {
    let mut known: HashSet<&str> = g.inputs.iter().map(|i| i.name()).collect();
    known.extend(g.initializers.keys().map(String::as_str));
    for n in &g.nodes {
        let bad = |what: String| Err(Error::BadModel(format!("node `{}` ({}) {what}", n.name(), n.op_type())));
        if n.domain() == DOMAIN {
            return bad(format!("is of the domain `{DOMAIN}`, which no file may use"));
        }
        if let Some(what) = absurd(n) {
            return bad(what);
        }
        if n.output.is_empty() {
            return bad("has no output: the file is damaged".into());
        }
        if let Some(i) = n.input.iter().find(|i| !i.is_empty() && !known.contains(i.as_str())) {
            return bad(format!("needs `{i}`, which nothing produces before it"));
        }
        for o in n.output.iter().filter(|o| !o.is_empty()) {
            if !known.insert(o) {
                return bad(format!("produces `{o}`, which is there already: the file is damaged"));
            }
        }
    }
    Ok(())
}

/// Checks the size of an input.
///
/// # Errors
/// [`Error::Unsupported`].
pub fn input(name: &str, shape: &[usize]) -> Result<()> {
    if (1..=LIMIT).contains(&product(shape)) {
        return Ok(());
    }
    Err(Error::Unsupported {
        what: format!("input `{name}` of shape {shape:?} is empty or too large"),
        hint: "set another size: vedge convert MODEL -o OUT --size N".into(),
    })
}

/// Number of elements, the largest number where it overflows.
pub fn product(sizes: &[usize]) -> u128 {
    sizes.iter().fold(1u128, |p, &s| p.saturating_mul(s as u128))
}

/// `Ok` when the condition holds, else the words.
fn need(holds: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what()) }
}

impl Fused {
    /// Checks that the operator fits its inputs (whose shapes are certain) and the output shape the file states.
    ///
    /// # Errors
    /// What does not fit.
    pub fn check(&self, inputs: &[Vec<usize>], output: &[usize]) -> Result<(), String> {
        let first = inputs.first().ok_or("no input")?;
        need(product(first) <= LIMIT && product(output) <= LIMIT, || format!("{first:?} to {output:?} is too large"))?;
        need(elements(first) > 0 && elements(output) > 0, || format!("{first:?} to {output:?} is empty"))?;
        match self {
            Fused::Linear(l) => layers(&[l.as_ref()], first, &inputs[1..], output),
            Fused::Mlp(pair) => layers(&[&pair[0], &pair[1]], first, &inputs[1..], output),
            Fused::Conv(c) => c.check(first, output),
            Fused::Bottleneck(b) => {
                let picture = |[h, w, c]: [usize; 3]| vec![1, h, w, c];
                let (between, after) = (picture(b.geometry.input), picture(b.geometry.output));
                let fits =
                    first.len() == 4 && first[..3] == between[..3] && output.len() == 4 && output[..3] == after[..3];
                need(fits, || format!("made for {between:?} to {after:?}, used for {first:?} to {output:?}"))?;
                layers(&[&b.expand], first, &[], &between)?;
                b.geometry.check(&between, &after)?;
                need(b.depthwise.fits(&b.geometry), || format!("weights do not fit {:?}", b.geometry))?;
                layers(&[&b.project], &after, &inputs[1..], output)
            }
            Fused::Attention(a) => a.check(inputs, output),
            Fused::Windows(w) => {
                let a = &w.attention;
                let rows = vec![a.batch.saturating_mul(a.queries), w.linear.n()];
                layers(&[&w.linear], first, &[], &rows)?;
                a.check(std::slice::from_ref(&rows), output)?;
                need(Windows::fit(&w.linear, a), || "windows that read rows of others".into())
            }
            Fused::Match(m) => m.check(first, output),
            Fused::Merge(m) => m.check(inputs, output),
            Fused::LayerNorm(norm) => {
                let width = first.last().copied().unwrap_or(0);
                let fits = norm.gamma.len() == width && norm.beta.len() == width && elements(first) == elements(output);
                need(fits, || format!("width {} for {first:?} to {output:?}", norm.gamma.len()))
            }
            Fused::Table(_) => {
                need(elements(first) == elements(output), || format!("{first:?} to {output:?} element by element"))
            }
            Fused::Copy(c) => {
                let sizes: Vec<usize> = c.axes.iter().map(|a| a.0).collect();
                let fits = sizes.iter().all(|&n| n > 0) && product(&sizes) == product(output);
                need(fits && c.end() <= elements(first), || format!("{c:?} does not make {output:?} of {first:?}"))
            }
            Fused::Activation(_) | Fused::Requantize(_) => {
                need(elements(first) == elements(output), || format!("{first:?} does not turn into {output:?}"))
            }
        }
    }
}

/// Linear layers one after the other, the last one with a residual.
fn layers(layers: &[&Linear], input: &[usize], residual: &[Vec<usize>], output: &[usize]) -> Result<(), String> {
    let mut width = input.last().copied().unwrap_or(0);
    for l in layers {
        let norm = l.norm.as_ref().is_none_or(|norm| norm.gamma.len() == l.k() && norm.beta.len() == l.k());
        let norm = norm && l.factors.as_ref().is_none_or(|f| f.len() == l.k());
        let fits = l.k() == width && l.k() > 0 && l.n() > 0 && norm && l.bias.len() * NR >= l.n();
        need(fits, || format!("weights of {} inputs and {} outputs for rows of {width}", l.k(), l.n()))?;
        width = l.n();
    }
    let rows = elements(input) / layers[0].k();
    let fits = output.last() == Some(&width) && rows.checked_mul(width) == Some(elements(output));
    need(fits, || format!("{rows} rows of {width} do not fill {output:?}"))?;
    need(residual.iter().all(|r| elements(r) == elements(output)), || "a residual of another size".into())?;
    let order = &layers[0].order;
    need(layers[1..].iter().all(|l| l.order.is_empty()), || "rows between two layers in another order".into())?;
    need(order.is_empty() || (order.len() == rows && order.iter().all(|&row| (row as usize) < rows)), || {
        format!("an order of {} rows for {rows}", order.len())
    })
}

impl Geometry {
    fn check(&self, input: &[usize], output: &[usize]) -> Result<(), String> {
        let g = self;
        need(input == [&[1], &g.input[..]].concat() && output == [&[1], &g.output[..]].concat(), || {
            format!("made for {:?} to {:?}, used for {input:?} to {output:?}", g.input, g.output)
        })?;
        let mut canvas = [0u128; 2];
        for (axis, size) in canvas.iter_mut().enumerate() {
            let of = |v: usize| v as u128;
            *size = of(g.input[axis]) + of(g.pads[axis]) + of(g.pads[axis + 2]);
            let reach = of(g.dilation[axis]) * of(g.kernel[axis].saturating_sub(1)) + 1;
            let fits = g.kernel[axis] > 0
                && g.stride[axis] > 0
                && reach <= *size
                && (*size - reach) / of(g.stride[axis]) + 1 == of(g.output[axis]);
            need(fits, || format!("kernel, stride and padding {g:?} contradict each other"))?;
        }
        let c = g.input[2];
        let canvas = canvas[0].saturating_mul(canvas[1]).saturating_mul(c as u128);
        let row = product(&[g.kernel[0], g.kernel[1], c]);
        need(canvas <= LIMIT && row <= LIMIT, || format!("{g:?} is too large"))
    }
}

impl Conv {
    fn check(&self, input: &[usize], output: &[usize]) -> Result<(), String> {
        let g = &self.geometry;
        let [h, w, c] = g.input;
        match &self.filter {
            Filter::Patches(_) => {
                let plain = input == [1, c, h, w] && g.pads == [0; 4] && g.dilation == [1, 1];
                need(plain, || format!("patches of {g:?}, used for {input:?}"))?;
                g.check(&[1, h, w, c], output)?;
            }
            _ => g.check(input, output)?,
        }
        let (k, oc) = (g.taps() * g.input[2], g.output[2]);
        let fits = match &self.filter {
            Filter::Dense(l) | Filter::Patches(l) => {
                l.norm.is_none() && l.factors.is_none() && l.k() == k && l.n() == oc && l.bias.len() * NR >= oc
            }
            Filter::Depthwise(d) => d.fits(g),
        };
        need(fits, || format!("weights do not fit {g:?}"))
    }
}

impl Depthwise {
    fn fits(&self, g: &Geometry) -> bool {
        let c = g.input[2];
        let taps = match &self.taps {
            Taps::I8 { values, sums, scale, .. } => values.len() == g.taps() * c && scale.len() == c && sums.len() == c,
            Taps::F32(values) => values.len() == g.taps() * c,
        };
        taps && g.output[2] == c && self.bias.len() == c
    }
}

/// Whether a strided view of these sizes lies within a tensor of `len` elements.
fn within(sizes: [usize; 4], offset: usize, strides: [usize; 4], len: usize) -> bool {
    let steps = sizes.iter().zip(strides);
    let last = steps.fold(offset as u128, |at, (&n, s)| at.saturating_add((n as u128 - 1).saturating_mul(s as u128)));
    last < len as u128
}

impl Match {
    fn check(&self, keys: &[usize], output: &[usize]) -> Result<(), String> {
        let sizes = [1, self.heads, self.tokens, self.dim];
        need(sizes.iter().all(|&n| n > 0) && product(&sizes) <= LIMIT, || format!("sizes {sizes:?}"))?;
        let fits = self.merged <= self.sides()[0] && self.sides()[1] > 0 && elements(output) == self.tokens;
        need(fits, || format!("{self:?} for {output:?}"))?;
        need(within(sizes, self.keys.offset, self.keys.strides, elements(keys)), || "its keys lie outside".into())
    }
}

impl Merge {
    fn check(&self, inputs: &[Vec<usize>], output: &[usize]) -> Result<(), String> {
        let sizes: Vec<usize> = inputs.iter().map(|i| elements(i)).collect();
        let values = product(&[self.tokens, self.width]);
        let fits = matches!(sizes[..], [x, p] | [x, p, _] if x as u128 == values && p == self.tokens)
            && sizes.get(2).is_none_or(|&s| s == self.tokens)
            && product(&[self.left, self.width]) == product(output);
        need(fits && self.left > 0, || format!("{self:?} does not make {output:?} of {inputs:?}"))
    }
}

impl Attention {
    fn check(&self, inputs: &[Vec<usize>], output: &[usize]) -> Result<(), String> {
        let (b, h) = (self.batch, self.heads);
        let sizes = [b, h, self.queries, self.keys, self.dim, self.dim_v];
        need(sizes.iter().all(|&n| n > 0) && product(&sizes[..4]) <= 64 * LIMIT, || format!("sizes {sizes:?}"))?;
        for (name, v, tokens, dim) in [
            ("queries", &self.q, self.queries, self.dim),
            ("keys", &self.k, self.keys, self.dim),
            ("values", &self.v, self.keys, self.dim_v),
        ] {
            let HeadView { input, offset, strides } = *v;
            let len = inputs.get(input).map_or(0, |i| elements(i));
            need(within([b, h, tokens, dim], offset, strides, len), || {
                format!("its {name} lie outside of their tensor")
            })?;
        }
        let len = elements(output);
        // Every element of the result is written once: sorted, each stride is the size of all axes below it.
        let mut axes: Vec<(usize, usize)> = self.out.into_iter().zip([b, h, self.queries, self.dim_v]).collect();
        axes.retain(|a| a.1 != 1);
        axes.sort_unstable();
        let filled = axes.iter().try_fold(
            1usize,
            |filled, &(stride, n)| {
                if stride == filled { filled.checked_mul(n) } else { None }
            },
        );
        need(filled == Some(len), || format!("its result does not fill {output:?}"))?;
        self.steps.iter().try_for_each(|step| match step {
            Step::Times(_) | Step::Round(_) => Ok(()),
            Step::Add(s) => {
                let fits = s.batch > 0 && s.heads > 0 && s.values.len() == s.batch * s.heads * self.queries * self.keys;
                need(fits, || "a bias of another size".into())
            }
            Step::AddInput(input) => {
                let added = inputs.get(*input).map_or(0, |s| elements(s));
                need(added == self.keys, || "a bias of another number of keys".into())
            }
        })
    }
}
