//! `vedge-run infer`: arrays in, arrays out.

use crate::tell::tell;
use anyhow::Result;
use ndarray::{ArrayD, Axis, concatenate};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use vedge_runtime::{Error, Session, npy};

/// Run a model on .npy files (float32), without any preprocessing
#[derive(clap::Args)]
pub struct Arguments {
    /// The model, any ONNX file with fixed shapes
    model: PathBuf,
    /// The model's input; repeat it in the model's order for several. N samples run one by one on a batch-1 model
    #[arg(long, value_name = "X.npy", required = true)]
    input: Vec<PathBuf>,
    /// Where the output goes
    #[arg(long, value_name = "Y.npy")]
    output: PathBuf,
    /// Which output [default: the one that the card names, else the only one]
    #[arg(long, value_name = "NAME")]
    output_name: Option<String>,
    /// Worker threads [default: as many as there are CPUs]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
}

/// Reads, runs, writes.
pub fn run(a: &Arguments) -> Result<ExitCode> {
    let mut session = super::load(&a.model, super::threads(a.threads))?;
    let output = choose_output(&session, a.output_name.as_deref())?;
    if a.input.len() != session.inputs().len() {
        let names: Vec<String> = session.inputs().iter().map(|i| format!("`{}` {:?}", i.name, i.shape)).collect();
        return Err(Error::Usage {
            what: format!("{} --input files given, the model has {} inputs", a.input.len(), names.len()),
            hint: format!("in this order: {}", names.join(", ")),
        }
        .into());
    }
    let inputs = a.input.iter().map(|p| npy::read(p)).collect::<Result<Vec<_>, _>>()?;
    let result = run_rows(&mut session, &inputs, output)?;
    npy::write(&a.output, &result)?;
    let (name, shape) = (&session.outputs()[output], result.shape());
    tell(format_args!("wrote {}: `{name}` {shape:?}", a.output.display()));
    Ok(ExitCode::SUCCESS)
}

fn choose_output(session: &Session, asked: Option<&str>) -> Result<usize, Error> {
    let names = session.outputs();
    let position = |name: &str| names.iter().position(|n| n == name);
    let has = format!("the model has {}", names.join(", "));
    match (asked, session.card().and_then(|c| position(&c.output.name)), names.len()) {
        (Some(name), ..) => position(name)
            .ok_or_else(|| Error::Usage { what: format!("--output-name {name}: no such output"), hint: has.clone() }),
        (None, Some(index), _) => Ok(index),
        (None, None, 1) => Ok(0),
        (None, None, n) => {
            Err(Error::Usage { what: format!("the model has {n} outputs: choose one with --output-name"), hint: has })
        }
    }
}

/// Runs inputs of the model's shapes, or N samples of a model whose first dimension is 1 in every input.
fn run_rows(session: &mut Session, inputs: &[ArrayD<f32>], output: usize) -> Result<ArrayD<f32>, Error> {
    let shapes: Vec<Vec<usize>> = session.inputs().iter().map(|i| i.shape.clone()).collect();
    let rows = inputs[0].shape().first().copied().unwrap_or(0);
    let is_batch = |x: &ArrayD<f32>, shape: &[usize]| {
        shape.first() == Some(&1) && x.shape().first() == Some(&rows) && x.shape().get(1..) == shape.get(1..)
    };
    if rows > 1 && inputs.iter().zip(&shapes).all(|(x, s)| is_batch(x, s)) {
        let mut results = Vec::with_capacity(rows);
        for row in 0..rows {
            let one: Vec<_> = inputs.iter().map(|x| x.slice_axis(Axis(0), (row..row + 1).into()).to_owned()).collect();
            results.push(session.run(&one)?.swap_remove(output));
        }
        let views: Vec<_> = results.iter().map(|r| r.view()).collect();
        return concatenate(Axis(0), &views)
            .map_err(|e| Error::Shape(format!("the output of {rows} samples cannot be put together: {e}")));
    }
    Ok(session.run(inputs)?.swap_remove(output))
}
