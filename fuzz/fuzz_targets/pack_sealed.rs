#![no_main]

use chunkstore::testing::fuzz::pack_sealed;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    pack_sealed(data);
});
