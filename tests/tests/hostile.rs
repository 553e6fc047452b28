//! Converted files, damaged at random: the board's loader and kernels answer with an error or a result, never with a
//! panic of their own. Always the same damage; `VEDGE_ROUNDS` sets another number of rounds, `VEDGE_SEED` other ones.

use anyhow::Result;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use vedge_converter::convert::{Pictures, Settings, convert};
use vedge_converter::quantize::Preset;
use vedge_runtime::onnx::{DType, Graph, NodeProto, proto};
use vedge_runtime::{Options, Session, bench};

/// Where panics happened; tract's are caught and become errors, ours are what the test looks for.
static PANICS: Mutex<Vec<String>> = Mutex::new(vec![]);

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n.max(1)
    }

    fn of<'a, T>(&mut self, all: &'a [T]) -> Option<&'a T> {
        all.get(self.below(all.len()))
    }

    fn number(&mut self) -> i64 {
        const ODD: [i64; 14] = [0, 1, -1, 2, -2, 3, 4, 7, 8, 1000, -1000, 1 << 40, i64::MAX, i64::MIN];
        ODD[self.below(ODD.len())]
    }
}

fn converted(model: &str, preset: Preset) -> Result<Graph> {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models");
    let settings = Settings {
        preset,
        calibration: Some(Pictures { dir: models.join("fashion/calibration"), count: 8 }),
        preprocess: Some(models.join("fashion.json").to_string_lossy().into_owned()),
        ..Settings::default()
    };
    Ok(convert(&models.join(model), &settings)?.graph)
}

fn set_dim(t: &mut proto::ValueInfoProto, r: &mut Random) {
    use proto::tensor_shape_proto::dimension::Value;
    use proto::type_proto::Value::TensorType;
    let Some(TensorType(t)) = t.r#type.as_mut().and_then(|t| t.value.as_mut()) else { return };
    if r.below(8) == 0 {
        t.elem_type = Some(r.below(18) as i32);
    }
    let Some(shape) = &mut t.shape else { return };
    let at = r.below(shape.dim.len());
    match r.below(6) {
        0 => drop(shape.dim.pop()),
        1 => shape.dim.push(shape.dim.first().cloned().unwrap_or_default()),
        2 if !shape.dim.is_empty() => shape.dim.swap(0, at),
        _ => {
            if let Some(d) = shape.dim.get_mut(at) {
                d.value = Some(Value::DimValue(r.number()));
            }
        }
    }
}

fn node_damage(n: &mut NodeProto, names: &[String], r: &mut Random) {
    match r.below(8) {
        0 => drop(n.input.pop()),
        1 => drop(n.output.pop()),
        2 => n.attribute.clear(),
        3 | 4 => {
            let at = r.below(n.input.len());
            if let (Some(i), Some(name)) = (n.input.get_mut(at), r.of(names)) {
                *i = name.clone();
            }
        }
        _ => {
            let at = r.below(n.attribute.len());
            if let Some(a) = n.attribute.get_mut(at) {
                let i = r.below(a.ints.len());
                match a.ints.get_mut(i) {
                    Some(v) => *v = r.number(),
                    None => a.i = Some(r.number()),
                }
                if r.below(6) == 0 {
                    a.ints.pop();
                }
            }
        }
    }
}

fn damage(g: &mut Graph, r: &mut Random) {
    let mut names: Vec<String> = g.nodes.iter().flat_map(|n| n.output.clone()).collect();
    names.extend(g.initializers.keys().cloned());
    let node = r.below(g.nodes.len());
    match r.below(12) {
        0..=4 => node_damage(&mut g.nodes[node], &names, r),
        5 => g.nodes[node].op_type = g.nodes[r.below(g.nodes.len())].op_type.clone(),
        6 => {
            let other = r.below(g.nodes.len());
            g.nodes.swap(node, other);
        }
        7 => {
            let at = r.below(g.value_info.len());
            if let Some(v) = g.value_info.values_mut().nth(at) {
                set_dim(v, r);
            }
        }
        8 => {
            let at = r.below(g.inputs.len() + g.outputs.len());
            if let Some(v) = g.inputs.iter_mut().chain(&mut g.outputs).nth(at) {
                set_dim(v, r);
            }
        }
        9 | 10 => {
            let at = r.below(g.initializers.len());
            let Some(t) = g.initializers.values_mut().nth(at) else { return };
            match r.below(5) {
                0 => t.data_type = Some(r.below(24) as i32),
                1 => t.dims.reverse(),
                2 => t.raw_data = t.raw_data.as_ref().map(|raw| raw.slice(..raw.len() / 2)),
                3 if t.dims.len() < 2 => {
                    let odd = r.number().to_le_bytes();
                    let bytes = t.raw_data.as_deref().unwrap_or_default();
                    t.raw_data = Some(bytes.iter().zip(odd.iter().cycle()).map(|(_, b)| *b).collect::<Vec<_>>().into());
                }
                _ => {
                    let axis = r.below(t.dims.len());
                    if let Some(d) = t.dims.get_mut(axis) {
                        *d = r.number();
                    }
                }
            }
        }
        _ => {
            // Bits of everything but the weights.
            let weights = std::mem::take(&mut g.initializers);
            let mut bytes = g.encode();
            let at = r.below(bytes.len());
            bytes[at] ^= 1 << r.below(8);
            if let Ok(mut damaged) = Graph::decode(bytes.into(), None) {
                damaged.initializers.extend(weights.clone());
                *g = damaged;
            }
            g.initializers.extend(weights);
        }
    }
}

/// Loads and runs; whether it went well.
fn survives(g: Graph) -> std::result::Result<(), String> {
    let mut session = Session::from_graph(g, &Options::default()).map_err(|e| e.to_string())?;
    let size: usize = session.inputs().iter().map(|i| i.shape.iter().product::<usize>()).sum();
    if size < 1 << 22 {
        session.run(&bench::inputs(&session)).map_err(|e| e.to_string())?;
    }
    Ok(())
}

#[test]
fn nothing_in_a_file_makes_the_runtime_panic() -> Result<()> {
    let number = |name: &str, default: u64| std::env::var(name).map_or(Ok(default), |v| v.parse());
    let rounds = number("VEDGE_ROUNDS", 80)?;
    let mut r = Random(number("VEDGE_SEED", 1)?);
    const CASES: [(&str, Preset); 4] = [
        ("deit_nano.onnx", Preset::Portable),
        ("deit_nano.onnx", Preset::Cpu),
        ("mobilevit_nano.onnx", Preset::Portable),
        ("mobilevit_nano.onnx", Preset::Cpu),
    ];
    let graphs = CASES.iter().map(|&(model, preset)| converted(model, preset)).collect::<Result<Vec<_>>>()?;
    // After the first use of the runtime, which silences panics that it catches.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map_or_else(String::new, |l| format!("{}:{}", l.file(), l.line()));
        PANICS.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(format!("{place} {info}"));
    }));
    let (mut refused, mut ran, mut ours) = (0, 0, vec![]);
    for ((model, preset), graph) in CASES.iter().zip(graphs) {
        for round in 0..rounds {
            let seed = r.0;
            let mut damaged = graph.clone();
            for _ in 0..1 + round % 3 {
                damage(&mut damaged, &mut r);
            }
            // Seen with --nocapture, when a case ends the whole process.
            println!("{model} {preset:?} round {round} seed {seed}");
            let start = Instant::now();
            let answer = catch_unwind(AssertUnwindSafe(|| survives(damaged)));
            if start.elapsed() > Duration::from_secs(2) {
                println!("{model} seed {seed}: {:.1} s", start.elapsed().as_secs_f64());
            }
            let mut panics = PANICS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            panics.iter().for_each(|p| println!("  {p}"));
            let mine = |p: &String| !p.contains("/registry/src/") && !p.contains("/tract") && !p.starts_with("/rustc");
            ours.extend(panics.drain(..).filter(|p| mine(p)).map(|p| format!("{model} seed {seed}: {p}")));
            match answer {
                Ok(Ok(())) => ran += 1,
                Ok(Err(e)) => {
                    assert!(!e.is_empty());
                    refused += 1;
                }
                Err(_) => ours.push(format!("{model} seed {seed}: not caught")),
            }
        }
    }
    std::panic::set_hook(hook);
    println!("{refused} refused, {ran} ran");
    assert!(ours.is_empty(), "{} panics:\n{}", ours.len(), ours.join("\n"));
    assert!(refused > rounds && ran > rounds / 4, "{refused} refused, {ran} ran: the test tests nothing");
    Ok(())
}

#[test]
fn contradictions_are_refused_in_words() -> Result<()> {
    let graph = converted("deit_nano.onnx", Preset::Cpu)?;
    let refused = |change: &dyn Fn(&mut Graph)| {
        let mut g = graph.clone();
        change(&mut g);
        Session::from_graph(g, &Options::default()).err().map_or_else(|| "nothing".into(), |e| e.to_string())
    };
    let said = refused(&|g| {
        let node = NodeProto { domain: Some("vedge".into()), ..g.nodes[0].clone() };
        g.nodes.insert(0, node);
    });
    assert!(said.contains("is of the domain `vedge`"), "{said}");
    let said = refused(&|g| {
        let output = g.nodes[3].output[0].clone();
        g.nodes[0].input[0] = output;
    });
    assert!(said.contains("which nothing produces before it"), "{said}");
    let said = refused(&|g| {
        let output = g.nodes[3].output[0].clone();
        g.nodes[5].output[0] = output;
    });
    assert!(said.contains("which is there already"), "{said}");
    let said = refused(&|g| g.inputs[0] = vedge_runtime::onnx::value_info("input", DType::Float, &[1, 3, 1 << 40, 64]));
    assert!(said.contains("empty or too large"), "{said}");
    Ok(())
}
