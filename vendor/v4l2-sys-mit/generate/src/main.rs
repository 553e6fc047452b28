//! Writes the bindings: `cargo run -- OUT.rs CLANG_ARGUMENT…` (see ../README.md).

fn main() {
    let mut arguments = std::env::args().skip(1);
    let out = arguments.next().expect("usage: generate OUT.rs CLANG_ARGUMENT…");
    bindgen::Builder::default()
        .header_contents("wrapper.h", "#include <linux/videodev2.h>")
        .clang_args(arguments)
        .layout_tests(false)
        .allowlist_file(".*/linux/videodev2.h")
        .allowlist_file(".*/linux/v4l2-common.h")
        .allowlist_file(".*/linux/v4l2-controls.h")
        // the v4l crate names these itself
        .allowlist_type("time_t|suseconds_t|__suseconds_t")
        .generate()
        .expect("bindgen")
        .write_to_file(&out)
        .expect("write");
}
