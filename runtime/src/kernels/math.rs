//! Elementary functions on lanes: written so that the compiler vectorizes them inside the row routines.
//!
//! `FMA` says whether the target fuses multiply and add; without it `mul_add` would call a library function.

/// a·b + c.
#[inline(always)]
pub fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// e^x for x ≤ 88; relative error below 2e-7; results below 1e-38 are flushed to about 1e-38.
///
/// Cody–Waite reduction to |r| ≤ ln2/2 and a polynomial of degree 6 (Taylor coefficients with the last two adjusted).
#[inline(always)]
pub fn exp<const FMA: bool>(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    // Adding 1.5·2^23 rounds to an integer in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = fma::<FMA>(x, LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma::<FMA>(n, -LN2_LO, fma::<FMA>(n, -LN2_HI, x));
    let p = fma::<FMA>(r, 1.388_888_9e-3, 8.333_334e-3);
    let p = fma::<FMA>(p, r, 4.166_666_6e-2);
    let p = fma::<FMA>(p, r, 1.666_666_7e-1);
    let p = fma::<FMA>(p, r, 0.5);
    let p = fma::<FMA>(p, r * r, r) + 1.0;
    // 2^n through the exponent bits; n is in −126…127 after the clamp.
    let scale = f32::from_bits(shifted.to_bits().wrapping_shl(23).wrapping_add(127 << 23));
    p * scale
}

/// erf(x), absolute error below 5e-7: the rational approximation of Eigen (`generic_fast_erf_float`), |x| clamped to 4.
#[inline(always)]
pub fn erf<const FMA: bool>(x: f32) -> f32 {
    let x = x.clamp(-4.0, 4.0);
    let x2 = x * x;
    let p = fma::<FMA>(x2, -2.726_142_3e-10, 2.770_681_4e-8);
    let p = fma::<FMA>(p, x2, -2.101_024e-6);
    let p = fma::<FMA>(p, x2, -5.692_506_4e-5);
    let p = fma::<FMA>(p, x2, -7.349_906e-4);
    let p = fma::<FMA>(p, x2, -2.954_6e-3);
    let p = fma::<FMA>(p, x2, -1.609_603_3e-2);
    let q = fma::<FMA>(x2, -1.456_607_2e-5, -2.133_740_6e-4);
    let q = fma::<FMA>(q, x2, -1.682_827e-3);
    let q = fma::<FMA>(q, x2, -7.373_329e-3);
    let q = fma::<FMA>(q, x2, -1.426_473_9e-2);
    x * p / q
}

/// GELU with erf.
#[inline(always)]
pub fn gelu<const FMA: bool>(x: f32) -> f32 {
    let h = 0.5 * x;
    fma::<FMA>(h, erf::<FMA>(x * std::f32::consts::FRAC_1_SQRT_2), h)
}

/// For [`gelu_coarse`]: from where on Φ is taken as 0 or 1, and (Φ(x) − 1/2)/x as a polynomial in x² below.
pub const GELU_END: f32 = 4.15;
/// See [`GELU_END`]; the highest power first.
pub const GELU_COEFFICIENTS: [f32; 8] = [
    -9.399_402e-10,
    8.191_294e-8,
    -3.103_754e-6,
    6.778_190_4e-5,
    -9.572_257_4e-4,
    9.323_817e-3,
    -6.557_477e-2,
    3.984_94e-1,
];

/// GELU with erf for the outputs of integer layers, absolute error below 1e-4. Half the work of [`gelu`], which divides.
#[inline(always)]
pub fn gelu_coarse<const FMA: bool>(x: f32) -> f32 {
    let z = x.clamp(-GELU_END, GELU_END);
    let t = z * z;
    let [first, rest @ ..] = GELU_COEFFICIENTS;
    let p = rest.into_iter().fold(first, |p, c| fma::<FMA>(p, t, c));
    x * fma::<FMA>(z, p, 0.5)
}

/// Logistic function.
#[inline(always)]
pub fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<FMA>(-x))
}

/// x·σ(x).
#[inline(always)]
pub fn silu<const FMA: bool>(x: f32) -> f32 {
    x / (1.0 + exp::<FMA>(-x))
}

/// GELU's tanh form: x·σ(2u), u = √(2/π)·(x + 0.044715·x³).
#[inline(always)]
pub fn gelu_tanh<const FMA: bool>(x: f32) -> f32 {
    const TWO_SQRT_2_OVER_PI: f32 = 1.595_769;
    let u = TWO_SQRT_2_OVER_PI * fma::<FMA>(x * x * x, 0.044_715, x);
    x * sigmoid::<FMA>(u)
}
