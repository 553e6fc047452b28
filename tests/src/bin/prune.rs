//! What pruning costs, with and without the least-squares repair: a table for tests/records/prune.md.
//!
//! `cargo run --release -p vedge-tests --bin prune -- MODEL PREPROCESS CALIBRATION VALIDATION [PICTURES [heads|neurons]]`
//!
//! PREPROCESS is a preset or a JSON file, the other two are class folders; the covariances come from 64 pictures of
//! CALIBRATION, top-1 from PICTURES (1000) of VALIDATION. Float models, and what leaves is the same with and without.

use anyhow::{Context, Result};
use ndarray::ArrayD;
use std::path::Path;
use std::time::Instant;
use vedge_calibration::Dataset;
use vedge_converter::convert::{load_picture, picture_size};
use vedge_converter::passes::{Prepare, prepare};
use vedge_converter::prune::{Kind, Pictures, Ranking, unit};
use vedge_converter::{preset, shapes};
use vedge_runtime::onnx::Graph;
use vedge_runtime::{Options, Session};

const CALIBRATION: usize = 64;
const SHARES: [f64; 5] = [0.2, 0.1, 0.3, 0.05, 0.5];

struct Set {
    pictures: Vec<(ArrayD<f32>, usize)>,
}

impl Set {
    /// Top-1 in percent, the classes said, and milliseconds a picture.
    fn judge(&self, graph: &Graph) -> Result<(f64, Vec<usize>, f64)> {
        let mut session = Session::from_graph(graph.clone(), &Options { threads: 2, ..Options::default() })?;
        let start = Instant::now();
        let mut said = vec![];
        for (x, _) in &self.pictures {
            let y = session.run(std::slice::from_ref(x))?;
            let best = y[0].iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).context("no classes")?;
            said.push(best.0);
        }
        let ms = start.elapsed().as_secs_f64() * 1e3 / said.len() as f64;
        let right = said.iter().zip(&self.pictures).filter(|(s, p)| **s == p.1).count();
        Ok((100.0 * right as f64 / said.len() as f64, said, ms))
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, preprocess, calibration, validation, rest @ ..] = arguments.as_slice() else {
        anyhow::bail!("expected MODEL PREPROCESS CALIBRATION VALIDATION [PICTURES [heads|neurons]]");
    };
    let count = rest.first().map_or(Ok(1000), |c| c.parse())?;
    let mut graph = Graph::read(Path::new(model))?;
    prepare(&mut graph, &Prepare::default())?;
    let how = preset::resolve(preprocess, picture_size(&graph)?)?;
    let items = Dataset::open(Path::new(calibration), None)?.pick(CALIBRATION);
    let load = |i: usize| load_picture(&items[i].path, &how);
    let pictures = Pictures { load: &load, count: items.len(), output: 0 };
    let validation = Dataset::open(Path::new(validation), None)?.pick(count);
    let pictures_of = |i: &vedge_calibration::Item| Ok((load_picture(&i.path, &how)?, i.class));
    let set = Set { pictures: validation.iter().map(pictures_of).collect::<Result<_>>()? };
    let (whole, answers, _) = set.judge(&graph)?;
    println!("{} pictures, float top-1 {whole:.1} %\n", set.pictures.len());
    println!(
        "| what | share of its work | left | repaired: top-1 | loss | agreement | not repaired: top-1 | loss | agreement |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    let asked = |kind: &Kind| rest.get(1).is_none_or(|only| only == kind.name());
    for kind in [Kind::Heads, Kind::Neurons].into_iter().filter(asked) {
        let (units, _) = unit::find(&graph, kind);
        let options = Options { threads: 2, ..Options::default() };
        let start = Instant::now();
        let ranking = Ranking::new(&graph, &units, 0.2, &pictures, &options, &mut None)?;
        eprintln!("{}: ranked in {:.0} s", kind.name(), start.elapsed().as_secs_f64());
        for share in SHARES {
            let mut cells = vec![];
            let mut left = (0, units.iter().map(|u| u.groups).sum::<usize>());
            for repair in [true, false] {
                let mut pruned = graph.clone();
                let lines = ranking.prune(&mut pruned, share, repair)?;
                left.0 = left.1 - lines.iter().map(|l| l.before - l.after).sum::<usize>();
                shapes::annotate(&mut pruned)?;
                let (top1, said, _) = set.judge(&pruned)?;
                let same = said.iter().zip(&answers).filter(|(a, b)| a == b).count();
                let agreement = 100.0 * same as f64 / answers.len() as f64;
                cells.push(format!("{top1:.1} % | {:+.1} | {agreement:.1} %", top1 - whole));
            }
            println!("| {} | {:.0} % | {} of {} | {} |", kind.name(), 100.0 * share, left.0, left.1, cells.join(" | "));
        }
    }
    Ok(())
}
