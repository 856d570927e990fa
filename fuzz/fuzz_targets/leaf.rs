#![no_main]

use chunkstore::testing::fuzz::leaf;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    leaf(data);
});
