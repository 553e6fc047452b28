//! Panics of libraries become errors: tract panics on some graphs that it does not expect.
//!
//! What is shipped to boards is built without unwinding, which makes it a sixth smaller. There a panic cannot be caught:
//! it ends the program, with the message that the error would have had.

use std::borrow::Cow;
use std::cell::RefCell;
use std::io::Write;
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local! {
    static DOING: RefCell<Option<Cow<'static, str>>> = const { RefCell::new(None) };
}

/// Runs `f`, which does what `doing` says. If it panics, its message is returned and nothing is printed, or, in a program
/// without unwinding, the message is printed and the program ends with status 1. Panics elsewhere are reported as ever.
///
/// # Errors
/// The panic's message.
pub fn caught<T>(doing: impl Into<Cow<'static, str>>, f: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let previous = take_hook();
        set_hook(Box::new(move |info| match DOING.take() {
            Some(doing) if cfg!(panic = "abort") => end(&doing, info),
            Some(_) => {}
            None => previous(info),
        }));
    });
    let outer = DOING.replace(Some(doing.into()));
    let result = catch_unwind(AssertUnwindSafe(f));
    DOING.set(outer);
    result.map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or(UNTOLD).to_string()
    })
}

const UNTOLD: &str = "no reason given";

fn end(doing: &str, info: &PanicHookInfo) -> ! {
    // As `eprintln!`, which would panic where standard error is closed.
    let _ = writeln!(std::io::stderr(), "error: {doing} failed: {}", info.payload_as_str().unwrap_or(UNTOLD));
    std::process::exit(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_panic_becomes_an_error() {
        assert_eq!(caught("adding", || 1 + 1), Ok(2));
        let inner = || caught("the inner one", || panic!("of {}", 7)).map(|()| 0).unwrap_err();
        assert_eq!(caught("the outer one", inner), Ok("of 7".into()));
        assert_eq!(caught("late", || panic!("fixed")), Err::<(), _>("fixed".into()));
    }

    /// What a program without unwinding does, in a process of its own.
    #[test]
    fn without_unwinding_a_panic_ends_the_program_with_its_message() {
        const CHILD: &str = "VEDGE_TEST_ENDS";
        if std::env::var_os(CHILD).is_some() {
            set_hook(Box::new(|info| end("operator Foo (node `x`)", info)));
            panic!("index {} out of range", 3);
        }
        let name = "guard::tests::without_unwinding_a_panic_ends_the_program_with_its_message";
        let me = std::env::current_exe().unwrap();
        let done = match Command::new(me).args([name, "--exact", "--nocapture"]).env(CHILD, "1").output() {
            // An emulator runs this test, which cannot start another program of its kind.
            Err(_) if cfg!(target_arch = "aarch64") => return,
            done => done.unwrap(),
        };
        let told = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(1), "{told}");
        assert!(told.contains("error: operator Foo (node `x`) failed: index 3 out of range\n"), "{told}");
    }
}
