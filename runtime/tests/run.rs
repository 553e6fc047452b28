//! The program from outside: what it prints, how it ends, and what it says to bad input.
#![allow(missing_docs)]

use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use vedge_runtime::model::card::{
    Activations, Card, Channels, Filter, Fit, OutputKind, Preprocess, Provenance, SelfTest, VERSION,
};
use vedge_runtime::onnx::Graph;
use vedge_runtime::pipeline::{self, Model, Totals};
use vedge_runtime::preprocess::Picture;
use vedge_runtime::source::{Frame, FrameSource, Pixels};
use vedge_runtime::{Options, Session};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

fn deit() -> PathBuf {
    repository().join("models/deit_nano.onnx")
}

fn pictures() -> PathBuf {
    repository().join("tests/reference/pictures")
}

/// A folder for the whole test program: the model with a card, and room for files.
fn work() -> &'static Path {
    static DIR: OnceLock<tempfile::TempDir> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let mut session = Session::load(&deit(), &Options::default()).unwrap();
        let logits = session.run(&vedge_runtime::bench::inputs(&session)).unwrap()[0].iter().copied().collect();
        let card = Card {
            version: VERSION,
            name: "deit_nano".into(),
            architecture: "deit".into(),
            preprocess: Preprocess {
                height: 64,
                width: 64,
                fit: Fit::Squash,
                filter: Filter::Bilinear,
                mean: [0.5; 3],
                std: [0.25; 3],
                channels: Channels::Rgb,
            },
            output: OutputKind { name: session.outputs()[0].clone(), kind: "logits".into() },
            labels: "T-shirt Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Boot"
                .split(' ')
                .map(Into::into)
                .collect(),
            precision: "fp32".into(),
            activations: Activations::Static,
            provenance: Provenance::default(),
            accuracy: None,
            certainty: None,
            self_test: Some(SelfTest { seed: 1, logits, min_cosine: 0.999 }),
        };
        for (file, name) in [("model.onnx", card.output.name.as_str()), ("wrong.onnx", "embedding")] {
            let mut card = card.clone();
            card.output.name = name.into();
            let mut graph = Graph::read(&deit()).unwrap();
            card.embed(&mut graph);
            graph.write(&dir.path().join(file)).unwrap();
        }
        dir
    })
    .path()
}

fn model() -> PathBuf {
    work().join("model.onnx")
}

fn vedge_run<A: AsRef<std::ffi::OsStr>>(arguments: &[A]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vedge-run"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn classify(source: &Path) -> Output {
    vedge_run(&[&model(), source]).args(["--threads", "1"]).output().unwrap()
}

fn lines(stdout: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(stdout).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'), "half a line: {text}");
    text.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}"))).collect()
}

/// Exit status and standard error, with the paths that differ from machine to machine replaced.
fn told(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    let stderr =
        stderr.replace(&*work().to_string_lossy(), "[WORK]").replace(&*repository().to_string_lossy(), "[REPOSITORY]");
    // kernels and threads are the machine's
    let known = |line: &str| {
        line.split(", ")
            .filter(|part| !part.contains(" kernels") && !part.contains(" thread"))
            .collect::<Vec<_>>()
            .join(", ")
    };
    let stderr: String =
        stderr.lines().map(|l| if l.starts_with("model: ") { known(l) } else { l.into() } + "\n").collect();
    format!("exit {}\n{}", output.status.code().map_or("by signal".into(), |c| c.to_string()), stderr)
}

/// Runs with arguments that must fail, print nothing to standard output, and say what the snapshot holds.
fn refused<A: AsRef<std::ffi::OsStr>>(name: &str, arguments: &[A]) {
    let output = vedge_run(arguments).output().unwrap();
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    assert!(matches!(output.status.code(), Some(1 | 2)), "{:?}", output.status);
    insta::assert_snapshot!(name, told(&output));
}

fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = work().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn one_json_line_a_picture() {
    let folder = repository().join("models/fashion/test/9_ankle_boot");
    let folder = if folder.is_dir() {
        folder
    } else {
        std::fs::read_dir(folder.parent().unwrap()).unwrap().next().unwrap().unwrap().path()
    };
    let output = vedge_run(&[&model(), &folder]).args(["--top", "3"]).output().unwrap();
    assert!(output.status.success(), "{}", told(&output));
    let lines = lines(&output.stdout);
    assert_eq!(lines.len(), 20);
    for (i, line) in lines.iter().enumerate() {
        assert_eq!(
            (line["v"].as_u64(), line["seq"].as_u64(), line["dropped"].as_u64()),
            (Some(1), Some(i as u64), Some(0))
        );
        assert!(line["source"].as_str().unwrap().ends_with(".png"));
        let top = line["top"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        let p: Vec<f64> = top.iter().map(|c| c["p"].as_f64().unwrap()).collect();
        assert!(p.windows(2).all(|w| w[0] >= w[1]) && p.iter().sum::<f64>() <= 1.00001, "{p:?}");
        let ms = |k: &str| line["ms"][k].as_f64().unwrap();
        assert!(ms("total") + 0.01 >= ms("preprocess") + ms("infer") && ms("capture") >= 0.0);
    }
}

#[test]
fn unusual_pictures_work() {
    for name in
        ["grey.png", "grey16.png", "rgb16.png", "rgba.png", "palette.png", "one_bit.png", "cmyk.jpg", "progressive.jpg"]
    {
        let output = classify(&pictures().join(name));
        assert!(output.status.success() && lines(&output.stdout).len() == 1, "{name}: {}", told(&output));
    }
}

#[test]
fn a_damaged_picture_among_others_is_named_and_the_rest_is_done() {
    let folder = work().join("mixed");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::copy(pictures().join("rgb.png"), folder.join("a.png")).unwrap();
    std::fs::write(folder.join("b.png"), "not a picture").unwrap();
    std::fs::copy(pictures().join("rgb.png"), folder.join("c.png")).unwrap();
    let output = classify(&folder);
    assert_eq!(lines(&output.stdout).len(), 2);
    assert_eq!(output.status.code(), Some(1));
    let stderr = told(&output);
    assert!(stderr.contains("[WORK]/mixed/b.png") && stderr.contains("1 file could not be read"), "{stderr}");
}

#[test]
fn pictures_that_are_none() {
    refused("text_as_picture", &[&model(), &file("notes.jpg", b"these are notes, no picture\n")]);
    refused("empty_picture", &[&model(), &file("empty.png", b"")]);
    let whole = std::fs::read(pictures().join("baseline.jpg")).unwrap();
    refused("truncated_jpeg", &[&model(), &file("half.jpg", &whole[..whole.len() / 2])]);
    let whole = std::fs::read(pictures().join("rgb.png")).unwrap();
    refused("truncated_png", &[&model(), &file("half.png", &whole[..whole.len() / 2])]);
}

#[test]
fn sources_that_are_none() {
    let empty = work().join("empty");
    std::fs::create_dir_all(&empty).unwrap();
    let model = model().into_os_string().into_string().unwrap();
    refused("empty_folder", &[&model, &empty.to_string_lossy().into_owned()]);
    refused("no_such_file", &[&model, "/nonexistent/photo.jpg"]);
    refused("no_match", &[&model, "/nonexistent/*.jpg"]);
    refused("unknown_scheme", &[&model, "rtsp://camera/stream"]);
    refused("unknown_key", &[&model, "v4l2:///dev/video0?color=red"]);
    refused("unknown_format", &[&model, "v4l2:///dev/video0?format=H264"]);
    refused("not_a_camera", &[&model, "/dev/null"]);
    let output = vedge_run(&[&model, "v4l2:///dev/video99"]).output().unwrap();
    let told = told(&output);
    // the hint depends on the cameras of this machine
    assert!(told.starts_with("exit 1\nerror: cannot open camera /dev/video99: no such device\n\nhint: "), "{told}");
}

/// No test machine has such a camera: its list of formats goes through the negotiation that a device's goes through.
#[test]
fn cameras_of_raw_sensor_data() {
    for (name, driver, fourccs) in [
        ("bayer_raspberry_pi_4", "unicam", &["pBAA", "BG10"][..]),
        ("bayer_raspberry_pi_5", "rp1-cfe", &["pRAA"]),
        ("bayer_jetson", "tegra-video", &["RG10"]),
        ("bayer_other", "other", &["BA81"]),
        ("camera_of_video_only", "uvcvideo", &["H264"]),
        ("camera_without_formats", "uvcvideo", &[]),
    ] {
        let fourccs: Vec<String> = fourccs.iter().map(ToString::to_string).collect();
        let e = vedge_runtime::source::v4l2::readable(Path::new("/dev/video0"), driver, &fourccs).unwrap_err();
        let hint = e.hint().expect("the next step");
        insta::assert_snapshot!(name, format!("exit {}\nerror: {e}\n\nhint: {hint}\n", e.exit_status()));
    }
}

#[test]
fn models_that_are_none() {
    let picture = pictures().join("rgb.png");
    refused("directory_as_model", &[work(), &picture]);
    refused("text_as_model", &[&file("model.txt", b"this is no model\n"), &picture]);
    refused("no_model", &[Path::new("/nonexistent/model.onnx"), &picture]);
    let whole = std::fs::read(model()).unwrap();
    refused("truncated_model", &[&file("truncated.onnx", &whole[..whole.len() / 3]), &picture]);
    let mut flipped = whole.clone();
    let at = whole.windows(18).position(|w| w == b"LayerNormalization").unwrap();
    flipped[at] ^= 1;
    refused("flipped_bit_in_a_name", &[&file("flipped.onnx", &flipped), &picture]);
    let mut graph = Graph::read(&model()).unwrap();
    let transpose = graph.nodes.iter_mut().find(|n| n.op_type() == "Transpose").unwrap();
    transpose.attribute[0].ints[1] = 0;
    graph.write(&work().join("perm.onnx")).unwrap();
    refused("no_permutation", &[&work().join("perm.onnx"), &picture]);
    // tract panics on this one; the answer is an error of ours, and nothing else is printed
    let mut graph = Graph::read(&model()).unwrap();
    let transpose = graph.nodes.iter_mut().find(|n| n.op_type() == "Transpose").unwrap();
    transpose.input.clear();
    graph.write(&work().join("panic.onnx")).unwrap();
    refused("the_engine_panics", &[&work().join("panic.onnx"), &picture]);
    refused("model_without_card", &[&deit(), &picture]);
    refused("card_of_another_model", &[&work().join("wrong.onnx"), &picture]);
}

#[test]
fn wrong_usage() {
    let empty: [&str; 0] = [];
    refused("no_arguments", &empty);
    refused("zero_frames", &["model.onnx", "synthetic://", "--max-frames", "0"]);
    refused("unknown_option", &["model.onnx", "synthetic://", "--topk", "3"]);
}

#[test]
fn outputs_and_rules_that_do_not_fit() {
    let model = model().to_string_lossy().into_owned();
    let short = file("token", b"short\n").to_string_lossy().into_owned();
    let with =
        |name: &str, options: &[&str]| refused(name, &[&[model.as_str(), "synthetic://32x32"], options].concat());
    with("page_for_others", &["--http", "0.0.0.0:0"]);
    with("page_for_others_without_a_token", &["--http", "0.0.0.0:0", "--http-remote"]);
    with("short_token", &["--http", "0.0.0.0:0", "--http-remote", "--http-token", &short]);
    with("user_without_password", &["--mqtt", "mqtt://cam@127.0.0.1/here"]);
    with("password_in_the_address", &["--mqtt", "mqtt://cam:secret@127.0.0.1/here"]);
    with("authorities_without_tls", &["--mqtt", "mqtt://127.0.0.1/here", "--mqtt-ca", &short]);
    with("rule_of_recordings", &["--record", &work().join("kept").to_string_lossy(), "--record-when", "p>0.5"]);
    with("no_limits_in_the_card", &["--unknown", "auto"]);
    with("no_looks_in_the_card", &["--max-distance", "3"]);
    with("threshold_of_no_label", &["--threshold", "Cat=0.5"]);
    with("region_outside", &["--region", "0,0,64x64"]);
    with("turned_by_little", &["--rotate", "45"]);
}

#[test]
fn max_frames_ends_an_endless_source() {
    let output =
        vedge_run(&[model().as_os_str(), "synthetic://32x32".as_ref()]).args(["--max-frames", "3"]).output().unwrap();
    assert!(output.status.success(), "{}", told(&output));
    let lines = lines(&output.stdout);
    assert_eq!(lines.iter().map(|l| l["seq"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2]);
    assert!(lines[0].get("source").is_none());
}

#[test]
fn latencies_are_reported_every_so_often() {
    let output = vedge_run(&[model().as_os_str(), "synthetic://32x32?fps=50".as_ref()])
        .args(["--max-frames", "120", "--report", "1"])
        .output()
        .unwrap();
    let told = told(&output);
    let reports: Vec<&str> = told.lines().filter(|l| l.contains("latency p50 ") && l.contains(" p99 ")).collect();
    assert!(output.status.success() && reports.len() >= 2 && reports[0].contains(" frames in 1 s"), "{told}");
}

/// Starts an endless run and waits for its second line.
fn streaming() -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = vedge_run(&[model().as_os_str(), "synthetic://32x32?fps=100".as_ref()]).spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    for _ in 0..2 {
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        serde_json::from_str::<Value>(&line).unwrap();
    }
    (child, out)
}

fn end(child: Child) -> Output {
    let id = child.id();
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || send.send(child.wait_with_output()));
    receive.recv_timeout(Duration::from_secs(20)).unwrap_or_else(|_| panic!("process {id} does not end")).unwrap()
}

#[test]
fn signals_end_it_cleanly() {
    for signal in ["-INT", "-TERM"] {
        let (child, mut out) = streaming();
        let start = Instant::now();
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        let mut rest = vec![];
        out.read_to_end(&mut rest).unwrap();
        lines(&rest); // the last line is whole
        let output = end(child);
        assert_eq!(output.status.code(), Some(0), "{signal}: {}", told(&output));
        assert!(String::from_utf8_lossy(&output.stderr).contains(" frames in "), "{}", told(&output));
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}

#[test]
fn a_reader_that_goes_away_ends_it_cleanly() {
    let (child, out) = streaming();
    drop(out);
    let output = end(child);
    assert_eq!(output.status.code(), Some(0), "{}", told(&output));
    assert!(!String::from_utf8_lossy(&output.stderr).contains("error"), "{}", told(&output));
}

#[test]
fn a_full_standard_output_is_an_error_that_is_told() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = vedge_run(&[model().as_os_str(), "synthetic://32x32?fps=100".as_ref()]);
    let output = end(command.stdout(full).spawn().unwrap());
    let stderr = told(&output);
    assert!(
        stderr.starts_with("exit 1\n") && stderr.contains("standard output") && stderr.contains("space"),
        "{stderr}"
    );
}

#[test]
fn a_program_that_gives_frames_is_started_again_when_it_ends() {
    let jpeg = repository().join("tests/reference/pictures/standard_tables.jpg");
    let source = format!("exec:cat {}; sleep 0.1", jpeg.display());
    let output =
        vedge_run(&[&model().to_string_lossy(), source.as_str()]).args(["--max-frames", "2"]).output().unwrap();
    let stderr = told(&output);
    assert!(output.status.success() && lines(&output.stdout).len() == 2, "{stderr}");
    assert!(stderr.contains("ended (exit status: 0); trying again") && stderr.contains(", again"), "{stderr}");
}

#[test]
fn empty_frames_are_counted_and_passed_over() {
    let jpeg = repository().join("tests/reference/pictures/standard_tables.jpg");
    let empty = r"printf '\377\330\377\331'; sleep 0.1";
    let source = format!("exec:while :; do {empty}; cat {}; sleep 0.1; done", jpeg.display());
    let output =
        vedge_run(&[&model().to_string_lossy(), source.as_str()]).args(["--max-frames", "3"]).output().unwrap();
    let answers = lines(&output.stdout);
    assert!(output.status.success() && answers.len() == 3, "{}", told(&output));
    let dropped: u64 = answers.iter().map(|a| a["dropped"].as_u64().unwrap()).sum();
    assert!(dropped >= 3 && told(&output).contains("warning: skipped: "), "{dropped}: {}", told(&output));
    // a program that writes nothing at all is one that ended
    let output = vedge_run(&[&model().to_string_lossy(), "exec:?format=GREY&size=8x8 :"])
        .args(["--on-failure", "end"])
        .output()
        .unwrap();
    assert!(output.status.code() == Some(1) && told(&output).contains("ended (exit status: 0)"), "{}", told(&output));
}

/// On a small disk of its own, mounted at `$DISK`; skipped where users may not mount.
#[test]
fn a_disk_that_fills_up_while_recording_stops_nothing_and_costs_nothing() {
    let disk = work().join("disk");
    std::fs::create_dir_all(&disk).unwrap();
    let script = r#"
        mount -t tmpfs -o size=64k vedge "$DISK" 2>/dev/null || exit 77
        echo mine >"$DISK/other"
        "$@" --record "$DISK" --record-when change --smooth 0 >"$DISK.out" 2>"$DISK.err" &
        until grep -q 'not kept' "$DISK.err"; do sleep 0.1; kill -0 $! || exit 3; done
        sleep 1; ls "$DISK" >"$DISK.before"; lines=$(wc -l <"$DISK.out")
        sleep 1; ls "$DISK" >"$DISK.after"; [ $(wc -l <"$DISK.out") -gt $lines ] || exit 4
        rm "$DISK"/vedge-*0.*
        until grep -q 'kept again' "$DISK.err"; do sleep 0.1; kill -0 $! || exit 5; done
        kill $!; wait $! || exit 6
        cat "$DISK.err" >&2; cat "$DISK/other"; ls -A "$DISK" | grep -v vedge-; ls "$DISK" | grep -c vedge-
        cmp "$DISK.before" "$DISK.after"
    "#;
    let source = format!("file://{}/?fps=50&repeat=yes", repository().join("models/fashion/test").display());
    let ended = Command::new("timeout")
        .args([
            "60",
            "unshare",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            script,
            "sh",
            env!("CARGO_BIN_EXE_vedge-run"),
        ])
        .args([model().as_os_str(), source.as_ref()])
        .env("DISK", &disk)
        .output()
        .unwrap();
    if ended.status.code() == Some(77) || ended.stderr.starts_with(b"unshare") {
        return println!("skipped: this machine lets its users mount nothing");
    }
    let (told, out) = (told(&ended), String::from_utf8_lossy(&ended.stdout));
    assert!(ended.status.success() && out.starts_with("mine\nother\n"), "{out}{told}");
    // told when it begins and when it ends, not for each frame; counted; what was kept before is there whole, in pairs
    let (full, again) =
        (told.matches("warning: a frame is not kept: cannot write").count(), told.matches("kept again").count());
    assert!(again >= 1 && (again..=again + 1).contains(&full), "{told}");
    assert!(told.contains("No space left") && told.contains(" frames not kept because"), "{told}");
    let kept: usize = out.lines().nth(2).unwrap().parse().unwrap();
    assert!(kept >= 4 && kept.is_multiple_of(2), "{out}");
}

/// Gives a frame, then waits for a driver that never comes back.
struct Hanging(u32);

impl FrameSource for Hanging {
    fn next(&mut self) -> vedge_runtime::Result<Option<Frame>> {
        self.0 += 1;
        if self.0 > 1 {
            std::thread::sleep(Duration::from_secs(3600));
        }
        let rgb = vec![100; 3 * 64 * 64];
        let picture = Pixels::Picture(Picture { width: 64, height: 64, rgb });
        Ok(Some(Frame::taken(picture, Instant::now(), Duration::ZERO)))
    }

    fn describe(&self) -> String {
        "a driver that hangs".into()
    }

    fn is_live(&self) -> bool {
        true
    }

    fn patience(&self) -> Duration {
        Duration::from_millis(500)
    }
}

/// Counts signs of life; ends the run some time after it was told that a thread hangs.
#[derive(Default)]
struct Signs {
    before: u32,
    after: u32,
    told: Vec<&'static str>,
    stop: Arc<AtomicBool>,
}

impl pipeline::Watcher for Signs {
    fn notice(&mut self, notice: pipeline::Notice) {
        if let pipeline::Notice::Hangs(thread) = notice {
            self.told.push(thread);
            let stop = Arc::clone(&self.stop);
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(500));
                stop.store(true, std::sync::atomic::Ordering::Relaxed);
            });
        }
    }

    fn alive(&mut self, _: u64) {
        if self.told.is_empty() { self.before += 1 } else { self.after += 1 }
    }
}

/// A watchdog that is answered although no frame can come ever again would be of no use. (A camera that is lost and looked
/// for is another matter: `a_service_without_a_camera_has_started_and_says_why_it_waits`.)
#[test]
fn a_capture_thread_that_hangs_ends_the_signs_of_life() {
    let mut model = Model::new(Session::load(&model(), &Options::default()).unwrap()).unwrap();
    let (options, totals, mut signs) = (pipeline::Options::default(), Totals::default(), Signs::default());
    let stop = Arc::clone(&signs.stop);
    pipeline::run(&mut model, Box::new(Hanging(0)), vec![], &options, &totals, &stop, &mut signs).unwrap();
    assert_eq!((signs.told.as_slice(), signs.after), (&["capture"][..], 0));
    assert!(signs.before > 3, "{}", signs.before);
}

/// Does not outlive its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the service manager is told until something fits; the socket stands for systemd's.
fn told_manager(socket: &std::os::unix::net::UnixDatagram, wanted: &str) -> Vec<String> {
    let mut told = vec![];
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(20) && !told.iter().any(|t: &String| t.starts_with(wanted)) {
        let mut buffer = [0; 1000];
        if let Ok(n) = socket.recv(&mut buffer) {
            told.push(String::from_utf8_lossy(&buffer[..n]).into_owned());
        }
    }
    told
}

#[test]
fn a_service_without_a_camera_has_started_and_says_why_it_waits() {
    let place = work().join("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&place).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut command = vedge_run(&[model().to_str().unwrap(), "/dev/video-none", "--wait"]);
    command.env("NOTIFY_SOCKET", &place).env("WATCHDOG_USEC", "200000").stdout(Stdio::null()).stderr(Stdio::piped());
    let mut running = Running(command.spawn().unwrap());
    let child = &mut running.0;
    let told = told_manager(&socket, "WATCHDOG=1");
    let ready = told.iter().position(|t| t == "READY=1");
    let status = told.iter().find(|t| t.starts_with("STATUS=no frames: cannot open camera /dev/video-none"));
    assert!(ready.is_some() && status.is_some() && told.contains(&"WATCHDOG=1".into()), "{told:?}");
    // a process that is stopped tells nothing: the manager would start it again
    kill(child, "STOP");
    socket.set_nonblocking(true).unwrap();
    while socket.recv(&mut [0; 1000]).is_ok() {}
    socket.set_nonblocking(false).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    assert!(socket.recv(&mut [0; 1000]).is_err());
    kill(child, "CONT");
    assert!(told_manager(&socket, "WATCHDOG=1").contains(&"WATCHDOG=1".into()));
    kill(child, "TERM");
    assert!(told_manager(&socket, "STOPPING=1").contains(&"STOPPING=1".into()));
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(child.wait().unwrap().success(), "{text}");
    assert!(text.contains("warning: cannot open camera /dev/video-none") && text.contains("trying again"), "{text}");
}

fn kill(child: &Child, signal: &str) {
    let arguments = [format!("-{signal}"), child.id().to_string()];
    assert!(Command::new("kill").args(arguments).status().unwrap().success());
}

#[test]
fn infer_runs_every_row() {
    let rows = ndarray::ArrayD::from_shape_fn(ndarray::IxDyn(&[3, 3, 64, 64]), |i| {
        ((i[0] * 31 + i[1] * 17 + i[2] * 7 + i[3]) % 13) as f32 / 6.0 - 1.0
    });
    let (x, y) = (work().join("x.npy"), work().join("y.npy"));
    vedge_runtime::npy::write(&x, &rows).unwrap();
    let infer = |x: &Path| {
        let mut command = vedge_run(&["infer"]);
        command.arg(deit()).arg("--input").arg(x).arg("--output").arg(&y).output().unwrap()
    };
    let output = infer(&x);
    assert!(output.status.success(), "{}", told(&output));
    let got = vedge_runtime::npy::read(&y).unwrap();
    assert_eq!(got.shape(), [3, 10]);
    let mut session = Session::load(&deit(), &Options::default()).unwrap();
    for row in 0..3 {
        let one = rows.slice_axis(ndarray::Axis(0), (row..row + 1).into()).to_owned();
        let want = &session.run(&[one]).unwrap()[0];
        for (a, b) in got.index_axis(ndarray::Axis(0), row).iter().zip(want) {
            assert!((a - b).abs() <= 1e-4, "row {row}: {a} {b}");
        }
    }

    std::fs::remove_file(&y).unwrap();
    let small = ndarray::ArrayD::<f32>::zeros(ndarray::IxDyn(&[1, 3, 32, 32]));
    vedge_runtime::npy::write(&work().join("small.npy"), &small).unwrap();
    insta::assert_snapshot!("infer_wrong_shape", told(&infer(&work().join("small.npy"))));
    insta::assert_snapshot!("infer_no_npy", told(&infer(&file("text.npy", b"text"))));
    assert!(!y.exists());
}

#[test]
fn bench_and_doctor_tell_json() {
    let output = vedge_run(&["bench"])
        .arg(deit())
        .args(["--runs", "3", "--warmup", "1", "--threads", "1", "--json"])
        .output()
        .unwrap();
    let r: Value = serde_json::from_slice(&output.stdout).unwrap();
    let n = |k: &str| r[k].as_f64().unwrap_or_else(|| panic!("{k} in {r}"));
    assert!(0.0 < n("min_ms") && n("min_ms") <= n("median_ms") && n("median_ms") <= n("p99_ms"), "{r}");
    assert!(n("load_ms") < n("first_result_ms") && n("peak_memory_mib") > 1.0 && n("runs") == 3.0, "{r}");

    let output = vedge_run(&["doctor"]).arg(model()).arg("--json").output().unwrap();
    let findings: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let test = findings.iter().find(|f| f["check"] == "self-test").unwrap();
    assert!(test["verdict"] == "ok" && test["found"].as_str().unwrap().contains("top-1 same"), "{test}");
    assert!(output.status.success(), "{}", told(&output));
    assert!(findings.iter().all(|f| f["verdict"] == "ok" || f["remedy"] != ""), "{findings:?}");

    let output = vedge_run(&["doctor"]).arg(file("none.onnx", b"none")).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn cameras_without_a_camera_is_no_failure() {
    let output = vedge_run(&["cameras", "--json"]).output().unwrap();
    assert!(output.status.success());
    assert!(serde_json::from_slice::<Vec<Value>>(&output.stdout).is_ok());
}
