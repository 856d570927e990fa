#![no_main]

use chunkstore::testing::fuzz::pack_object;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    pack_object(data);
});
