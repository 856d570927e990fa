//! Files that were to be further names of others, or that could not be put in their place, restored from their own
//! content.

use chunkstore::Result;
use chunkstore::tree::{Body, EntryCursor, TreeCursor};

use super::links::LinkKey;
use super::plan::{Planner, is_within};
use super::window::Work;

impl Planner<'_> {
    /// Restores files, each by key and folder.
    pub(super) fn restore_own_content(&mut self, files: Vec<(Vec<u8>, u32)>) -> Result<()> {
        // The window may hold the begin of a large file, which goes on afterwards.
        let window = std::mem::take(&mut self.window);
        let growing = self.growing.take();
        let restored = self.restore_all(files);
        if restored.is_err() {
            self.shared.remove_unfinished(&window);
        } else {
            (self.window, self.growing) = (window, growing);
        }
        restored
    }

    fn restore_all(&mut self, files: Vec<(Vec<u8>, u32)>) -> Result<()> {
        // The first of them may be linked to the others; what fails again is not linked any more.
        let mut again = Vec::new();
        for (key, folder) in &files {
            self.restore_own(key, *folder, true, &mut again)?;
        }
        again.extend(self.execute()?);
        for (key, folder) in &std::mem::take(&mut again) {
            self.restore_own(key, *folder, false, &mut again)?;
        }
        again.extend(self.execute()?);
        debug_assert!(again.is_empty(), "nothing was linked");
        Ok(())
    }

    /// Restores one file found anew. `again` gets those that could not be linked to it.
    fn restore_own(
        &mut self,
        key: &[u8],
        folder: u32,
        may_link: bool,
        again: &mut Vec<(Vec<u8>, u32)>,
    ) -> Result<()> {
        let (root, level) = self.root;
        let source = self.shared.repository;
        let mut cursor = EntryCursor::new(TreeCursor::new(source, root, level));
        cursor.seek(key)?;
        while let Some((leaf, at)) = cursor.peek_at()?.map(|(leaf, at)| (leaf.clone(), at)) {
            let entry = &leaf.leaf.entries[at];
            match &entry.body {
                Body::Node(node) if entry.key == key => {
                    self.count_leaf(&leaf);
                    if let Some(link) = LinkKey::of(node).filter(|_| may_link) {
                        let is_first = !self.is_known(folder, link);
                        if !is_first {
                            // Its first name may still be in the window.
                            again.extend(self.execute()?);
                        }
                        if !is_first && self.is_known(folder, link) {
                            self.window.add((&leaf, at), folder, None, Work::Link);
                            break;
                        }
                        self.add_first_name(folder, link);
                    }
                    self.add_content((&leaf, at), node, folder, None);
                }
                Body::Extent(chunks) if is_within(&entry.key, key) => {
                    self.take_extent((&leaf, at), chunks);
                }
                Body::End(end) if is_within(&entry.key, key) => self.take_end(&entry.key, *end),
                _ => break,
            }
            cursor.advance();
            if self.window.bytes >= self.shared.options.window_bytes {
                again.extend(self.execute()?);
            }
        }
        self.end_file();
        Ok(())
    }
}
