#![no_main]

use chunkstore::testing::fuzz::pack_table;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    pack_table(data);
});
