//! How long candidates take on the target: a table that is measured once, kept in a file, and used again, so that a search
//! with the same table decides the same.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;
use vedge_runtime::onnx::Graph;
use vedge_runtime::{Error, Options, Result, Session, bench, files};

/// Version of the file's form.
const VERSION: u32 = 2;
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
    /// Median milliseconds by key of the candidate.
    pub ms: BTreeMap<String, f64>,
}

/// A table and the file that it is kept in.
pub struct Latency {
    table: Table,
    path: Option<PathBuf>,
    options: Options,
    /// Of another machine: nothing that is missing can be measured here.
    foreign: bool,
}

/// The model that a table is of.
pub struct Subject<'a> {
    /// SHA-256 of its file.
    pub sha256: &'a str,
    /// Its file's name without the extension.
    pub name: &'a str,
}

impl Latency {
    /// The table in a file, or a new one for this machine. A file may also be what `vedge bench --json` measured of
    /// stand-ins.
    ///
    /// # Errors
    /// [`Error::Usage`] for a table of another model, [`Error::Read`] and [`Error::BadModel`] for one that cannot be read.
    pub fn open(path: Option<&Path>, model: &Subject<'_>, kernels: &str, options: &Options) -> Result<Latency> {
        let here = format!("{kernels}, {} threads", options.threads);
        let known = path.filter(|p| p.exists()).map(|p| read(p, model)).transpose()?;
        let (table, foreign) = match known {
            Some((table, measured_elsewhere)) => {
                let foreign = measured_elsewhere || table.target != here;
                (table, foreign)
            }
            None => (Table { v: VERSION, model: model.sha256.into(), target: here, ms: BTreeMap::new() }, false),
        };
        Ok(Latency { table, path: path.map(Path::to_path_buf), options: options.clone(), foreign })
    }

    /// What the table is of.
    pub fn target(&self) -> &str {
        &self.table.target
    }

    /// Whether it is of another machine than this.
    pub fn foreign(&self) -> bool {
        self.foreign
    }

    /// Milliseconds of a candidate: from the table, else measured of what `make` makes, and kept. `None` where the table is
    /// of another machine and does not have it: times of two machines are never mixed.
    ///
    /// # Errors
    /// Those of `make`, of running it and of writing the table.
    pub fn of(&mut self, key: &str, make: impl FnOnce() -> Result<Graph>) -> Result<Option<f64>> {
        if let Some(ms) = self.table.ms.get(key) {
            return Ok(Some(*ms));
        }
        if self.foreign {
            return Ok(None);
        }
        let ms = measure(make()?, &self.options)?;
        self.table.ms.insert(key.into(), ms);
        if let Some(path) = &self.path {
            let json = serde_json::to_vec_pretty(&self.table).expect("a table has only plain data");
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder).ok();
            }
            files::write_atomic(path, &json)?;
        }
        Ok(Some(ms))
    }
}

/// A table, and whether it was measured by other means than a search's.
fn read(path: &Path, model: &Subject<'_>) -> Result<(Table, bool)> {
    let bad = |why: String| Error::BadModel(format!("{} is no latency table: {why}", path.display()));
    let json: Value = serde_json::from_slice(&files::map(path)?).map_err(|e| bad(e.to_string()))?;
    let other = || Error::Usage {
        what: format!("{} is the latency table of another model", path.display()),
        hint: "name a file that does not exist yet: it is measured and written".into(),
    };
    let (table, benched) = match json.get("models") {
        Some(models) => (measured(&json, models, model.name).ok_or_else(other)?, true),
        None => (serde_json::from_value(json).map_err(|e| bad(e.to_string()))?, false),
    };
    let sound = table.v == VERSION && table.ms.values().all(|ms| ms.is_finite() && *ms > 0.0);
    match (sound, benched || table.model == model.sha256) {
        (true, true) => Ok((table, benched)),
        (true, false) => Err(other()),
        (false, _) => Err(bad(format!("expected version {VERSION} and times above 0"))),
    }
}

/// What `vedge bench --json` says of stand-ins, which are named `MODEL.KEY.onnx`.
fn measured(json: &Value, models: &Value, name: &str) -> Option<Table> {
    let models = models.as_array()?;
    let key = |m: &Value| {
        let file = Path::new(m["model"].as_str()?).file_name()?.to_str()?.to_string();
        let key = file.strip_prefix(name)?.strip_prefix('.')?.strip_suffix(".onnx")?;
        Some((key.to_string(), m["median_ms"].as_f64()?))
    };
    let board = ["model", "board"].iter().find_map(|k| json["board"][k].as_str()).filter(|b| !b.is_empty());
    let first = models.first()?;
    let target = match board {
        Some(board) => format!("{board}, {} threads", first["threads"]),
        None => format!("{}, {} threads", first["kernels"].as_str().unwrap_or("unknown kernels"), first["threads"]),
    };
    let ms: BTreeMap<String, f64> = models.iter().filter_map(key).collect();
    (!ms.is_empty()).then(|| Table { v: VERSION, model: String::new(), target, ms })
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
