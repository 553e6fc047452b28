//! Raw Video4Linux2 bindings with the interface of the published `v4l2-sys-mit` 0.3.0, but generated beforehand.
#![allow(clippy::all, non_camel_case_types, non_snake_case, non_upper_case_globals, missing_docs)]

include!("bindings.rs");

// The kernel tells ioctls apart by the size of their argument, so these sizes are the interface.
const _: () = {
    let wide = size_of::<usize>() == 8;
    assert!(size_of::<v4l2_capability>() == 104);
    assert!(size_of::<v4l2_fmtdesc>() == 64);
    assert!(size_of::<v4l2_frmsizeenum>() == 44);
    assert!(size_of::<v4l2_frmivalenum>() == 52);
    assert!(size_of::<v4l2_requestbuffers>() == 20);
    assert!(size_of::<v4l2_streamparm>() == 204);
    assert!(size_of::<v4l2_format>() == if wide { 208 } else { 204 });
    assert!(size_of::<v4l2_buffer>() == if wide { 88 } else { 68 });
};
