//! Writes HTML and small SVG plots. Everything that comes from outside goes through [`escape`].

use std::fmt::Write as _;

/// Text for HTML, as content or as an attribute's value.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// A section with a heading; `body` is HTML.
pub fn section(id: &str, heading: &str, lead: &str, body: &str) -> String {
    let lead = if lead.is_empty() { String::new() } else { format!("<p class=\"lead\">{}</p>", escape(lead)) };
    format!("<section id=\"{id}\"><h2>{}</h2>{lead}{body}</section>\n", escape(heading))
}

/// A cell of a table.
pub enum Cell {
    /// Words, to the left.
    Text(String),
    /// A number, to the right.
    Number(String),
    /// HTML that is safe already.
    Html(String),
}

/// Words as a cell.
pub fn text(t: impl ToString) -> Cell {
    Cell::Text(t.to_string())
}

/// A number as a cell.
pub fn number(t: impl ToString) -> Cell {
    Cell::Number(t.to_string())
}

/// A table that scrolls sideways where it is too wide; a head with a leading `#` stands over numbers.
pub fn table(head: &[&str], rows: Vec<Vec<Cell>>) -> String {
    let mut t = String::from("<div class=\"wide\" tabindex=\"0\"><table><thead><tr>");
    for h in head {
        match h.strip_prefix('#') {
            Some(h) => write!(t, "<th class=\"n\" scope=\"col\">{}</th>", escape(h)),
            None => write!(t, "<th scope=\"col\">{}</th>", escape(h)),
        }
        .expect("writing to a string");
    }
    t.push_str("</tr></thead><tbody>");
    for row in rows {
        t.push_str("<tr>");
        for cell in row {
            match cell {
                Cell::Text(s) => write!(t, "<td>{}</td>", escape(&s)),
                Cell::Number(s) => write!(t, "<td class=\"n\">{}</td>", escape(&s)),
                Cell::Html(s) => write!(t, "<td>{s}</td>"),
            }
            .expect("writing to a string");
        }
        t.push_str("</tr>");
    }
    t + "</tbody></table></div>"
}

/// Bars of a distribution over `from…to`, with a shaded part inside of `range` and what lies outside marked; heights are
/// logarithms, so that rare values are seen.
pub fn distribution(shares: &[f64], (from, to): (f64, f64), range: Option<(f64, f64)>, title: &str) -> String {
    const WIDTH: f64 = 168.0;
    const HEIGHT: f64 = 34.0;
    let span = if to > from { to - from } else { 1.0 };
    let x = |v: f64| ((v - from) / span * WIDTH).clamp(0.0, WIDTH);
    let mut s = format!(
        "<svg class=\"plot\" preserveAspectRatio=\"none\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" role=\"img\">"
    );
    let _ = write!(s, "<title>{}</title>", escape(title));
    if let Some((low, high)) = range {
        let _ = write!(
            s,
            "<rect class=\"range\" x=\"{:.1}\" width=\"{:.1}\" height=\"{HEIGHT}\"/>",
            x(low),
            (x(high) - x(low)).max(0.5)
        );
    }
    let least = shares.iter().copied().filter(|v| *v > 0.0).fold(f64::INFINITY, f64::min);
    let most = shares.iter().copied().fold(0.0, f64::max);
    let each = WIDTH / shares.len().max(1) as f64;
    for (i, v) in shares.iter().enumerate().filter(|(_, v)| **v > 0.0) {
        let height = match most > least {
            true => 2.0 + (HEIGHT - 3.0) * (v / least).ln() / (most / least).ln(),
            false => HEIGHT - 1.0,
        };
        let middle = from + (i as f64 + 0.5) / shares.len() as f64 * span;
        let outside = range.is_some_and(|(low, high)| middle < low || middle > high);
        let class = if outside { "bar out" } else { "bar" };
        let _ = write!(
            s,
            "<rect class=\"{class}\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{height:.1}\"/>",
            i as f64 * each,
            HEIGHT - height,
            (each - 0.4).max(0.4)
        );
    }
    let _ = write!(s, "<line class=\"zero\" x1=\"{0:.1}\" x2=\"{0:.1}\" y1=\"0\" y2=\"{HEIGHT}\"/>", x(0.0));
    s + "</svg>"
}

/// An interval on a line from `from` to `to` with its middle marked.
pub fn interval((from, to): (f64, f64), (low, value, high): (f64, f64, f64), title: &str) -> String {
    const WIDTH: f64 = 200.0;
    let x = |v: f64| ((v - from) / (to - from).max(1e-9) * (WIDTH - 8.0) + 4.0).clamp(4.0, WIDTH - 4.0);
    format!(
        "<svg class=\"plot\" viewBox=\"0 0 {WIDTH} 16\" width=\"{WIDTH}\" height=\"16\" role=\"img\"><title>{}</title>\
         <line class=\"axis\" x1=\"4\" x2=\"196\" y1=\"8\" y2=\"8\"/><line class=\"reach\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"8\" y2=\"8\"/>\
         <circle class=\"dot\" cx=\"{:.1}\" cy=\"8\" r=\"4\"/></svg>",
        escape(title),
        x(low),
        x(high),
        x(value)
    )
}

/// Values along the depth of a model as a line with points, each with a name; `unit` stands at the axis.
pub fn depth(values: &[(String, f64)], unit: &str, title: &str) -> String {
    const WIDTH: f64 = 900.0;
    const HEIGHT: f64 = 200.0;
    const LEFT: f64 = 46.0;
    const BOTTOM: f64 = 12.0;
    let (mut low, mut high) =
        values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v.1), b.max(v.1)));
    if values.is_empty() {
        (low, high) = (0.0, 1.0);
    }
    low = (low / 10.0).floor() * 10.0;
    high = ((high / 10.0).ceil() * 10.0).max(low + 10.0);
    let x = |i: usize| LEFT + (WIDTH - LEFT - 8.0) * i as f64 / values.len().saturating_sub(1).max(1) as f64;
    let y = |v: f64| 8.0 + (HEIGHT - BOTTOM - 8.0) * (high - v) / (high - low);
    let mut s =
        format!("<svg class=\"depth\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\"><title>{}</title>", escape(title));
    let ticks = ((high - low) / 10.0).round() as usize;
    for i in (0..=ticks).step_by(ticks.div_ceil(6).max(1)) {
        let v = low + 10.0 * i as f64;
        let _ = write!(
            s,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{WIDTH}\" y1=\"{0:.1}\" y2=\"{0:.1}\"/><text x=\"{1}\" y=\"{2:.1}\" text-anchor=\"end\">{v:.0} {3}</text>",
            y(v),
            LEFT - 6.0,
            y(v) + 4.0,
            escape(unit)
        );
    }
    let points: Vec<String> =
        values.iter().enumerate().map(|(i, (_, v))| format!("{:.1},{:.1}", x(i), y(*v))).collect();
    let _ = write!(s, "<polyline class=\"line\" points=\"{}\"/>", points.join(" "));
    for (i, (name, v)) in values.iter().enumerate() {
        let _ = write!(
            s,
            "<circle class=\"dot\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"><title>{}: {v:.1} {}</title></circle>",
            x(i),
            y(*v),
            escape(name),
            escape(unit)
        );
    }
    s + "</svg>"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_from_outside_is_no_markup() {
        let t = table(&["a", "#b"], vec![vec![text("<script>"), number("1 & 2")]]);
        assert!(t.contains("&lt;script&gt;") && t.contains("1 &amp; 2") && !t.contains("<script>"), "{t}");
        let s = section("x", "\"h\"", "l'", "");
        assert!(s.contains("&quot;h&quot;") && s.contains("l&#39;"), "{s}");
    }

    #[test]
    fn plots_mark_what_is_outside_and_have_no_broken_numbers() {
        let p = distribution(&[0.1, 0.0, 0.8, 0.1], (-1.0, 1.0), Some((-0.4, 1.0)), "t");
        assert_eq!((p.matches("class=\"bar\"").count(), p.matches("class=\"bar out\"").count()), (2, 1), "{p}");
        for p in [
            distribution(&[], (0.0, 0.0), None, ""),
            distribution(&[1.0], (0.0, 0.0), Some((0.0, 0.0)), ""),
            interval((0.5, 0.5), (0.5, 0.5, 0.5), ""),
            depth(&[], "dB", ""),
            depth(&[("a".into(), 30.0)], "dB", ""),
        ] {
            assert!(!p.contains("NaN") && !p.contains("inf"), "{p}");
        }
    }
}
