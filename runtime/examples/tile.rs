use std::time::Instant;
use vedge_runtime::kernels::*;
fn main() {
    let k = detect().unwrap();
    for (kk, n, sd) in [(192usize, 768usize, 30.), (192, 192, 30.), (384, 1536, 30.), (768, 192, 30.), (1536, 384, 30.), (384,1536,42.), (384,1536,36.), (384,1536,22.), (192,768,20.)] {
        let m = 196;
        let mut s = 1u64;
        let mut r = || { s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407); ((s >> 33) as f64 / 2147483648.0) };
        let w: Vec<i8> = (0..n * kk).map(|_| { let g: f64 = (0..6).map(|_| r() - 0.5).sum::<f64>() * 1.414; (g * sd).clamp(-127., 127.) as i8 }).collect();
        let t = Instant::now();
        let p = I8Weights::pack(k, n, kk, &w, &vec![1.; n]);
        let pack = t.elapsed();
        let steps: String = { let (mut pr, mut si, mut wi) = (0, 0, 0); for p in &p.panels { match &p.body { Body::Paired{groups,singles,..} => { pr += singles; si += groups.len()-singles }, Body::Wide(_) => wi += 1, _=>{} } } format!("paired {pr} single {si} wide panels {wi}/{}", p.panels.len()) };
        let aw = vec![7i16; m * p.row_bytes()];
        let a = vec![7u8; m * p.row_bytes()];
        let mut best = 1e9f64;
        let mut sink = 0;
        for _ in 0..200 {
            let t = Instant::now();
            for panel in &p.panels {
                for b in 0..m / 4 {
                    let rows = std::array::from_fn(|i| if panel.is_wide() { aw[(b * 4 + i) * p.row_bytes()..].as_ptr().cast() } else { a[(b * 4 + i) * p.row_bytes()..].as_ptr() });
                    let mut sums = [[0; NR]; 4];
                    unsafe { (k.tile_i8)(&rows, panel, &mut sums) };
                    sink += sums[0][0];
                }
            }
            best = best.min(t.elapsed().as_secs_f64());
        }
        println!("{kk}x{n} sd {sd}: {:.1} GOP/s, groups {} of {} , pack {:?} {sink}", 2. * (m * kk * n) as f64 / best / 1e9, steps, n.div_ceil(16) * kk.div_ceil(4), pack);
    }
}
