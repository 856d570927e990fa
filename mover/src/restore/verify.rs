//! Reads back what a window has written, compares it with the keyed hashes of the tree, and only then lets it have its
//! name.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use chunkstore::pack::BlobKind;
use chunkstore::tree::Content;
use rustix::fs::{Advice, fadvise};

use super::Shared;
use super::hidden::waiting_name;
use super::window::Window;

/// Files a thread takes at a time.
const AT_ONCE: usize = 64;

/// Verifies the items of `window`; those that differ are removed and reported.
pub(super) fn verify(shared: &Shared<'_>, window: &Window) {
    // Otherwise it would be our own memory that is read.
    if let Err(error) = shared.sync() {
        shared.warn(&[], format!("what is read back may come from memory: {error}"));
    }
    let mut pieces: Vec<u32> = (0..window.pieces.len() as u32).collect();
    pieces.sort_by_key(|piece| window.pieces[*piece as usize].item);
    let groups: Vec<&[u32]> = pieces
        .chunk_by(|a, b| window.pieces[*a as usize].item == window.pieces[*b as usize].item)
        .collect();
    let tasks = groups.len() + window.immediate.len();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut buffer = Vec::new();
        while !shared.is_stopped() {
            let from = next.fetch_add(AT_ONCE, Ordering::Relaxed);
            if from >= tasks {
                return;
            }
            for task in from..(from + AT_ONCE).min(tasks) {
                match groups.get(task) {
                    Some(pieces) => {
                        let item = window.pieces[pieces[0] as usize].item;
                        verify_item(shared, window, item, pieces, &mut buffer);
                    }
                    None => {
                        let item = window.immediate[task - groups.len()];
                        verify_item(shared, window, item, &[], &mut buffer);
                    }
                }
            }
        }
    };
    let threads = shared.handles.threads.clamp(1, tasks.div_ceil(AT_ONCE).max(1));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
    for (number, item) in window.items.iter().enumerate() {
        let number = number as u32;
        let waits = item.waiting().is_some() && !item.has_failed();
        if waits && shared.is_finished(window, number) && !shared.is_stopped() {
            shared.settle(window, number);
        }
    }
}

fn verify_item(
    shared: &Shared<'_>,
    window: &Window,
    number: u32,
    pieces: &[u32],
    buffer: &mut Vec<u8>,
) {
    let item = &window.items[number as usize];
    let inline = match &item.node().content {
        Content::Inline(bytes) if item.node().kind == crate::fs::Kind::File => Some(&bytes[..]),
        _ => None,
    };
    if item.has_failed() || (pieces.is_empty() && inline.is_none()) {
        return;
    }
    let mut compare = || -> io::Result<bool> {
        let (file, _) = match item.waiting() {
            Some((base, number)) => {
                shared.hidden_in(base)?.dir().open_file(&waiting_name(number))?
            }
            None => shared.folders.dir(item.folder)?.open_file(item.name())?,
        };
        // Only a hint, so it may fail.
        let _hint = fadvise(&file, 0, None, Advice::DontNeed);
        if let Some(expected) = inline {
            read(&file, 0, expected.len(), buffer)?;
            return Ok(buffer == expected);
        }
        let keys = shared.repository.keys();
        for piece in pieces {
            let at = window.pieces[*piece as usize];
            read(&file, at.offset, at.len as usize, buffer)?;
            let id = BlobKind::Data.id(keys, buffer);
            let same = match &item.node().content {
                Content::Part { hash, .. } => id.0.starts_with(hash),
                _ => id == window.ids[*piece as usize],
            };
            if !same {
                return Ok(false);
            }
        }
        Ok(true)
    };
    let message = match compare() {
        Ok(true) => return,
        Ok(false) => "what was read back differs from what was written".to_owned(),
        Err(error) => format!("it cannot be read back: {error}"),
    };
    let own_name = item.waiting().is_none();
    if shared.discard(window, number) {
        if own_name && shared.is_finished(window, number) {
            shared.counters.files.fetch_sub(1, Ordering::Relaxed);
            shared.counters.bytes.fetch_sub(window.size(number), Ordering::Relaxed);
            let unlinked = shared.folders.dir(item.folder).and_then(|dir| dir.unlink(item.name()));
            match unlinked {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    let message = format!("the wrong file cannot be removed: {error}");
                    shared.warn(&item.path(), message);
                }
                _ => {}
            }
        }
        shared.fail(&item.path(), message);
    }
}

fn read(file: &File, offset: u64, len: usize, buffer: &mut Vec<u8>) -> io::Result<()> {
    buffer.resize(len, 0);
    file.read_exact_at(buffer, offset)
}
