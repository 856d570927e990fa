#![no_main]

use chunkstore::testing::fuzz::chunker;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    chunker(data);
});
