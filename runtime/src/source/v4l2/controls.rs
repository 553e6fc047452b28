//! A camera's controls: exposure, gain, white balance.

use super::device::{Device, Plain, text};
use crate::error::{Error, Result};
use std::path::Path;
use v4l::v4l_sys::*;
use v4l::v4l2::vidioc;

/// One control.
struct Control {
    /// As `v4l2-ctl -l` writes it: `auto_exposure`.
    name: String,
    description: v4l2_queryctrl,
}

impl Control {
    fn is_menu(&self) -> bool {
        let kinds = [v4l2_ctrl_type_V4L2_CTRL_TYPE_MENU, v4l2_ctrl_type_V4L2_CTRL_TYPE_INTEGER_MENU];
        kinds.contains(&self.description.type_)
    }

    /// Whether it holds one number.
    fn is_settable(&self) -> bool {
        let numbers = [
            v4l2_ctrl_type_V4L2_CTRL_TYPE_INTEGER,
            v4l2_ctrl_type_V4L2_CTRL_TYPE_BOOLEAN,
            v4l2_ctrl_type_V4L2_CTRL_TYPE_BITMASK,
        ];
        let closed = V4L2_CTRL_FLAG_DISABLED | V4L2_CTRL_FLAG_READ_ONLY;
        self.description.flags & closed == 0 && (self.is_menu() || numbers.contains(&self.description.type_))
    }
}

/// Sets controls by name, in their order.
///
/// # Errors
/// [`Error::Source`] when the camera has no such control, the value does not fit, or the driver keeps another one.
pub fn set(path: &Path, device: &Device, wanted: &[(String, String)]) -> Result<()> {
    if wanted.is_empty() {
        return Ok(());
    }
    let controls = list(device);
    let refused = |what: String, hint: String| Error::Source { what: format!("{}: {what}", path.display()), hint };
    for (name, value) in wanted {
        let Some(control) = controls.iter().find(|c| c.name == *name && c.is_settable()) else {
            let names: Vec<&str> = controls.iter().filter(|c| c.is_settable()).map(|c| c.name.as_str()).collect();
            let has = if names.is_empty() { "none".into() } else { names.join(", ") };
            return Err(refused(format!("has no control `{name}` that can be set"), format!("it has {has}")));
        };
        let range = valid(device, control);
        let parsed = value.parse().ok().or_else(|| entry(device, control, value));
        // drivers take the nearest value without a word
        let d = &control.description;
        let Some(number) = parsed.filter(|n| (d.minimum..=d.maximum).contains(n)) else {
            return Err(refused(format!("control {name}: `{value}` is not a value of it"), range));
        };
        let mut set = v4l2_control { id: control.description.id, value: number };
        device
            .call(vidioc::VIDIOC_S_CTRL, &mut set)
            .map_err(|e| refused(format!("control {name}: cannot be set to {value}: {e}"), range.clone()))?;
        let mut now = v4l2_control { id: control.description.id, value: 0 };
        let read = device.call(vidioc::VIDIOC_G_CTRL, &mut now).is_ok();
        if read && now.value != number && control.description.flags & V4L2_CTRL_FLAG_VOLATILE == 0 {
            return Err(refused(format!("control {name}: asked for {value}, the driver sets {}", now.value), range));
        }
    }
    Ok(())
}

fn list(device: &Device) -> Vec<Control> {
    let mut found: Vec<Control> = vec![];
    let mut id = 0;
    while found.len() < 512 {
        let mut description = v4l2_queryctrl { id: id | V4L2_CTRL_FLAG_NEXT_CTRL, ..v4l2_queryctrl::zeroed() };
        if device.call(vidioc::VIDIOC_QUERYCTRL, &mut description).is_err() || description.id <= id {
            break;
        }
        id = description.id;
        found.push(Control { name: plain(&text(&description.name)), description });
    }
    found
}

/// `Exposure, Auto` as `exposure_auto`.
fn plain(name: &str) -> String {
    let words = name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|w| !w.is_empty());
    words.collect::<Vec<_>>().join("_").to_ascii_lowercase()
}

/// A menu's entries by index.
fn menu(device: &Device, control: &Control) -> Vec<(i32, String)> {
    let d = &control.description;
    let entry = |index: i32| {
        let mut m = v4l2_querymenu { id: d.id, index: index as u32, ..v4l2_querymenu::zeroed() };
        device.call(vidioc::VIDIOC_QUERYMENU, &mut m).ok()?;
        // SAFETY: the control's type says which variant the driver writes.
        let name = unsafe {
            if d.type_ == v4l2_ctrl_type_V4L2_CTRL_TYPE_MENU {
                text(&{ m.__bindgen_anon_1.name })
            } else {
                let value = m.__bindgen_anon_1.value;
                value.to_string()
            }
        };
        Some((index, name))
    };
    (d.minimum.max(0)..=d.maximum.min(255)).filter_map(entry).collect()
}

/// The index of a menu's entry, by name.
fn entry(device: &Device, control: &Control, value: &str) -> Option<i32> {
    let entries = if control.is_menu() { menu(device, control) } else { vec![] };
    entries.into_iter().find(|(_, name)| plain(name) == plain(value)).map(|(index, _)| index)
}

fn valid(device: &Device, control: &Control) -> String {
    let d = &control.description;
    if control.is_menu() {
        let entries: Vec<String> = menu(device, control).into_iter().map(|(i, name)| format!("{i} ({name})")).collect();
        return format!("its values are {}", entries.join(", "));
    }
    format!("its values are {}…{} in steps of {}", d.minimum, d.maximum, d.step)
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_are_those_of_v4l2_ctl() {
        assert_eq!(super::plain("Exposure, Auto"), "exposure_auto");
        assert_eq!(super::plain("White Balance Temperature, Auto"), "white_balance_temperature_auto");
        assert_eq!(super::plain("Gain"), "gain");
    }
}
