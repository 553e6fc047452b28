//! Row routines that end in bytes or begin with them, where the compiler does not find the instructions: conversions that
//! round and narrowings that saturate, tables of 256 bytes in sixteen registers.

use super::*;
use crate::kernels::requantize::Grid;
use crate::kernels::rows::Products;

/// Values that become one vector of bytes.
const BYTES: usize = 16;

/// The codes of values given in steps from 0. What is not a number gets the lowest.
#[inline(always)]
fn narrow(steps: [float32x4_t; 4], zero: int16x8_t) -> uint8x16_t {
    // SAFETY: NEON is part of the architecture.
    unsafe {
        let [a, b, c, d] = steps.map(|v| vcvtnq_s32_f32(vmaxnmq_f32(v, vdupq_n_f32(-32768.))));
        let low = vqaddq_s16(vqmovn_high_s32(vqmovn_s32(a), b), zero);
        let high = vqaddq_s16(vqmovn_high_s32(vqmovn_s32(c), d), zero);
        vqmovun_high_s16(vqmovun_s16(low), high)
    }
}

/// See [`RowFns::quantize`].
pub fn quantize(x: &[f32], inverse: f32, zero: f32, flip: u8, out: &mut [u8]) {
    let (chunks, rest) = x.as_chunks::<BYTES>();
    let (outs, out_rest) = out[..x.len()].as_chunks_mut::<BYTES>();
    // SAFETY: NEON is part of the architecture; sixteen values and bytes.
    unsafe {
        let (offset, flips) = (vdupq_n_s16(zero as i16), vdupq_n_u8(flip));
        for (x, out) in chunks.iter().zip(outs) {
            let steps = [0, 4, 8, 12].map(|i| vmulq_n_f32(vld1q_f32(x.as_ptr().add(i)), inverse));
            vst1q_u8(out.as_mut_ptr(), veorq_u8(narrow(steps, offset), flips));
        }
    }
    rows::quantize(rest, inverse, zero, flip, out_rest);
}

/// See [`RowFns::round`].
pub fn round(x: &mut [f32], factor: f32, grid: Grid) {
    let (chunks, rest) = x.as_chunks_mut::<BYTES>();
    let steps = factor / grid.scale;
    // SAFETY: NEON is part of the architecture; sixteen values.
    unsafe {
        let (low, high) = (vdupq_n_f32(grid.low), vdupq_n_f32(grid.high));
        for x in chunks {
            let y = [0, 4, 8, 12].map(|i| {
                let q = vmaxnmq_f32(vmulq_n_f32(vld1q_f32(x.as_ptr().add(i)), steps), low);
                vmulq_n_f32(vrndnq_f32(vminq_f32(q, high)), grid.scale)
            });
            (0..4).for_each(|i| vst1q_f32(x.as_mut_ptr().add(4 * i), y[i]));
        }
    }
    rows::round(rest, factor, grid);
}

/// See [`RowFns::codes`].
pub fn codes(products: &Products, factor: f32, zero: f32, out: &mut [u8]) {
    let width = products.tiles.len() * NR;
    assert!(out.len() >= MR_I8 * width);
    // SAFETY: NEON is part of the architecture; a tile and its columns hold NR integers a row, as is room for.
    unsafe {
        let zero = vdupq_n_s16(zero as i16);
        for (p, (tile, columns)) in products.tiles.iter().zip(products.columns).enumerate() {
            let columns = [0, 4, 8, 12].map(|i| vld1q_s32(columns.as_ptr().add(i)));
            for (m, (sums, row)) in tile.iter().zip(products.rows).enumerate() {
                let row = vdupq_n_s32(row);
                let steps = std::array::from_fn(|n| {
                    let exact = vaddq_s32(vaddq_s32(vld1q_s32(sums.as_ptr().add(4 * n)), columns[n]), row);
                    vmulq_n_f32(vcvtq_f32_s32(exact), factor)
                });
                vst1q_u8(out.as_mut_ptr().add(m * width + p * NR), narrow(steps, zero));
            }
        }
    }
}

/// A table of 256 bytes.
#[derive(Clone, Copy)]
struct Lookup([uint8x16x4_t; 4]);

impl Lookup {
    #[inline(always)]
    fn of(table: &[u8; 256]) -> Lookup {
        // SAFETY: NEON is part of the architecture; a quarter of the table is 64 bytes.
        Lookup(std::array::from_fn(|i| unsafe { vld1q_u8_x4(table.as_ptr().add(64 * i)) }))
    }

    #[inline(always)]
    fn at(self, x: uint8x16_t) -> uint8x16_t {
        let [a, b, c, d] = self.0;
        // SAFETY: NEON is part of the architecture. What lies outside a quarter of the table gives 0, then what was there.
        unsafe {
            let y = vqtbl4q_u8(a, x);
            let y = vqtbx4q_u8(y, b, vsubq_u8(x, vdupq_n_u8(64)));
            let y = vqtbx4q_u8(y, c, vsubq_u8(x, vdupq_n_u8(128)));
            vqtbx4q_u8(y, d, vsubq_u8(x, vdupq_n_u8(192)))
        }
    }
}

/// See [`RowFns::lookup`].
pub fn lookup(table: &[u8; 256], x: &mut [u8]) {
    let places = Lookup::of(table);
    let (chunks, rest) = x.as_chunks_mut::<BYTES>();
    for x in chunks {
        // SAFETY: NEON is part of the architecture; sixteen bytes.
        unsafe { vst1q_u8(x.as_mut_ptr(), places.at(vld1q_u8(x.as_ptr()))) };
    }
    rows::lookup(table, rest);
}

/// Vectors whose sums fit 16 bits a lane.
const SUMMED: usize = 128;

/// See [`RowFns::lookup_sum`].
pub fn lookup_sum(table: &[u8; 256], x: &[u8]) -> u32 {
    let places = Lookup::of(table);
    let (chunks, rest) = x.as_chunks::<BYTES>();
    // SAFETY: NEON is part of the architecture; sixteen bytes.
    let sums = chunks.chunks(SUMMED).map(|chunks| unsafe {
        let add = |sum, x: &[u8; BYTES]| vpadalq_u8(sum, places.at(vld1q_u8(x.as_ptr())));
        vaddlvq_u16(chunks.iter().fold(vdupq_n_u16(0), add))
    });
    sums.sum::<u32>() + rows::lookup_sum(table, rest)
}
