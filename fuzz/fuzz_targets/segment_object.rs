#![no_main]

use chunkstore::testing::fuzz::segment_object;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    segment_object(data);
});
