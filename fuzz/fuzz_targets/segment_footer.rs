#![no_main]

use chunkstore::testing::fuzz::segment_footer;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    segment_footer(data);
});
