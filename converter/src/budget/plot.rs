//! What a search found, as a table and as a plot for the report.

use super::Point;
use std::fmt::Write;

/// Points that no other one beats in both time and fidelity.
pub fn pareto(points: &[Point]) -> Vec<usize> {
    let better = |a: &Point, b: &Point| {
        (a.ms <= b.ms && a.effect.mean_kl <= b.effect.mean_kl) && (a.ms < b.ms || a.effect.mean_kl < b.effect.mean_kl)
    };
    (0..points.len()).filter(|&i| !points.iter().any(|p| better(p, &points[i]))).collect()
}

/// One line a point, fastest first; `*` marks the Pareto set, `>` the one that was chosen.
pub fn table(points: &[Point]) -> String {
    let front = pareto(points);
    let mut order: Vec<usize> = (0..points.len()).collect();
    order.sort_by(|&a, &b| points[a].ms.total_cmp(&points[b].ms));
    let mut out = String::from("      ms      MB   top-1  agreement      KL  what\n");
    for i in order {
        let p = &points[i];
        let mark = [if p.chosen { '>' } else { ' ' }, if front.contains(&i) { '*' } else { ' ' }];
        let (top1, agreement) = (100.0 * p.effect.top1, 100.0 * p.effect.agreement);
        let _ = writeln!(
            out,
            "{}{}{:6.2}  {:6.1}  {top1:5.1} %    {agreement:5.1} %  {:6.3}  {}",
            mark[0],
            mark[1],
            p.ms,
            p.bytes as f64 / 1e6,
            p.effect.mean_kl,
            p.plan.describe() + if p.measured { "" } else { " (time predicted)" }
        );
    }
    out
}

/// Time (across) and divergence from the whole model (up, logarithmic) of every point as an SVG element; the Pareto set is
/// joined by a line, the chosen one is filled.
pub fn svg(points: &[Point]) -> String {
    const SIZE: [f64; 2] = [640.0, 320.0];
    const EDGE: f64 = 44.0;
    let kl = |p: &Point| p.effect.mean_kl.max(1e-6).log10();
    let span = |f: &dyn Fn(&Point) -> f64| {
        let low = points.iter().map(f).fold(f64::INFINITY, f64::min);
        let high = points.iter().map(f).fold(f64::NEG_INFINITY, f64::max);
        (low, (high - low).max(1e-9))
    };
    let (ms, up) = (span(&|p| p.ms), span(&kl));
    let x = |p: &Point| EDGE + (p.ms - ms.0) / ms.1 * (SIZE[0] - 2.0 * EDGE);
    let y = |p: &Point| SIZE[1] - EDGE - (kl(p) - up.0) / up.1 * (SIZE[1] - 2.0 * EDGE);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"time and divergence of the candidates\">\n",
        SIZE[0], SIZE[1]
    );
    let mut front = pareto(points);
    front.sort_by(|&a, &b| points[a].ms.total_cmp(&points[b].ms));
    let line: Vec<String> = front.iter().map(|&i| format!("{:.1},{:.1}", x(&points[i]), y(&points[i]))).collect();
    let _ = writeln!(
        out,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"currentColor\" stroke-opacity=\".5\"/>",
        line.join(" ")
    );
    for p in points {
        let fill = if p.chosen { "currentColor" } else { "none" };
        let _ = writeln!(
            out,
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"5\" fill=\"{fill}\" stroke=\"currentColor\"><title>{}: {:.2} ms, KL {:.4}, agreement {:.1} %</title></circle>",
            x(p),
            y(p),
            p.plan.describe(),
            p.ms,
            p.effect.mean_kl,
            100.0 * p.effect.agreement
        );
    }
    let label = |x: f64, y: f64, anchor: &str, text: String| {
        format!(
            "<text x=\"{x}\" y=\"{y}\" font-size=\"12\" fill=\"currentColor\" text-anchor=\"{anchor}\">{text}</text>\n"
        )
    };
    out += &label(EDGE, SIZE[1] - 14.0, "start", format!("{:.1} ms", ms.0));
    out += &label(SIZE[0] - EDGE, SIZE[1] - 14.0, "end", format!("{:.1} ms", ms.0 + ms.1));
    out += &label(
        EDGE,
        24.0,
        "start",
        format!(
            "divergence from the whole model, {:.2e} to {:.2e} nats (log)",
            10f64.powf(up.0),
            10f64.powf(up.0 + up.1)
        ),
    );
    out + "</svg>\n"
}
