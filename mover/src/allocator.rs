//! The system's allocator, set so that the resident size stays near what is in use.

/// Large buffers are mappings of their own, given back when they are freed; and threads do not keep what they freed
/// each for itself. To be called before there are other threads.
#[expect(unsafe_code, reason = "no library wraps the call")]
pub fn give_back() {
    /// Setting it also keeps it from growing with the buffers that are freed.
    const OWN_MAPPING_BYTES: libc::c_int = 256 << 10;
    const ARENAS: libc::c_int = 2;
    // SAFETY: the call takes two integers, and there are no other threads yet.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_MAPPING_BYTES);
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
    }
}
