//! Speed of the integer and float tiles alone, in GOP/s (two operations a multiply-accumulate), best of many runs.
//!
//! `cargo run --release -p vedge-tests --bin tiles`
//!
//! The weights are bell-shaped with the given standard deviation in −127…127: trained layers quantized per channel
//! have 25 to 50. Paired panels are those whose products fit 16-bit lanes, see `runtime/src/kernels/pack.rs`.

use std::time::Instant;
use vedge_runtime::kernels::{Body, F32Weights, I8Weights, Kernels, MR_I8, NR, RowsOf, detect};

const ROWS: usize = 192;

fn main() -> vedge_runtime::Result<()> {
    let kernels = detect()?;
    println!("kernels {}, {ROWS} rows, one thread", kernels.name);
    println!("| inputs × outputs | weights' σ | int8 GOP/s | wide panels | float GOP/s |");
    println!("|---|---|---|---|---|");
    for (k, n) in [(192, 192), (192, 768), (768, 192), (384, 1536), (1536, 384)] {
        for sigma in [20., 30., 35., 40., 50.] {
            let weights = bell(n * k, sigma);
            let packed = I8Weights::pack(kernels, n, k, &weights, &vec![1.; n]);
            let wide = packed.panels.iter().filter(|p| matches!(p.body, Body::Wide(_))).count();
            let operations = 2. * (ROWS * n * k) as f64;
            let int8 = operations / best(|| integer(kernels, &packed)) / 1e9;
            let float = F32Weights::pack(n, k, |row, i| f32::from(weights[row * k + i]));
            let float = operations / best(|| floats(kernels, &float)) / 1e9;
            println!("| {k} × {n} | {sigma} | {int8:.0} | {wide} of {} | {float:.0} |", packed.panels.len());
        }
    }
    Ok(())
}

/// Sums of six uniform numbers, scaled and clipped.
fn bell(count: usize, sigma: f64) -> Vec<i8> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f64 / f64::from(1u32 << 31) - 0.5
    };
    let mut normal = || (0..6).map(|_| uniform()).sum::<f64>() * std::f64::consts::SQRT_2;
    (0..count).map(|_| (normal() * sigma).round().clamp(-127., 127.) as i8).collect()
}

fn best(mut f: impl FnMut()) -> f64 {
    let time = |_| {
        let start = Instant::now();
        f();
        start.elapsed().as_secs_f64()
    };
    (0..200).map(time).fold(f64::INFINITY, f64::min)
}

fn integer(kernels: &Kernels, w: &I8Weights) {
    let stride = w.row_bytes();
    let (bytes, wide) = (vec![7u8; ROWS * stride], vec![7i16; ROWS * stride]);
    for panel in &w.panels {
        for m in (0..ROWS).step_by(MR_I8) {
            let rows = std::array::from_fn(|i| match panel.is_wide() {
                true => wide[(m + i) * stride..].as_ptr().cast(),
                false => bytes[(m + i) * stride..].as_ptr(),
            });
            let mut sums = [[0; NR]; MR_I8];
            // SAFETY: `detect` returned the kernel; rows hold `row_bytes` activations of the panel's kind.
            unsafe { (kernels.tile_i8)(&rows, panel, &mut sums) };
            std::hint::black_box(&sums);
        }
    }
}

fn floats(kernels: &Kernels, w: &F32Weights) {
    let x = vec![0.5f32; ROWS * w.k];
    let rows = RowsOf { x: &x, n: ROWS, width: w.k, stride: w.k };
    let mut sums = vec![0.; ROWS * w.n];
    kernels.multiply(&rows, &w.panels, &mut sums, w.n);
    std::hint::black_box(&sums);
}
