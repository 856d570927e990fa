#![no_main]

use chunkstore::testing::fuzz::header;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    header(data);
});
