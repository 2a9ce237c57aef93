//! The journal of a folder: one JSON line an event, read back when the folder is opened again.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::state::{Event, State};

#[derive(Debug)]
pub(crate) struct Journal(Mutex<File>);

impl Journal {
    /// Replays the journal of `root` into `state` and goes on writing at its end. A last line that a
    /// kill cut short is dropped.
    pub(crate) fn open(root: &Path, state: &mut State) -> io::Result<Self> {
        let path = root.join("journal");
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
        let mut whole_bytes = 0;
        let mut reader = BufReader::new(&file);
        let mut line = String::new();
        while reader.read_line(&mut line)? > 0 {
            let Some(event) = line.strip_suffix('\n') else { break };
            let event: Event = serde_json::from_str(event).map_err(io::Error::other)?;
            let _ = state.apply(event);
            whole_bytes += line.len() as u64;
            line.clear();
        }
        file.set_len(whole_bytes)?;
        file.flush()?;
        Ok(Self(Mutex::new(file)))
    }

    pub(crate) fn append(&self, event: &Event) -> io::Result<()> {
        let mut line = serde_json::to_vec(event).map_err(io::Error::other)?;
        line.push(b'\n');
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write_all(&line)
    }
}
