use super::*;

fn point(plan: Plan, ms: f64, bytes: usize, top1: f64, mean_kl: f64) -> Point {
    let effect = Effect { sqnr: 20.0, agreement: 0.9, top1, mean_kl, pictures: 100 };
    Point { plan, ms, bytes, effect, chosen: false }
}

fn space() -> Space {
    Space { sizes: vec![(196, 196), (168, 168)], merges: vec![8, 16], neurons: vec![20], heads: vec![] }
}

/// Plain INT8 and each step alone.
fn tried() -> Vec<Point> {
    let plan = Plan::default();
    vec![
        point(plan.clone(), 40.0, 1000, 0.90, 0.001),
        point(Plan { size: Some((196, 196)), ..plan.clone() }, 30.0, 1000, 0.89, 0.05),
        point(Plan { size: Some((168, 168)), ..plan.clone() }, 22.0, 1000, 0.85, 0.12),
        point(Plan { merge: 8, ..plan.clone() }, 34.0, 1010, 0.90, 0.006),
        point(Plan { merge: 16, ..plan.clone() }, 28.0, 1010, 0.89, 0.03),
        point(Plan { neurons: 20, ..plan }, 36.0, 850, 0.895, 0.02),
    ]
}

#[test]
fn amounts() {
    assert_eq!(Amount::latency("0.4x"), Ok(Amount::Share(0.4)));
    assert_eq!(Amount::latency("15ms"), Ok(Amount::Absolute(15.0)));
    assert_eq!(Amount::size("12MB"), Ok(Amount::Absolute(12e6)));
    for bad in ["", "x", "-1ms", "0x", "15", "1MB"] {
        assert!(Amount::latency(bad).is_err(), "{bad}");
    }
}

#[test]
fn combinations_that_should_fit_come_in_the_order_of_what_they_should_cost() {
    let points = tried();
    let limits = Limits { ms: 25.5, bytes: f64::INFINITY, top1: 0.0 };
    let plans = promising(&space(), &points, &points[0], &limits);
    // 40 · 28/40 · 36/40 = 25.2 ms, at a cost of 0.029 + 0.019; 196 px with 8 tokens, 25.5 ms, costs 0.054.
    assert_eq!((plans[0].merge, plans[0].neurons, plans[0].size), (16, 20, None));
    assert_eq!((plans[1].merge, plans[1].size), (8, Some((196, 196))));
    assert!(plans.len() <= COMBINATIONS && plans.iter().all(|p| p.parts().len() > 1));
    // By size alone only neurons help.
    let limits = Limits { ms: f64::INFINITY, bytes: 880.0, top1: 0.0 };
    assert!(promising(&space(), &points, &points[0], &limits).iter().all(|p| p.neurons == 20));
}

#[test]
fn the_least_divergent_within_the_limits_is_chosen_or_none() {
    let points = tried();
    let pick = |ms, top1| choose(&points, &Limits { ms, bytes: f64::INFINITY, top1 });
    assert_eq!(pick(35.0, 0.0), Some(3));
    assert_eq!(pick(28.0, 0.0), Some(4));
    assert_eq!(pick(28.0, 0.895), None);
    assert_eq!(pick(25.0, 0.0), Some(2));
    assert_eq!(pick(10.0, 0.0), None);
    assert_eq!(pick(f64::INFINITY, 0.0), Some(0));
}

#[test]
fn the_pareto_set_is_drawn() {
    let mut points = tried();
    points[3].chosen = true;
    // 196 px: 16 merged tokens are faster and nearer. 20 % of the neurons: 8 merged tokens are.
    assert_eq!(plot::pareto(&points), [0, 2, 3, 4]);
    let table = plot::table(&points);
    assert!(table.contains(">* 34.00") && table.contains("  30.00"), "{table}");
    let svg = plot::svg(&points);
    assert_eq!(svg.matches("<circle").count(), points.len());
    assert_eq!(svg.matches("fill=\"currentColor\" stroke").count(), 1);
    assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
}
