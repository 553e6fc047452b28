//! Integer against float against stock tract, in one process, in turns: A B C A B C …
//!
//! `cargo run --release -p vedge-tests --bin speed -- FLOAT.onnx INT8.onnx [ROUNDS] [THREADS]`
//!
//! Prints the median and the fastest run of each, and the ratios of the medians. Ratios of one run can be compared
//! between machines, times cannot.

use anyhow::{Context, Result};
use ndarray::ArrayD;
use std::path::Path;
use std::time::Instant;
use vedge_converter::passes::{Prepare, prepare};
use vedge_runtime::model::card::SelfTest;
use vedge_runtime::onnx::Graph;
use vedge_runtime::{Options, Session};

struct Entrant {
    name: &'static str,
    session: Session,
    milliseconds: Vec<f64>,
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [float, int8, rest @ ..] = args.as_slice() else {
        anyhow::bail!("usage: speed FLOAT.onnx INT8.onnx [ROUNDS=30] [THREADS=1]");
    };
    let number = |i: usize, default| rest.get(i).map_or(Ok(default), |s: &String| s.parse());
    let (rounds, threads) = (number(0, 30)?, number(1, 1)?);
    let mut prepared = Graph::read(Path::new(float))?;
    prepare(&mut prepared, &Prepare { size: None })?;
    let load = |name, graph: Graph, fuse| -> Result<Entrant> {
        let session = Session::from_graph(graph, &Options { threads, fuse }).context(name)?;
        Ok(Entrant { name, session, milliseconds: vec![] })
    };
    let mut entrants = [
        load("int8", Graph::read(Path::new(int8))?, true)?,
        load("float", prepared.clone(), true)?,
        load("stock tract float", prepared, false)?,
    ];
    let shape = entrants[0].session.inputs()[0].shape.clone();
    let x = ArrayD::from_shape_vec(shape.clone(), SelfTest::input(7, shape.iter().product()))?;
    for round in 0..rounds + 2 {
        for e in &mut entrants {
            let start = Instant::now();
            e.session.run(std::slice::from_ref(&x))?;
            if round >= 2 {
                e.milliseconds.push(start.elapsed().as_secs_f64() * 1e3);
            }
        }
    }
    for e in &mut entrants {
        e.milliseconds.sort_by(f64::total_cmp);
    }
    let median = |e: &Entrant| e.milliseconds[e.milliseconds.len() / 2];
    println!("kernels {}, {threads} thread(s), {rounds} rounds", entrants[0].session.kernel());
    println!("| | median ms | fastest ms | median / int8 median |");
    println!("|---|---|---|---|");
    let base = median(&entrants[0]);
    for e in &entrants {
        println!("| {} | {:.2} | {:.2} | {:.2} |", e.name, median(e), e.milliseconds[0], median(e) / base);
    }
    Ok(())
}
