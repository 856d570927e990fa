#![no_main]

use chunkstore::testing::fuzz::key_slot;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    key_slot(data);
});
