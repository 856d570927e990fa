#![no_main]

use chunkstore::testing::fuzz::tombstones;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    tombstones(data);
});
