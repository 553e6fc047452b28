use super::*;

fn point(plan: Plan, ms: f64, bytes: usize, top1: f64, mean_kl: f64) -> Point {
    let effect = Effect { sqnr: 20.0, agreement: 0.9, top1, mean_kl, pictures: 100 };
    Point { plan, ms, measured: true, bytes, effect, chosen: false }
}

fn space() -> Space {
    Space { sizes: vec![(196, 196), (168, 168)], merges: vec![8, 16], neurons: vec![20], ..Space::default() }
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

mod on_a_model {
    use super::*;
    use crate::convert::Pictures;
    use crate::quantize::Preset;
    use std::collections::BTreeMap;

    fn models() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../models")
    }

    fn settings(cache: Option<&Path>) -> Settings {
        Settings {
            calibration: Some(Pictures { dir: models().join("fashion/calibration"), count: 32 }),
            preprocess: Some(models().join("fashion.json").display().to_string()),
            judges: Some(usize::MAX),
            preset: Preset::Cpu,
            cache: cache.map(Path::to_path_buf),
            ..Settings::default()
        }
    }

    /// The latency table of a board, which has only some plans.
    fn budget(dir: &Path, ms: &[(&str, f64)], share: f64) -> Budget {
        let path = dir.join("board.json");
        let ms: BTreeMap<String, f64> = ms.iter().map(|(k, v)| (k.to_string(), *v)).collect();
        let model = sha256(&std::fs::read(models().join("deit_nano.onnx")).unwrap());
        let table = serde_json::json!({"v": 2, "model": model, "target": "a board", "ms": ms});
        std::fs::write(&path, table.to_string()).unwrap();
        Budget { latency: Some(Amount::Share(share)), max_drop: 40.0, table: Some(path), ..Budget::default() }
    }

    const TIMES: [(&str, f64); 4] = [("int8", 10.0), ("int8-merge2", 8.0), ("int8-mlp20", 8.6), ("fp32", 20.0)];

    fn search(settings: &Settings, budget: &Budget) -> Found {
        Search::new(&models().join("deit_nano.onnx"), settings, budget).unwrap().run().unwrap()
    }

    /// Without a cache, with one, and resumed from half of one, a search decides the same; what is known is not judged again.
    #[test]
    fn searches_are_deterministic_and_go_on_where_they_stopped() {
        let (dir, budget_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let budget = self::budget(budget_dir.path(), &TIMES, 0.7);
        let json = |found: &Found| serde_json::to_string(found).unwrap();
        let first = search(&settings(None), &budget);
        let kept = settings(Some(dir.path()));
        assert_eq!(json(&search(&kept, &budget)), json(&first));
        let file = std::fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().path());
        let file = file.filter(|p| p.extension().is_some_and(|e| e == "budget")).last().unwrap();
        let mut known: BTreeMap<String, serde_json::Value> =
            serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        assert_eq!(known.len(), first.points.len());
        known.remove("int8-mlp20");
        known.remove("int8-merge2-mlp20");
        std::fs::write(&file, serde_json::to_vec(&known).unwrap()).unwrap();
        assert_eq!(json(&search(&kept, &budget)), json(&first));
        known.get_mut("fp32").unwrap()["effect"]["mean_kl"] = 123.0.into();
        std::fs::write(&file, serde_json::to_vec(&known).unwrap()).unwrap();
        let told = search(&kept, &budget);
        assert!(told.points.iter().any(|p| p.plan.precision == Precision::Fp32 && p.effect.mean_kl == 123.0));
    }

    #[test]
    fn times_of_two_machines_are_not_mixed() {
        let dir = tempfile::tempdir().unwrap();
        let found = search(&settings(None), &budget(dir.path(), &TIMES, 0.7));
        assert_eq!(found.target, "a board");
        // 10 ms in the table; what it does not have is listed, not measured.
        assert!(found.not_tried.contains(&"int8-heads10".to_string()) && found.note.contains("int8-heads10"));
        let tried: Vec<String> = found.points.iter().map(|p| p.plan.key()).collect();
        assert_eq!(tried, ["int8", "int8-merge2", "int8-mlp20", "fp32", "int8-merge2-mlp20"]);
        // A combination is predicted from its parts, and says so.
        let both = found.points.last().unwrap();
        assert!(!both.measured && (both.ms - 6.88).abs() < 1e-9 && both.chosen, "{both:?}");
        assert!(
            found.note.contains("6.88 ms (predicted)") && found.note.contains("times of a board"),
            "{}",
            found.note
        );
        let refused = |ms: &[(&str, f64)]| {
            let (settings, budget) = (self::settings(None), self::budget(dir.path(), ms, 0.7));
            Search::new(&models().join("deit_nano.onnx"), &settings, &budget).err().unwrap().to_string()
        };
        assert!(refused(&TIMES[1..]).contains("does not have plain INT8"));
        assert!(refused(&[("int8", -1.0)]).contains("is no latency table"));
    }

    /// The file that a search makes keeps to what was asked for, on the pictures that judge; else it is plain INT8.
    #[test]
    fn the_file_is_never_worse_than_plain_int8() {
        let dir = tempfile::tempdir().unwrap();
        let source = models().join("deit_nano.onnx");
        let (budget, settings) = (self::budget(dir.path(), &TIMES, 0.7), self::settings(None));
        let mut found = search(&settings, &budget);
        let plan = found.plan().clone();
        let shrunk = take(&source, &settings, &mut found).unwrap();
        assert_eq!((found.plan(), found.least_top1), (&plan, found.float_top1 - 0.4));
        let bytes = |c: &Converted| c.graph.encode();
        let plain = convert(&source, &settings).unwrap();
        assert!(bytes(&shrunk).len() < bytes(&plain).len());
        // More right answers than there are pictures: the file cannot keep to that.
        found.least_top1 = 1.1;
        let kept = take(&source, &settings, &mut found).unwrap();
        assert!(bytes(&kept) == bytes(&plain) && *found.plan() == Plan::default(), "{}", found.note);
        assert!(found.note.contains("plain INT8"), "{}", found.note);
        // Where nothing keeps to the budget, plain INT8 is what the search itself takes.
        let none = search(&settings, &Budget { max_drop: -200.0, ..budget });
        assert!(*none.plan() == Plan::default() && none.note.contains("is not met"), "{}", none.note);
    }

    /// What `vedge bench --on HOST --json` prints of written plans is a latency table.
    #[test]
    fn boards_measure_stand_ins() {
        let dir = tempfile::tempdir().unwrap();
        let source = models().join("deit_nano.onnx");
        let settings = Settings { size: Some((32, 32)), ..self::settings(None) };
        let own = Budget { latency: Some(Amount::Share(0.5)), ..Budget::default() };
        let count = Search::new(&source, &settings, &own).unwrap().write_plans(dir.path()).unwrap();
        let files = std::fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap());
        let files: Vec<String> = files.collect();
        assert!(count == files.len() && files.contains(&"deit_nano.int8-mlp20.onnx".to_string()), "{files:?}");
        let measured: Vec<serde_json::Value> = files
            .iter()
            .map(|f| serde_json::json!({"model": f, "median_ms": f.len() as f64, "threads": 4, "kernels": "neon"}))
            .collect();
        let path = dir.path().join("pi.json");
        let json = serde_json::json!({"v": 1, "board": {"model": "Raspberry Pi 4"}, "models": measured});
        std::fs::write(&path, json.to_string()).unwrap();
        let measured = Budget { table: Some(path), ..own };
        let mut search = Search::new(&source, &settings, &measured).unwrap();
        assert_eq!(search.latency.target(), "Raspberry Pi 4, 4 threads");
        assert!(search.not_tried.is_empty() && search.latency.foreign());
        assert_eq!(search.plain().unwrap(), "deit_nano.int8.onnx".len() as f64);
        assert!(search.dry_run().unwrap().contains("precision besides int8: fp16, fp32"));
        let (other, settings) = (models().join("mobilevit_nano.onnx"), self::settings(None));
        let other = Search::new(&other, &settings, &measured);
        assert!(other.err().unwrap().to_string().contains("of another model"));
    }
}
