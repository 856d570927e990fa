#![no_main]

use chunkstore::testing::fuzz::relocations;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    relocations(data);
});
