#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| exd_fuzz::ring(data));
