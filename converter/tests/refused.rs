//! What the workstation's program says to bad input, and what it leaves behind: nothing.
#![allow(missing_docs)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::Duration;
use vedge_runtime::onnx::proto::{StringStringEntryProto, tensor_proto::DataLocation};
use vedge_runtime::onnx::{Graph, NodeProto};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

fn deit() -> PathBuf {
    repository().join("models/deit_nano.onnx")
}

/// A folder for the whole test program.
fn work() -> &'static Path {
    static DIR: OnceLock<tempfile::TempDir> = OnceLock::new();
    DIR.get_or_init(|| tempfile::tempdir().unwrap()).path()
}

fn folder(name: &str) -> PathBuf {
    let path = work().join(name);
    fs::create_dir_all(&path).unwrap();
    path
}

fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = work().join(name);
    fs::write(&path, bytes).unwrap();
    path
}

/// The shipped model, changed.
fn changed(name: &str, change: impl FnOnce(&mut Graph)) -> PathBuf {
    let mut graph = Graph::read(&deit()).unwrap();
    change(&mut graph);
    let path = work().join(name);
    graph.write(&path).unwrap();
    path
}

fn vedge(arguments: &[&dyn AsRef<std::ffi::OsStr>]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vedge"));
    command.args(arguments.iter().map(|a| a.as_ref()));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Exit status and standard error, with the paths that differ from machine to machine replaced.
fn told(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr)
        .replace(&*work().to_string_lossy(), "[WORK]")
        .replace(&*repository().to_string_lossy(), "[REPOSITORY]");
    format!("exit {}\n{stderr}", output.status.code().map_or("by signal".into(), |c| c.to_string()))
}

/// Every file below a folder with its bytes.
fn contents(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = vec![];
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() && !path.is_symlink() {
            true => all.extend(contents(&path)),
            false => all.push((path.clone(), fs::read(&path).unwrap_or_default())),
        }
    }
    all.sort();
    all
}

/// Runs with arguments that must fail, print nothing to standard output, change no file of `out`, and say what the
/// snapshot holds.
fn refused_in(out: &Path, name: &str, arguments: &[&dyn AsRef<std::ffi::OsStr>]) {
    let before = contents(out);
    let output = vedge(arguments).output().unwrap();
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    assert!(matches!(output.status.code(), Some(1 | 2)), "{}", told(&output));
    insta::assert_snapshot!(name, told(&output));
    assert_eq!(before, contents(out), "{name}: files changed");
}

/// `vedge convert MODEL -o [WORK]/out-NAME/model.onnx OPTIONS`, refused; a model that is there already stays.
fn convert_refused(name: &str, model: &Path, options: &[&str]) {
    let out = folder(&format!("out-{name}"));
    let output = out.join("model.onnx");
    fs::write(&output, "what was there").unwrap();
    let mut arguments: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"convert", &model, &"-o", &output];
    arguments.extend(options.iter().map(|o| o as &dyn AsRef<std::ffi::OsStr>));
    refused_in(&out, name, &arguments);
}

const FLOAT: [&str; 4] = ["--precision", "fp32", "--preprocess", "half"];

#[test]
fn damaged_models() {
    let whole = fs::read(deit()).unwrap();
    let cut = file("truncated.onnx", &whole[..whole.len() / 3]);
    convert_refused("truncated_model", &cut, &FLOAT);
    refused_in(&folder("none"), "inspect_truncated_model", &[&"inspect", &cut]);
    let mut flipped = whole.clone();
    let at = whole.windows(18).position(|w| w == b"LayerNormalization").unwrap();
    flipped[at] ^= 1;
    convert_refused("flipped_bit_in_a_name", &file("flipped.onnx", &flipped), &FLOAT);
    let mut flipped = whole.clone();
    flipped[1] ^= 1 << 7;
    convert_refused("flipped_bit_in_the_header", &file("flipped.onnx", &flipped), &FLOAT);
    convert_refused("empty_model", &file("empty.onnx", b""), &FLOAT);
    convert_refused("text_as_model", &file("model.txt", b"this is no model\n"), &FLOAT);
    convert_refused("no_model", Path::new("/nonexistent/model.onnx"), &FLOAT);
    convert_refused("directory_as_model", &folder("a folder"), &FLOAT);
    let model = changed("external.onnx", |g| {
        let t = g.initializers.values_mut().find(|t| t.dims.len() == 2).unwrap();
        t.raw_data = None;
        t.data_location = Some(DataLocation::External as i32);
        t.external_data =
            vec![StringStringEntryProto { key: Some("location".into()), value: Some("model.onnx.data".into()) }];
    });
    convert_refused("external_data_missing", &model, &FLOAT);
}

/// The shipped model with an operator that nobody knows before its output.
fn odd() -> PathBuf {
    changed("odd.onnx", |g| {
        let output = g.outputs[0].name().to_string();
        let last = g.nodes.iter_mut().find(|n| n.output.contains(&output)).unwrap();
        last.output[0] = "before".into();
        let node =
            NodeProto { name: Some("/head/odd".into()), ..NodeProto::of("Wobble", &["before"], &[&output], vec![]) };
        g.nodes.push(node);
    })
}

/// What can run is shown beside what cannot.
#[test]
fn inspect_shows_operators_that_are_not_supported() {
    let output = vedge(&[&"inspect", &odd()]).output().unwrap();
    let table = String::from_utf8_lossy(&output.stdout);
    insta::assert_snapshot!(
        "inspect_unsupported_operator",
        told(&output) + &table[table.find("how it runs").unwrap()..]
    );

    let output = vedge(&[&"inspect", &odd(), &"--json"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["runs"]["Wobble"]["unsupported"], 1);
    assert_eq!(report["runs"]["linear"]["unsupported"], 0);
    assert!(report["runs"]["linear"]["fused"].as_u64().unwrap() > 8, "{}", report["runs"]);
    assert_eq!(report["unsupported"][0]["name"], "/head/odd");
    assert!(report["refused"].as_str().unwrap().contains("Wobble (1)"));

    // A control: the shipped model runs.
    let output = vedge(&[&"inspect", &deit(), &"--json"]).output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(output.status.success() && report.get("refused").is_none());
}

#[test]
fn operators_that_are_not_supported() {
    let model = odd();
    convert_refused("unsupported_operator", &model, &FLOAT);
    // A control: unchanged, the same conversion works.
    let out = folder("control").join("model.onnx");
    let output = vedge(&[&"convert", &deit(), &"-o", &out]).args(FLOAT).output().unwrap();
    assert!(output.status.success() && out.is_file(), "{}", told(&output));
}

#[test]
fn calibration_pictures_that_are_none() {
    let calib = |name: &str| folder(name).to_string_lossy().into_owned();
    let convert = |name: &str, dir: &str| {
        convert_refused(name, &deit(), &["--preset", "portable", "--preprocess", "half", "--calib", dir]);
    };
    convert("empty_calibration", &calib("empty"));
    folder("no pictures/cat");
    convert("calibration_without_pictures", &calib("no pictures"));
    file("loose.png", b"");
    fs::copy(repository().join("tests/reference/pictures/rgb.png"), folder("loose").join("a.png")).unwrap();
    convert("calibration_without_classes", &calib("loose"));
    fs::write(folder("text/cat").join("notes.jpg"), "these are notes, no picture\n").unwrap();
    convert("text_in_calibration", &calib("text"));
    convert("no_calibration_folder", "/nonexistent");
    convert_refused("int8_without_calibration", &deit(), &["--preset", "portable", "--preprocess", "half"]);
}

#[test]
fn settings_that_do_not_fit() {
    convert_refused("size_off_the_grid", &deit(), &[&FLOAT[..], &["--size", "60x100"]].concat());
    let mobilevit = repository().join("models/mobilevit_nano.onnx");
    convert_refused("size_between_patches", &mobilevit, &[&FLOAT[..], &["--size", "65"]].concat());
    convert_refused("size_of_no_number", &deit(), &[&FLOAT[..], &["--size", "large"]].concat());
    convert_refused("unknown_preprocess", &deit(), &["--precision", "fp32", "--preprocess", "imagnet"]);
    let calib = repository().join("models/fashion/calibration").to_string_lossy().into_owned();
    let calib = [&FLOAT[..], &["--calib", &calib, "--calib-count", "4"]].concat();
    convert_refused("pruning_without_pictures", &deit(), &[&FLOAT[..], &["--prune-mlp", "20"]].concat());
    convert_refused("pruning_everything", &deit(), &[&calib[..], &["--prune-heads", "100"]].concat());
    convert_refused("repair_without_pruning", &deit(), &[&calib[..], &["--no-repair"]].concat());
    convert_refused("auto_without_pictures", &deit(), &["--precision", "auto", "--preprocess", "half"]);
    convert_refused("report_without_pictures", &deit(), &[&FLOAT[..], &["--report", "report.html"]].concat());
    convert_refused("report_of_no_form", &deit(), &[&calib[..], &["--report", "report.txt"]].concat());
    convert_refused(
        "keep_float_of_nothing",
        &mobilevit,
        &["--preset", "cpu", "--preprocess", "half", "--keep-float", "/stem/cov"],
    );
    convert_refused("no_preprocess", &deit(), &["--precision", "fp32"]);
    let labels = file("labels.txt", b"cat\ndog\n").to_string_lossy().into_owned();
    convert_refused("labels_of_another_model", &deit(), &[&FLOAT[..], &["--labels", &labels]].concat());
}

#[test]
fn outputs_that_cannot_be_written() {
    let convert = |name: &str, out: &Path, output: &Path| {
        refused_in(out, name, &[&"convert", &deit(), &"-o", &output, &FLOAT[0], &FLOAT[1], &FLOAT[2], &FLOAT[3]]);
    };
    let out = folder("outputs");
    convert("output_is_a_directory", &out, &out);
    convert("output_folder_missing", &out, &out.join("none/model.onnx"));
    let _socket = std::os::unix::net::UnixListener::bind(out.join("socket")).unwrap();
    convert("output_is_no_regular_file", &out, &out.join("socket"));

    let source = folder("source");
    let model = source.join("model.onnx");
    fs::copy(deit(), &model).unwrap();
    std::os::unix::fs::symlink("model.onnx", source.join("link.onnx")).unwrap();
    for (name, output) in [("output_is_the_source", "model.onnx"), ("output_leads_to_the_source", "link.onnx")] {
        refused_in(&source, name, &[&"convert", &model, &"-o", &source.join(output), &"--precision", &"fp32"]);
    }
}

/// Runs `vedge convert` onto `[WORK]/NAME/old.onnx` after mounting something there, as root of a user namespace of
/// its own; says so and returns nothing where the machine does not allow that. The script gets the folder as `$1`.
fn on_a_mount(name: &str, mount: &str) -> Option<String> {
    let out = folder(name);
    let script = format!(
        "{{ {mount}; }} 2> /dev/null || exit 77
        shift; \"$@\"; code=$?; ls -A {out}; cat {out}/old.onnx; exit $code",
        out = out.display()
    );
    let output = Command::new("unshare")
        .args(["--map-root-user", "--mount", "sh", "-c", &script, "sh"])
        .args([out.as_os_str(), env!("CARGO_BIN_EXE_vedge").as_ref(), "convert".as_ref(), deit().as_ref()])
        .args(["-o".as_ref(), out.join("old.onnx").as_os_str()])
        .args(FLOAT)
        .output();
    match output {
        Ok(o) if o.status.code() != Some(77) && !o.stderr.starts_with(b"unshare") => {
            Some(told(&o) + &String::from_utf8_lossy(&o.stdout))
        }
        _ => {
            println!("skipped: this machine lets its users mount nothing");
            None
        }
    }
}

#[test]
fn a_full_disk() {
    if let Some(told) = on_a_mount("disk", "mount -t tmpfs -o size=1m vedge \"$1\" && echo kept > \"$1/old.onnx\"") {
        insta::assert_snapshot!("full_disk", told);
    }
}

#[test]
fn a_folder_that_is_read_only() {
    let mount = "echo kept > \"$1/old.onnx\" && mount --bind \"$1\" \"$1\" && mount -o remount,bind,ro \"$1\"";
    if let Some(told) = on_a_mount("read-only", mount) {
        insta::assert_snapshot!("read_only_folder", told);
    }
}

/// A limit on the size of files stops the write in its middle, on every machine.
#[test]
fn a_write_that_ends_halfway() {
    let out = folder("limit");
    let output = out.join("model.onnx");
    fs::write(&output, "what was there").unwrap();
    let script = "trap '' XFSZ; ulimit -f 1000; exec \"$@\"";
    let ended = Command::new("sh")
        .args(["-c", script, "sh", env!("CARGO_BIN_EXE_vedge"), "convert"])
        .args([&deit(), Path::new("-o"), &output])
        .args(FLOAT)
        .output()
        .unwrap();
    insta::assert_snapshot!("file_too_large", told(&ended));
    assert_eq!(contents(&out), [(output, b"what was there".to_vec())]);
}

/// Interrupted at many moments: the old model or the new one, nothing beside it.
#[test]
fn interrupted_conversions_leave_nothing_behind() {
    let out = folder("interrupted");
    let output = out.join("model.onnx");
    let mut interrupted = 0;
    for round in 0..24 {
        fs::write(&output, "what was there").unwrap();
        let mut child = vedge(&[&"convert", &deit(), &"-o", &output]).args(FLOAT).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(10 + 10 * round));
        let signal = if round % 2 == 0 { "-INT" } else { "-TERM" };
        // It may have ended already.
        let _ = Command::new("kill").args([signal, &child.id().to_string()]).stderr(Stdio::null()).status().unwrap();
        let status = child.wait().unwrap();
        assert_eq!(fs::read_dir(&out).unwrap().count(), 1, "round {round}: {:?}", contents(&out));
        if !status.success() {
            interrupted += 1;
        } else {
            Graph::read(&output).unwrap();
        }
        let bytes = fs::read(&output).unwrap();
        assert!(bytes == b"what was there" || bytes.len() > 1_000_000, "round {round}: {} bytes", bytes.len());
    }
    assert!(interrupted > 0, "none was interrupted: the test tests nothing");
}
