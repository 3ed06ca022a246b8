//! `tandem_tests::outside::kv_frames`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tandem_tests::outside::kv_frames(data));
