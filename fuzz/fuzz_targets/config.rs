//! `tandem_tests::outside::config`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tandem_tests::outside::config(data));
