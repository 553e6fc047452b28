//! x86-64: AVX2 everywhere, VNNI of AVX-512 where the CPU has it.

mod avx2;
mod float;
mod functions;
mod norm;
mod vnni;
mod words;

use super::Kernels;

/// The kernels this CPU can run, best first.
pub fn kernels() -> Vec<&'static Kernels> {
    let mut all = vec![];
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        if vnni::is_available() {
            all.push(&vnni::KERNELS);
        }
        all.push(&avx2::KERNELS);
    }
    all
}
