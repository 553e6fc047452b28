//! The report as one page: no scripts, nothing fetched, light and dark.

use super::html::{Cell, depth, distribution, escape, interval, number, section, table, text};
use super::numbers::{Share, base64};
use super::{LayerReport, Moved, Outlier, Report};
use crate::budget::{Point, plot};
use crate::certainty;
use vedge_runtime::error::counted;
use vedge_runtime::model::card::Activations;

const STYLE: &str = include_str!("page.css");

/// The whole page.
pub fn html(r: &Report) -> String {
    let card = &r.card;
    let title = format!("{}: float and {}", card.name, card.precision);
    let sections = [
        summary(r),
        accuracy(r),
        pictures(r),
        cost(r),
        layers(r),
        ranges(r),
        outliers(r),
        budget(r),
        tried(r),
        float_layers(r),
        shift(r),
        reproduce(r),
    ];
    let body: String = sections.into_iter().flatten().collect();
    let how = format!(
        "{} · {} · input {} × {} · {}",
        card.architecture, card.precision, card.preprocess.height, card.preprocess.width, card.provenance.tool
    );
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"><link rel=\"icon\" href=\"data:,\">\
         <title>{}</title><style>{STYLE}</style></head><body><header><h1>{}</h1><p>{}</p></header><main>\n{body}</main></body></html>\n",
        escape(&title),
        escape(&card.name),
        escape(&how)
    )
}

fn percent(v: f64) -> String {
    format!("{:.2} %", 100.0 * v)
}

fn with_interval(s: &Share) -> String {
    format!("{} ({:.2} to {:.2} %)", percent(s.value), 100.0 * s.low, 100.0 * s.high)
}

fn db(v: f64) -> String {
    if v >= 200.0 { "exact".into() } else { format!("{v:.1} dB") }
}

/// Two to four digits, with an exponent where the number is small.
fn short(v: f64) -> String {
    match v.abs() {
        0.0 => "0".into(),
        a if a >= 1000.0 => format!("{v:.0}"),
        a if a >= 10.0 => format!("{v:.1}"),
        a if a >= 0.01 => format!("{v:.3}"),
        _ => format!("{v:.1e}"),
    }
}

fn mega(bytes: u64) -> String {
    format!("{:.2} MB", bytes as f64 / 1e6)
}

fn tile(name: &str, value: &str, more: &str) -> String {
    format!(
        "<div class=\"tile\"><span>{}</span><b>{}</b><small>{}</small></div>",
        escape(name),
        escape(value),
        escape(more)
    )
}

fn summary(r: &Report) -> Option<String> {
    let [float, model] = &r.cost;
    let mut tiles = vec![];
    if let Some(a) = &r.accuracy {
        let points = 100.0 * (a.model.value - a.float.value);
        tiles.push(tile(
            "Top-1",
            &percent(a.model.value),
            &format!("float {}, {points:+.2} points", percent(a.float.value)),
        ));
        tiles.push(tile(
            "Same answer as float",
            &percent(a.agreement.value),
            &format!("{} of {} pictures", a.agreement.count, a.agreement.of),
        ));
        tiles.push(tile("Logits", &db(a.sqnr_db), "signal to noise, against float"));
    }
    let ratio = float.bytes as f64 / model.bytes.max(1) as f64;
    tiles.push(tile("File", &mega(model.bytes), &format!("float {}, {ratio:.1} times as large", mega(float.bytes))));
    let ratio = float.min_ms / model.min_ms;
    tiles.push(tile(
        "One inference",
        &format!("{:.2} ms", model.min_ms),
        &format!("float {:.2} ms, {ratio:.2} times as long; fastest run", float.min_ms),
    ));
    let mut body = format!("<div class=\"tiles\">{}</div>", tiles.concat());
    if !r.warnings.is_empty() {
        let lines: String = r.warnings.iter().map(|w| format!("<li>{}</li>", escape(w))).collect();
        body += &format!("<ul class=\"warnings\">{lines}</ul>");
    }
    let lead =
        format!("Accuracy is measured on {}; time on this machine, one thread, preprocessing excluded.", r.measured_on);
    Some(section("summary", "Summary", &lead, &body))
}

fn accuracy(r: &Report) -> Option<String> {
    let a = r.accuracy.as_ref()?;
    let all = [("Top-1, float", &a.float), ("Top-1, converted", &a.model), ("Same first answer", &a.agreement)];
    let from = all.iter().map(|(_, s)| s.low).fold(1.0, f64::min);
    let row = |(name, s): (&str, &Share)| {
        let plot = interval((from, 1.0), (s.low, s.value, s.high), &format!("{name}: {}", with_interval(s)));
        vec![
            text(name),
            number(percent(s.value)),
            number(format!("{:.2} to {:.2} %", 100.0 * s.low, 100.0 * s.high)),
            number(format!("{} of {}", s.count, s.of)),
            Cell::Html(plot),
        ]
    };
    let mut body =
        table(&["", "#share", "#95 % interval", "#pictures", "interval"], all.into_iter().map(row).collect());
    body += &format!(
        "<p>Logits: {} signal to noise; mean divergence of the answers {} nats.</p>",
        db(a.sqnr_db),
        short(a.mean_kl)
    );
    if let Some(c) = &r.card.certainty {
        body += &format!("<p>Probabilities on the board: {}.</p>", escape(&certainty::describe(c)));
    }
    let lead = format!(
        "{} pictures: {}. Intervals are Wilson's: with so many pictures the true share lies inside in 95 of 100 cases. Plots start at {:.0} %.",
        a.float.of,
        r.measured_on,
        100.0 * from
    );
    Some(section("accuracy", "Accuracy, before and after", &lead, &body))
}

fn pictures(r: &Report) -> Option<String> {
    if r.moved.is_empty() {
        return None;
    }
    let figure = |m: &Moved| {
        let changed = if m.before.0 == m.after.0 { "same" } else { "changed" };
        format!(
            "<figure class=\"{changed}\"><img src=\"data:image/jpeg;base64,{}\" alt=\"{}\"><figcaption><b>{}</b>\
             <span>float: {} {:.1} %</span><span>now: {} {:.1} %</span><small>{} · {} nats</small></figcaption></figure>",
            base64(&m.jpeg),
            escape(&m.file),
            escape(&m.label),
            escape(&m.before.0),
            100.0 * m.before.1,
            escape(&m.after.0),
            100.0 * m.after.1,
            escape(&m.file),
            short(m.kl)
        )
    };
    let changed = r.moved.iter().filter(|m| m.before.0 != m.after.0).count();
    let lead = format!(
        "The {} whose answers moved most; {} of them changed the label (marked). In bold: the right label.",
        counted(r.moved.len(), "picture"),
        changed
    );
    let body: String = r.moved.iter().map(figure).collect();
    Some(section("pictures", "Pictures that moved", &lead, &format!("<div class=\"pictures\">{body}</div>")))
}

fn cost(r: &Report) -> Option<String> {
    let rows = r.cost.iter().map(|c| {
        let [median, best] = [c.median_ms, c.min_ms].map(|ms| number(format!("{ms:.2} ms")));
        vec![text(&c.model), number(mega(c.bytes)), median, best, number(format!("{:.1}", 1000.0 / c.median_ms))]
    });
    let body = table(&["model", "#file", "#median", "#fastest", "#inferences a second"], rows.collect());
    let [float, model] = &r.cost;
    let pays = match float.min_ms / model.min_ms {
        ratio if ratio < 1.1 => {
            "Here the converted model is hardly faster than float: its size is what it gains.".to_string()
        }
        ratio => format!(
            "{ratio:.2} times as fast as float, {:.2} times as small.",
            float.bytes as f64 / model.bytes.max(1) as f64
        ),
    };
    let lead =
        format!("Measured on this machine in turns, one thread; a board differs (vedge bench --on USER@HOST). {pays}");
    Some(section("cost", "Size and speed", &lead, &body))
}

fn layers(r: &Report) -> Option<String> {
    if r.layers.is_empty() {
        return None;
    }
    let or_dash = |v: Option<String>| v.unwrap_or_else(|| "–".into());
    let worst = r.layers.iter().filter_map(|l| l.alone_kl).fold(0.0, f64::max);
    let row = |l: &LayerReport| {
        let share = l.alone_kl.map_or(0.0, |k| 100.0 * k / worst.max(1e-300));
        vec![
            text(&l.name),
            text(l.class),
            number(db(l.input_sqnr)),
            number(db(l.output_sqnr)),
            number(or_dash(l.alone_sqnr.map(db))),
            Cell::Html(format!(
                "<span class=\"share\" style=\"--w:{share:.0}%\">{}</span>",
                escape(&or_dash(l.alone_kl.map(|k| format!("{} nats", short(k)))))
            )),
        ]
    };
    let points: Vec<(String, f64)> = r.layers.iter().map(|l| (l.name.clone(), l.output_sqnr)).collect();
    let plot = depth(&points, "dB", "Signal to noise of each layer's output in the converted model");
    let head = [
        "layer",
        "kind",
        "#input rounded",
        "#output, with all before it",
        "#logits, this layer alone",
        "answers, this layer alone",
    ];
    let lead = format!(
        "{} in integers, measured on {} pictures. The line shows the noise as it adds up through the model: signal to noise of \
         each layer's output against float, in order. The last two columns quantize one layer and nothing else: what matters most \
         for the answers has the longest bar.",
        counted(r.layers.len(), "layer"),
        r.layer_pictures
    );
    Some(section(
        "layers",
        "Where the noise comes from",
        &lead,
        &(plot + &table(&head, r.layers.iter().map(row).collect())),
    ))
}

fn ranges(r: &Report) -> Option<String> {
    if r.layers.is_empty() {
        return None;
    }
    let mut done = vec![];
    let mut rows = vec![];
    for l in &r.layers {
        if done.contains(&l.input) {
            continue;
        }
        done.push(l.input.clone());
        let (low, high) = l.range.unwrap_or(l.seen);
        let ends = (l.seen.0.min(low), l.seen.1.max(high));
        let how = match l.range {
            Some(_) if l.symmetric => "symmetric",
            Some(_) => "asymmetric",
            None => "row by row",
        };
        // The plot covers what was seen; a range beyond it is shaded to the edge.
        let plot =
            distribution(&l.shares, l.seen, l.range, &format!("{}: {} to {}", l.input, short(ends.0), short(ends.1)));
        rows.push(vec![
            text(&l.input),
            number(format!("{} … {}", short(l.seen.0), short(l.seen.1))),
            number(l.range.map_or("–".into(), |_| format!("{} … {}", short(low), short(high)))),
            text(how),
            number(if l.range.is_some() { format!("{:.4} %", 100.0 * l.clipped) } else { "–".into() }),
            Cell::Html(plot),
        ]);
    }
    let lead = match r.card.activations {
        Activations::Static => {
            "Values that go into quantized layers. Shaded: the range of the integers; bars outside of it are clipped. Heights are \
             logarithms, the thin line is zero."
        }
        Activations::PerToken => {
            "Values that go into quantized layers. A range of its own is found for every row while the model runs, so nothing is \
             clipped; where a calibrated range is used instead, it is shaded. Heights are logarithms, the thin line is zero."
        }
    };
    Some(section(
        "ranges",
        "Ranges and what they clip",
        lead,
        &table(&["value", "#seen", "#range", "kind", "#clipped", "values"], rows),
    ))
}

fn outliers(r: &Report) -> Option<String> {
    if r.layers.is_empty() {
        return None;
    }
    let list = |o: &[Outlier]| {
        let one = |o: &Outlier| format!("{} ({} times, {})", o.index, short(o.times), short(o.reach));
        o.iter().map(one).collect::<Vec<_>>().join(", ")
    };
    let mut done = vec![];
    let mut rows = vec![];
    for l in r.layers.iter().filter(|l| !l.channels.is_empty() || !l.tokens.is_empty()) {
        if !done.contains(&&l.input) {
            done.push(&l.input);
            rows.push(vec![text(&l.input), text(list(&l.channels)), text(list(&l.tokens))]);
        }
    }
    let lead = "Channels and tokens of a layer's input that reach at least six times as far as the middle one: index, how many times as \
                far, largest absolute value. They make the steps of all others coarse.";
    let body = match rows.is_empty() {
        true => "<p>None.</p>".into(),
        false => table(&["value", "channels", "tokens"], rows),
    };
    Some(section("outliers", "Outliers", lead, &body))
}

fn budget(r: &Report) -> Option<String> {
    if r.search.is_empty() {
        return None;
    }
    let front = plot::pareto(&r.search);
    let row = |(i, p): (usize, &Point)| {
        vec![
            text(if p.chosen { "chosen" } else { "" }),
            text(p.plan.describe()),
            number(format!("{:.2} ms", p.ms)),
            number(mega(p.bytes as u64)),
            number(percent(p.effect.top1)),
            number(percent(p.effect.agreement)),
            number(format!("{} nats", short(p.effect.mean_kl))),
            text(if front.contains(&i) { "yes" } else { "" }),
        ]
    };
    let lead = "Each was made with weights rounded to nearest and judged against the whole float model on pictures kept aside. \
                The line joins those that no other one beats in both time and divergence.";
    let head = ["", "model", "#time", "#size", "#top-1", "#same answer", "#divergence", "unbeaten"];
    let body = plot::svg(&r.search) + &table(&head, r.search.iter().enumerate().map(row).collect());
    Some(section("budget", "The search for the budget", lead, &body))
}

fn tried(r: &Report) -> Option<String> {
    if r.candidates.is_empty() {
        return None;
    }
    let row = |(i, c): (usize, &crate::quantize::Candidate)| {
        vec![
            text(if i == 0 { "kept" } else { "" }),
            text(c.what()),
            number(db(c.effect.sqnr)),
            number(percent(c.effect.agreement)),
            number(format!("{} nats", short(c.effect.mean_kl))),
            number(c.effect.pictures),
        ]
    };
    let lead = "Each was judged by its logits on calibration pictures kept aside; what was hopeless after a few pictures was not run on all. \
                A portable file is preferred where it is less than 1 dB behind.";
    let body = table(
        &["", "quantization", "#logits", "#same answer", "#divergence", "#pictures"],
        r.candidates.iter().enumerate().map(row).collect(),
    );
    Some(section("tried", "What was tried and kept", lead, &body))
}

fn float_layers(r: &Report) -> Option<String> {
    if r.float_layers.is_empty() {
        return None;
    }
    let rows = r.float_layers.iter().map(|(name, why)| vec![text(name), text(why)]).collect();
    Some(section("float", "Layers left in float", "", &table(&["layer", "why"], rows)))
}

fn shift(r: &Report) -> Option<String> {
    let s = &r.accuracy.as_ref()?.shift;
    let plot = distribution(&s.shares, (-s.max_abs, s.max_abs), None, "Score shift of each picture");
    let body = format!(
        "<div class=\"big\">{plot}</div><p class=\"ends\"><span>−{0:.2} points</span><span>+{0:.2} points</span></p>\
         <p>Mean {1:+.3} points; half of the pictures move less than {2:.3}, 95 % less than {3:.3}, the largest by {0:.2}.</p>",
        s.max_abs, s.mean, s.median_abs, s.p95_abs
    );
    let lead = "Probability of the float model's first answer, after minus before, for every picture. A mean off zero asks for other \
                thresholds than the float model's. Heights are logarithms.";
    Some(section("shift", "Score shift", lead, &body))
}

fn reproduce(r: &Report) -> Option<String> {
    let p = &r.card.provenance;
    let mut rows = vec![
        vec![text("source"), text(&p.source)],
        vec![text("SHA-256 of the source"), text(&p.sha256)],
        vec![text("made by"), text(&p.tool)],
    ];
    if let Some(c) = &p.calibration {
        rows.push(vec![text("calibration"), text(format!("{}, SHA-256 {}", counted(c.pictures, "picture"), c.sha256))]);
    }
    rows.extend(p.passes.iter().map(|line| vec![text("pass"), text(line)]));
    let commands = r.commands.iter().map(|c| escape(c)).collect::<Vec<_>>().join("\n");
    let body = format!("<pre tabindex=\"0\">{commands}</pre>{}", table(&["", ""], rows));
    Some(section("reproduce", "Do it again", "The same inputs give the same file, byte for byte.", &body))
}
