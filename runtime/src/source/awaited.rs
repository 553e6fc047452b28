//! A camera that is not there yet.

use super::{Frame, FrameSource, Uri, open};
use crate::error::{Error, Result};

/// Is lost from the beginning: its first frame is the reason, and starting it again opens it.
pub struct Awaited {
    uri: Uri,
    input: (usize, usize),
    why: Option<Error>,
    source: Option<Box<dyn FrameSource>>,
}

impl Awaited {
    /// A source that could not be opened, for this reason.
    pub fn new(uri: &Uri, input: (usize, usize), why: Error) -> Awaited {
        Awaited { uri: uri.clone(), input, why: Some(why), source: None }
    }
}

impl FrameSource for Awaited {
    fn next(&mut self) -> Result<Option<Frame>> {
        match (&mut self.source, self.why.take()) {
            (Some(source), _) => source.next(),
            (None, Some(why)) => Err(why),
            (None, None) => Ok(None),
        }
    }

    fn reopen(&mut self) -> Result<()> {
        match &mut self.source {
            Some(source) => source.reopen(),
            None => {
                self.source = Some(open(&self.uri, self.input)?);
                Ok(())
            }
        }
    }

    fn describe(&self) -> String {
        self.source.as_ref().map_or_else(|| "a camera that is not there yet".into(), |source| source.describe())
    }

    fn is_live(&self) -> bool {
        true
    }
}
