#![no_main]

use chunkstore::testing::fuzz::interior;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    interior(data);
});
