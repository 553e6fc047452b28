//! Runs a model prepared, fused and plain, and compares.
use ndarray::ArrayD;
use std::time::Instant;
use vedge_converter::passes::{Prepare, prepare};
use vedge_runtime::{Options, Session, model::card::SelfTest, onnx::Graph};

fn main() -> anyhow::Result<()> {
    let a: Vec<String> = std::env::args().collect();
    let runs: usize = a.get(2).map_or(20, |s| s.parse().unwrap());
    let mut g = Graph::read(a[1].as_ref())?;
    if a.get(3).is_none() {
        prepare(&mut g, &Prepare { size: None })?;
    }
    let threads = std::env::var("T").map_or(1, |t| t.parse().unwrap());
    let t = Instant::now();
    let mut fused = Session::from_graph(g.clone(), &Options { fuse: true, threads })?;
    let load = t.elapsed();
    let mut kinds = std::collections::BTreeMap::new();
    for l in fused.plan() {
        *kinds.entry(format!("{:?} {}", l.how, l.class)).or_insert(0) += 1;
        if !l.note.is_empty() {
            println!("  {} {}: {}", l.class, l.name, l.note);
        }
    }
    println!("{kinds:?}");
    let t = Instant::now();
    let mut plain = Session::from_graph(g, &Options { fuse: false, threads: 1 })?;
    println!("load fused {load:?} plain {:?}", t.elapsed());
    let shape = fused.inputs()[0].shape.clone();
    let x = ArrayD::from_shape_vec(shape.clone(), SelfTest::input(7, shape.iter().product()))?;
    let (mut bf, mut bp) = (1e9f64, 1e9f64);
    for _ in 0..runs {
        let t = Instant::now();
        let yf = fused.run(std::slice::from_ref(&x))?;
        bf = bf.min(t.elapsed().as_secs_f64() * 1e3);
        let t = Instant::now();
        let yp = plain.run(std::slice::from_ref(&x))?;
        bp = bp.min(t.elapsed().as_secs_f64() * 1e3);
        let top = yp[0].iter().fold(0f32, |m, v| m.max(v.abs()));
        let err = yf[0].iter().zip(&yp[0]).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        if bf > 1e8 || runs < 3 {
            println!("{:?}", yf[0].iter().take(5).collect::<Vec<_>>());
        }
        assert!(err.is_finite());
        if bp < 1e9 && runs > 0 {
            let _ = (top, err);
        }
        print!("{}", if err > 1e-3 * top { format!("DIFF {err} of {top}\n") } else { String::new() });
    }
    println!("fused {bf:.2} ms, plain tract {bp:.2} ms");
    Ok(())
}
