//! `vedge boards`

use super::{out, table};
use crate::preset::nearest_first;
use crate::row;
use anyhow::Result;
use clap::Subcommand;
use vedge_boards::{Profile, profile, profiles};

/// What is known of each board.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// All boards with a profile.
    List {
        /// Result as JSON on standard output.
        #[arg(long)]
        json: bool,
    },
    /// One board: processor, memory, ways to its cameras, and where each fact is written.
    Show {
        /// The board's name.
        name: String,
        /// Result as JSON on standard output.
        #[arg(long)]
        json: bool,
    },
}

/// Runs the command.
pub fn run(a: &Args) -> Result<()> {
    match &a.what {
        What::List { json: true } => out::json(&profiles())?,
        What::List { json: false } => {
            let mut rows = vec![row!["name", "board", "core", "cores", "target"]];
            for p in profiles() {
                let cores = p.cpu.cores.map_or("-".into(), |n| n.to_string());
                let target = p.targets.first().cloned().unwrap_or_default();
                rows.push(row![p.name, p.title, p.cpu.core, cores, target]);
            }
            out::text(&table::format(&rows))?;
            eprintln!("next: vedge boards show NAME");
        }
        What::Show { name, json } => {
            let p =
                profile(name).map_err(|e| vedge_runtime::Error::Usage { what: e.to_string(), hint: nearest(name) })?;
            match json {
                true => out::json(&p)?,
                false => out::text(&show(&p))?,
            }
        }
    }
    Ok(())
}

fn nearest(name: &str) -> String {
    let all = profiles();
    let names = nearest_first(name, all.iter().map(|p| p.name.as_str()));
    names.first().map_or(String::new(), |n| format!("the nearest is {n}: vedge boards show {n}"))
}

fn show(p: &Profile) -> String {
    let source = |key: &str| p.sources.get(key).cloned().unwrap_or_default();
    let mut rows = vec![];
    let mut fact = |name: &str, value: String, key: &str| {
        rows.push(format!("  {name:10}  {value}\n              {}", source(key)))
    };
    if let Some(soc) = &p.soc {
        fact("chip", soc.name.clone(), &soc.source);
    }
    let cores = p.cpu.cores.map_or(String::new(), |n| format!("{n} x "));
    let clock = p.cpu.mhz.map_or(String::new(), |m| format!(" at {m} MHz"));
    fact("processor", format!("{cores}{}{clock}", p.cpu.core), &p.cpu.source);
    fact("features", p.cpu.features.join(", "), &p.cpu.features_source);
    if let Some(m) = &p.memory {
        let sizes: Vec<String> = m.sizes_mb.iter().map(u32::to_string).collect();
        fact("memory", format!("{} MiB", sizes.join(", ")), &m.source);
    }
    for c in &p.cameras {
        fact("camera", c.usage.clone(), &c.source);
    }
    let facts: String = rows.iter().map(|r| format!("{}\n", r.trim_end())).collect();
    format!("{}: {}\n{facts}  {:10}  {}\n", p.name, p.title, "targets", p.targets.join(", "))
}
