//! `tandem_tests::outside::http_body`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tandem_tests::outside::http_body(data));
