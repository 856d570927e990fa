#![no_main]

use chunkstore::testing::fuzz::record;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    record(data);
});
