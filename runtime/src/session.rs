//! A loaded model, ready to run.

use crate::error::{Error, Result};
use crate::exec::{Exec, Profile};
use crate::memory;
use crate::model::card::{Activations, Card};
pub use crate::model::plan::{How, PlanLine};
use crate::model::{check, lower, plan, qdq, wire};
use crate::onnx::{DType, Graph, ValueInfoProto};
use ndarray::ArrayD;
use std::path::Path;
use tract_onnx::prelude::*;

/// How to load a model.
#[derive(Clone, Debug)]
pub struct Options {
    /// Worker threads; 1 runs on the caller's thread alone.
    pub threads: usize,
    /// Turn patterns (quantized layers, attention, LayerNorm, GELU, …) into fused operators. Off gives plain tract, and
    /// so does a graph that does not tell the shapes of its values, that is, one not from `vedge convert`.
    pub fuse: bool,
    /// Measure the time spent in each class of fused operators; see [`Session::take_profile`].
    pub profile: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { threads: 1, fuse: true, profile: false }
    }
}

/// Name, element type and shape of a model's input or output.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Name in the graph.
    pub name: String,
    /// Element type in the file.
    pub dtype: DType,
    /// Fixed shape.
    pub shape: Vec<usize>,
}

/// A model ready to run. Not for concurrent use: one session a thread.
pub struct Session {
    plan: Arc<TypedSimplePlan>,
    inputs: Vec<TensorInfo>,
    outputs: Vec<String>,
    card: Option<Card>,
    lines: Vec<PlanLine>,
    exec: Arc<Exec>,
}

impl Session {
    /// Loads a model file.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::BadModel`], [`Error::Unsupported`] with the node that cannot run.
    pub fn load(path: &Path, options: &Options) -> Result<Session> {
        Self::from_graph(Graph::read(path)?, options).map_err(|e| e.in_file(path))
    }

    /// Prepares a graph. Its input shapes must be fixed.
    ///
    /// # Errors
    /// As [`Session::load`].
    pub fn from_graph(graph: Graph, options: &Options) -> Result<Session> {
        let card = Card::of(&graph)?;
        let inputs = inputs(&graph)?;
        let outputs: Vec<String> = graph.outputs.iter().map(|o| o.name().to_string()).collect();
        let (lowered, exec) = lowered(graph, card.as_ref(), options)?;
        let lines = plan::lines(&lowered);
        let engine = |e: TractError| Error::Engine(format!("{e:#}"));
        let model = wire::wire(lowered, &exec)?;
        let model = wire::guarded("optimizing the model", || model.into_optimized()).map_err(engine)?;
        let plan = wire::guarded("planning the model", || TypedSimplePlan::new(model)).map_err(engine)?;
        Ok(Session { plan, inputs, outputs, card, lines, exec })
    }

    /// How each operator of a graph would run, in execution order, those that cannot run included
    /// ([`How::Unsupported`], the reason as the note).
    ///
    /// # Errors
    /// As [`Session::load`], but not for an operator that cannot run.
    pub fn survey(graph: Graph, options: &Options) -> Result<Vec<PlanLine>> {
        let card = Card::of(&graph)?;
        inputs(&graph)?;
        let (lowered, exec) = lowered(graph, card.as_ref(), options)?;
        let mut lines = plan::lines(&lowered);
        let wired = wire::wire_or(lowered, &exec, &mut |index, _, e| {
            lines[index] = PlanLine { how: How::Unsupported, note: e.to_string(), ..lines[index].clone() };
            Ok(())
        });
        match wired {
            Err(e) if lines.iter().all(|l| l.how != How::Unsupported) => Err(e),
            _ => Ok(lines),
        }
    }

    /// Name of the kernels in use.
    pub fn kernel(&self) -> &'static str {
        self.exec.kernels.name
    }

    /// Time spent in fused operators since the last call, if the session was loaded to measure it.
    pub fn take_profile(&self) -> Profile {
        self.exec.take_profile()
    }

    /// Worker threads.
    pub fn threads(&self) -> usize {
        self.exec.threads()
    }

    /// The model's inputs, in order.
    pub fn inputs(&self) -> &[TensorInfo] {
        &self.inputs
    }

    /// Names of the model's outputs, in order.
    pub fn outputs(&self) -> &[String] {
        &self.outputs
    }

    /// The card that travels in the file.
    pub fn card(&self) -> Option<&Card> {
        self.card.as_ref()
    }

    /// How each operator runs, in execution order.
    pub fn plan(&self) -> &[PlanLine] {
        &self.lines
    }

    /// Runs the model: one float array for each input, one for each output back.
    ///
    /// # Errors
    /// [`Error::Shape`] when an input does not have the model's shape, [`Error::Engine`] when an operator fails.
    pub fn run(&mut self, inputs: &[ArrayD<f32>]) -> Result<Vec<ArrayD<f32>>> {
        if inputs.len() != self.inputs.len() {
            return Err(Error::Shape(format!("{} inputs given, the model has {}", inputs.len(), self.inputs.len())));
        }
        let engine = |e: TractError| Error::Engine(format!("{e:#}"));
        let mut values = tvec![];
        for (x, info) in inputs.iter().zip(&self.inputs) {
            if x.shape() != info.shape {
                return Err(Error::Shape(format!(
                    "input `{}` has shape {:?}, the model needs {:?}",
                    info.name,
                    x.shape(),
                    info.shape
                )));
            }
            let x = Tensor::from(x.as_standard_layout().into_owned());
            values.push(x.cast_to_dt(datum_type(info.dtype)?).map_err(engine)?.into_owned().into_tvalue());
        }
        memory::start_to_recycle();
        let plan = &self.plan;
        let outputs = wire::guarded("running the model", || plan.run(values)).map_err(engine)?;
        outputs
            .iter()
            .map(|v| {
                let t = v.cast_to::<f32>().map_err(engine)?;
                let view = t.to_plain_array_view::<f32>().map_err(engine)?;
                Ok(view.to_owned())
            })
            .collect()
    }
}

/// The inputs of a graph, whose shapes must be fixed.
fn inputs(graph: &Graph) -> Result<Vec<TensorInfo>> {
    let one = |i: &ValueInfoProto| {
        let (dtype, shape) = i.fixed().ok_or_else(|| Error::Unsupported {
            what: format!("input `{}` has no fixed shape", i.name()),
            hint: "freeze it first: vedge convert MODEL -o OUT --size N".into(),
        })?;
        check::input(i.name(), &shape)?;
        Ok(TensorInfo { name: i.name().into(), dtype, shape })
    };
    check::graph(graph)?;
    graph.inputs.iter().map(one).collect()
}

/// The graph with its patterns replaced, and what will execute it.
fn lowered(mut graph: Graph, card: Option<&Card>, options: &Options) -> Result<(lower::Lowered, Arc<Exec>)> {
    let exec = Exec::new(options.threads)?;
    let exec = Arc::new(if options.profile { exec.profiled() } else { exec });
    let per_token = card.is_some_and(|c| c.activations == Activations::PerToken);
    if qdq::normalize(&mut graph) && options.fuse && !lower::shapes_known(&graph) {
        wire::annotate(&mut graph, &exec);
    }
    let lowered = match options.fuse && lower::shapes_known(&graph) {
        true => lower::lower(graph, exec.kernels, per_token)?,
        false => lower::unchanged(graph),
    };
    Ok((lowered, exec))
}

fn datum_type(dtype: DType) -> Result<DatumType> {
    Ok(match dtype {
        DType::Float => DatumType::F32,
        DType::Float16 => DatumType::F16,
        DType::Uint8 => DatumType::U8,
        DType::Int64 => DatumType::I64,
        DType::Int32 => DatumType::I32,
        DType::Bool => DatumType::Bool,
        other => return Err(Error::Shape(format!("inputs of element type {other:?} are not supported"))),
    })
}
