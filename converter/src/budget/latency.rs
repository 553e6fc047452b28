//! How long candidates take on the target: a table that is measured once, kept in a file, and used again, so that a search
//! with the same table decides the same.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;
use vedge_runtime::onnx::Graph;
use vedge_runtime::{Error, Options, Result, Session, bench, files};

/// Version of the file's form.
const VERSION: u32 = 1;
/// Runs before and while one is measured.
const RUNS: [usize; 2] = [2, 9];

/// Milliseconds of candidates of one model, on one machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// Version of this form.
    pub v: u32,
    /// SHA-256 of the source model.
    pub model: String,
    /// What was measured: kernels and threads, or the name of a board.
    pub target: String,
    /// Median milliseconds by plan.
    pub ms: BTreeMap<String, f64>,
}

/// A table and the file that it is kept in.
pub struct Latency {
    table: Table,
    path: Option<PathBuf>,
    options: Options,
}

impl Latency {
    /// The table in a file, or a new one for this machine.
    ///
    /// # Errors
    /// [`Error::Usage`] for a table of another model, [`Error::Read`] and [`Error::BadModel`] for one that cannot be read.
    pub fn open(path: Option<&Path>, model: &str, kernels: &str, options: &Options) -> Result<Latency> {
        let here = format!("{kernels}, {} threads", options.threads);
        let known = path.filter(|p| p.exists()).map(read).transpose()?;
        if let (Some(t), Some(path)) = (&known, path)
            && t.model != model
        {
            return Err(Error::Usage {
                what: format!("{} is the latency table of another model", path.display()),
                hint: "name a file that does not exist yet: it is measured and written".into(),
            });
        }
        let new = || Table { v: VERSION, model: model.into(), target: here, ms: BTreeMap::new() };
        let table = known.unwrap_or_else(new);
        Ok(Latency { table, path: path.map(Path::to_path_buf), options: options.clone() })
    }

    /// What the table is of.
    pub fn target(&self) -> &str {
        &self.table.target
    }

    /// Milliseconds of a plan: from the table, else measured of what `make` makes, and kept.
    ///
    /// # Errors
    /// Those of `make`, of running it and of writing the table.
    pub fn of(&mut self, plan: &str, make: impl FnOnce() -> Result<Graph>) -> Result<f64> {
        if let Some(ms) = self.table.ms.get(plan) {
            return Ok(*ms);
        }
        let ms = measure(make()?, &self.options)?;
        self.table.ms.insert(plan.into(), ms);
        if let Some(path) = &self.path {
            let json = serde_json::to_vec_pretty(&self.table).expect("a table has only plain data");
            files::write_atomic(path, &json)?;
        }
        Ok(ms)
    }
}

fn read(path: &Path) -> Result<Table> {
    let bytes = files::map(path)?;
    let table: Table = serde_json::from_slice(&bytes)
        .map_err(|e| Error::BadModel(format!("{} is no latency table: {e}", path.display())))?;
    let sound = table.v == VERSION && table.ms.values().all(|ms| ms.is_finite() && *ms > 0.0);
    sound
        .then_some(table)
        .ok_or_else(|| Error::BadModel(format!("{} is no latency table of version {VERSION}", path.display())))
}

/// Median milliseconds of one inference.
fn measure(graph: Graph, options: &Options) -> Result<f64> {
    let mut session = Session::from_graph(graph, options)?;
    let inputs = bench::inputs(&session);
    let mut times = vec![];
    for i in 0..RUNS[0] + RUNS[1] {
        let start = Instant::now();
        session.run(&inputs)?;
        if i >= RUNS[0] {
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(bench::percentile(&times, 50.0))
}
