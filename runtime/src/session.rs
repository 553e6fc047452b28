//! A loaded model, ready to run.

use crate::error::{Error, Result};
use crate::model::card::Card;
use crate::onnx::{DType, Graph};
use ndarray::ArrayD;
use prost::Message;
use std::path::Path;
use tract_onnx::prelude::*;

/// How to load a model.
#[derive(Clone, Debug)]
pub struct Options {
    /// Worker threads; 1 runs on the caller's thread alone.
    pub threads: usize,
    /// Turn patterns (quantized layers, attention, LayerNorm, GELU, …) into fused operators. Off gives plain tract.
    pub fuse: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { threads: 1, fuse: true }
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

/// How one node of the file runs.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum How {
    /// Integer arithmetic.
    Integer,
    /// One of vedge's fused float operators.
    Fused,
    /// A plain tract operator in float.
    Tract,
    /// Moves or reinterprets data only (reshape, transpose, constant).
    Layout,
}

/// One operator of the execution plan.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct PlanLine {
    /// Name of the node (of the last one, where several are fused).
    pub name: String,
    /// Operator class: `linear`, `conv`, `attention`, `layer_norm`, … or the ONNX operator.
    pub class: String,
    /// How it runs.
    pub how: How,
    /// Why it does not run in integers although it carries quantization; empty otherwise.
    pub note: String,
}

/// A model ready to run. Not for concurrent use: one session a thread.
pub struct Session {
    plan: Arc<TypedSimplePlan>,
    inputs: Vec<TensorInfo>,
    outputs: Vec<String>,
    card: Option<Card>,
    lines: Vec<PlanLine>,
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
    pub fn from_graph(graph: Graph, _options: &Options) -> Result<Session> {
        let card = Card::of(&graph)?;
        let mut inputs = vec![];
        for i in &graph.inputs {
            let (dtype, shape) = i.fixed().ok_or_else(|| Error::Unsupported {
                what: format!("input `{}` has no fixed shape", i.name()),
                hint: "freeze it first: vedge convert MODEL -o OUT --size N".into(),
            })?;
            inputs.push(TensorInfo { name: i.name().into(), dtype, shape });
        }
        let outputs: Vec<String> = graph.outputs.iter().map(|o| o.name().to_string()).collect();
        let engine = |e: TractError| Error::Engine(format!("{e:#}"));
        let mut graph = graph;
        graph.value_info.clear();
        let bytes = graph.encode();
        drop(graph);
        let proto = tract_onnx::pb::ModelProto::decode(bytes.as_slice()).map_err(|e| Error::BadModel(e.to_string()))?;
        let model = tract_onnx::onnx()
            .with_ignore_output_shapes(true)
            .with_ignore_value_info(true)
            .model_for_proto_model(&proto)
            .map_err(engine)?;
        let model = model.into_optimized().map_err(engine)?;
        let plan = TypedSimplePlan::new(model).map_err(engine)?;
        Ok(Session { plan, inputs, outputs, card, lines: vec![] })
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
            values.push(Tensor::from(x.to_owned()).into_tvalue());
        }
        let outputs = self.plan.run(values).map_err(engine)?;
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
