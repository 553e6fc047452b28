//! Weights in the order the tiles read them.
//!
//! A panel holds [`NR`] output features. Its inputs are cut into groups of [`GROUP`]; a group is `[NR][GROUP]` bytes.
//!
//! **Paired layout.** AVX2 without VNNI multiplies u8 × i8 and adds two products into a *saturating* i16
//! (`vpmaddubsw`). Summing two such results in i16 before widening halves the widening work (249 instead of 197 GOP/s
//! on a Zen 3 core) but is exact only while every i16 lane stays in range. A lane sums products of activations
//! 0…255 with weights w, so it lies between 255·(sum of negative w) and 255·(sum of positive w): it is in range when
//! the positive weights sum to at most 128 and the negative ones to at least −128. Which two groups share a lane is
//! free to choose, per panel: groups are matched so that the bound holds in all lanes; a group without a partner goes
//! alone, one that breaks the bound alone is split into two that add up to it. Narrow weights thus run at full speed
//! and are exact. Where a panel's weights are too wide for that to pay, it is stored as i16 for `vpmaddwd`.

use super::{GROUP, Kernels, Layout, NR};

/// Bytes of one group in a panel.
const GROUP_BYTES: usize = NR * GROUP;
/// 16-bit lanes of one group: two per column.
const LANES: usize = NR * 2;
/// Largest sum of positive (or negated negative) weights in a lane: 255 · 128 ≤ 32767.
const LANE_LIMIT: u8 = 128;

/// A group's weights, aligned for vector loads.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group(pub [i8; GROUP_BYTES]);

/// [`NR`] output features, packed.
#[derive(Clone, Debug)]
pub struct I8Panel {
    /// The weights.
    pub body: Body,
    /// Scale of each column.
    pub scale: [f32; NR],
    /// Sum of each column's weights.
    pub sum: [i32; NR],
    /// Whether a weight is −128, with which two products may not fit 16 bits.
    pub lowest: bool,
}

/// Weights of a panel, in the order its kernel reads them.
#[derive(Clone, Debug)]
pub enum Body {
    /// Groups in order.
    Plain(Vec<Group>),
    /// Groups two by two up to `singles`, then one by one.
    Paired {
        /// The weights.
        groups: Vec<Group>,
        /// Byte offset of each group in the activation row.
        offsets: Vec<u32>,
        /// Index of the first group that goes alone; even.
        singles: usize,
    },
    /// 16-bit weights for 16-bit activations: for each pair of inputs `[NR][2]`.
    Wide(Vec<WidePair>),
    /// Two groups together: for eight inputs `[NR][8]`.
    Octets(Vec<Octet>),
}

/// Eight inputs of [`NR`] columns, `[NR][8]`.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Octet(pub [i8; 2 * GROUP_BYTES]);

/// Two inputs of [`NR`] columns in 16 bits, `[NR][2]`.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WidePair(pub [i16; NR * 2]);

impl I8Panel {
    /// Whether the kernel reads 16-bit activations for this panel.
    pub fn is_wide(&self) -> bool {
        matches!(self.body, Body::Wide(_))
    }
}

/// Int8 weights of a linear layer `[n][k]`, symmetric, one scale per output feature.
#[derive(Clone, Debug, Default)]
pub struct I8Weights {
    /// Inputs.
    pub k: usize,
    /// Outputs.
    pub n: usize,
    /// Inputs that the kernel takes at once.
    pub step: usize,
    /// Panels of [`NR`] outputs, the last one padded with zeros.
    pub panels: Vec<I8Panel>,
}

impl I8Weights {
    /// Packs weights `[n][k]` (row-major, one row an output) with `scale` per output for a kernel.
    ///
    /// # Panics
    /// When the lengths do not match.
    pub fn pack(kernels: &Kernels, n: usize, k: usize, weights: &[i8], scale: &[f32]) -> I8Weights {
        I8Weights::pack_strided(kernels, [n, k], weights, [k, 1], scale)
    }

    /// As [`I8Weights::pack`], for weights that lie `strides` apart from output to output and from input to input.
    ///
    /// # Panics
    /// When the lengths do not match.
    pub fn pack_strided(
        kernels: &Kernels,
        [n, k]: [usize; 2],
        weights: &[i8],
        strides: [usize; 2],
        scale: &[f32],
    ) -> I8Weights {
        assert_eq!(weights.len(), n * k);
        assert_eq!(scale.len(), n);
        let panels = (0..n.div_ceil(NR))
            .map(|p| {
                let first = p * NR;
                let columns = NR.min(n - first);
                let mut column_scale = [0.; NR];
                column_scale[..columns].copy_from_slice(&scale[first..first + columns]);
                let groups = groups(&weights[first * strides[0]..], [columns, k], strides);
                let mut sum = [0; NR];
                for group in &groups {
                    for (sum, weights) in sum.iter_mut().zip(group.0.as_chunks::<GROUP>().0) {
                        *sum += weights.iter().map(|&w| i32::from(w)).sum::<i32>();
                    }
                }
                let lowest = groups.iter().any(|g| g.0.iter().fold(0, |low, &w| w.min(low)) == i8::MIN);
                let body = match kernels.layout {
                    Layout::Plain => Body::Plain(groups),
                    Layout::Paired => pair(&groups),
                    Layout::Octets => octets(&groups),
                };
                I8Panel { body, scale: column_scale, sum, lowest }
            })
            .collect();
        I8Weights { k, n, step: kernels.layout.step(), panels }
    }

    /// Bytes an activation row must have: K rounded up to what the kernel takes at once.
    pub fn row_bytes(&self) -> usize {
        self.k.next_multiple_of(self.step)
    }

    /// Whether any panel reads 16-bit activations.
    pub fn needs_wide_rows(&self) -> bool {
        self.panels.iter().any(I8Panel::is_wide)
    }

    /// Whether any panel reads 8-bit activations.
    pub fn needs_byte_rows(&self) -> bool {
        !self.panels.iter().all(I8Panel::is_wide)
    }

    /// Bytes of the packed weights.
    pub fn bytes(&self) -> usize {
        let of = |b: &Body| match b {
            Body::Plain(groups) => groups.len() * GROUP_BYTES,
            Body::Paired { groups, .. } => groups.len() * (GROUP_BYTES + 4),
            Body::Wide(pairs) => pairs.len() * size_of::<WidePair>(),
            Body::Octets(octets) => octets.len() * size_of::<Octet>(),
        };
        self.panels.iter().map(|p| of(&p.body)).sum()
    }
}

/// Cuts the inputs of at most [`NR`] outputs into groups, filled up with zeros.
fn groups(weights: &[i8], [n, k]: [usize; 2], strides: [usize; 2]) -> Vec<Group> {
    let mut groups = vec![Group([0; GROUP_BYTES]); k.div_ceil(GROUP)];
    for (g, group) in groups.iter_mut().enumerate() {
        let weights = &weights[g * GROUP * strides[1]..];
        let inputs = GROUP.min(k - g * GROUP);
        // Sizes known to the compiler, so that it vectorizes.
        match strides {
            [1, inputs_apart] if n == NR && inputs == GROUP => {
                let rows: [&[i8; NR]; GROUP] =
                    std::array::from_fn(|i| weights[i * inputs_apart..].first_chunk().expect("a row of NR weights"));
                for (c, column) in group.0.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
                    *column = rows.map(|row| row[c]);
                }
            }
            [outputs_apart, 1] if inputs == GROUP => {
                for (c, column) in group.0.as_chunks_mut::<GROUP>().0.iter_mut().enumerate().take(n) {
                    *column = *weights[c * outputs_apart..].first_chunk().expect("a group of weights");
                }
            }
            _ => {
                for (c, column) in group.0.as_chunks_mut::<GROUP>().0.iter_mut().enumerate().take(n) {
                    for (i, w) in column.iter_mut().enumerate().take(inputs) {
                        *w = weights[c * strides[0] + i * strides[1]];
                    }
                }
            }
        }
    }
    groups
}

/// Sums of the positive weights of each 16-bit lane, then of the negative ones without their sign: at most 2 · 128, and
/// what is 255 or more is far above the limit.
#[derive(Clone, Copy)]
struct Load([u8; 2 * LANES]);

impl Load {
    fn of(g: &Group) -> Load {
        let mut sums = [0u8; 2 * LANES];
        let (positive, negative) = sums.split_at_mut(LANES);
        for ((w, p), n) in g.0.as_chunks::<2>().0.iter().zip(positive).zip(negative) {
            *p = w[0].max(0) as u8 + w[1].max(0) as u8;
            *n = w[0].min(0).unsigned_abs().saturating_add(w[1].min(0).unsigned_abs());
        }
        Load(sums)
    }

    fn fits_with(&self, other: &Load) -> bool {
        self.0.iter().zip(&other.0).map(|(a, b)| a.saturating_add(*b)).fold(0, u8::max) <= LANE_LIMIT
    }

    fn lane(&self, i: usize) -> u8 {
        self.0[i].max(self.0[LANES + i])
    }

    fn peak(&self) -> u8 {
        self.0.iter().copied().fold(0, u8::max)
    }
}

/// Multiplications a row needs for one vector pair of columns: two groups together, a group alone, a group in 16 bits
/// (measured on Zen 3, relative).
const PAIR_COST: usize = 12;
const SINGLE_COST: usize = 8;
const WIDE_COST: usize = 9;

/// Orders groups two by two so that no lane overflows, or widens the panel where that costs less.
fn pair(groups: &[Group]) -> Body {
    let mut parts: Vec<(Group, u32)> = Vec::with_capacity(groups.len() * 5 / 4);
    let mut loads: Vec<Load> = Vec::with_capacity(parts.capacity());
    for (i, g) in groups.iter().enumerate() {
        let offset = (i * GROUP) as u32;
        let load = Load::of(g);
        if load.peak() <= LANE_LIMIT {
            parts.push((*g, offset));
            loads.push(load);
            continue;
        }
        let (mut a, mut b) = (*g, Group([0; GROUP_BYTES]));
        for (i, w) in g.0.iter().enumerate() {
            if load.lane(i / 2) > LANE_LIMIT {
                b.0[i] = w / 2;
                a.0[i] = w - w / 2;
            }
        }
        loads.extend([Load::of(&a), Load::of(&b)]);
        parts.extend([(a, offset), (b, offset)]);
    }
    if (parts.len() / 2) * PAIR_COST >= groups.len() * WIDE_COST {
        return widen(groups);
    }
    // The fullest first, each with the fullest that still fits.
    let peaks: Vec<u8> = loads.iter().map(Load::peak).collect();
    let mut left: Vec<usize> = (0..parts.len()).collect();
    left.sort_by_key(|&i| std::cmp::Reverse(peaks[i]));
    let (mut pairs, mut alone) = (vec![], vec![]);
    let mut used = vec![false; parts.len()];
    for (at, &i) in left.iter().enumerate() {
        if std::mem::replace(&mut used[i], true) {
            continue;
        }
        match left[at + 1..].iter().find(|&&j| !used[j] && loads[i].fits_with(&loads[j])) {
            Some(&j) => {
                used[j] = true;
                pairs.extend([i, j]);
            }
            None => alone.push(i),
        }
    }
    if pairs.len() / 2 * PAIR_COST + alone.len() * SINGLE_COST >= groups.len() * WIDE_COST {
        return widen(groups);
    }
    let singles = pairs.len();
    pairs.extend(alone);
    let groups = pairs.iter().map(|&i| parts[i].0).collect();
    Body::Paired { groups, offsets: pairs.iter().map(|&i| parts[i].1).collect(), singles }
}

fn widen(groups: &[Group]) -> Body {
    let mut pairs = vec![];
    for g in groups {
        for half in 0..2 {
            pairs.push(WidePair(std::array::from_fn(|i| i16::from(g.0[i / 2 * GROUP + half * 2 + i % 2]))));
        }
    }
    Body::Wide(pairs)
}

fn octets(groups: &[Group]) -> Body {
    let octet = |pair: &[Group]| {
        // A group without a partner is filled up with zeros.
        let mut octet = [0; 2 * GROUP_BYTES];
        for (half, group) in pair.iter().enumerate() {
            let columns = octet.as_chunks_mut::<GROUP>().0.iter_mut().skip(half).step_by(2);
            columns.zip(group.0.as_chunks::<GROUP>().0).for_each(|(into, weights)| *into = *weights);
        }
        Octet(octet)
    };
    Body::Octets(groups.chunks(2).map(octet).collect())
}

/// Float weights of a linear layer: panels of `[k][NR]`, the last one padded with zeros.
#[derive(Clone, Debug)]
pub struct F32Weights {
    /// Inputs.
    pub k: usize,
    /// Outputs.
    pub n: usize,
    /// Panel after panel.
    pub panels: Vec<f32>,
}

impl F32Weights {
    /// Packs `weight(row, input)` for `n` outputs and `k` inputs.
    pub fn pack(n: usize, k: usize, weight: impl Fn(usize, usize) -> f32) -> F32Weights {
        let mut panels = vec![0.; n.div_ceil(NR) * k * NR];
        for row in 0..n {
            let panel = &mut panels[row / NR * k * NR..][..k * NR];
            for i in 0..k {
                panel[i * NR + row % NR] = weight(row, i);
            }
        }
        F32Weights { k, n, panels }
    }
}
