//! `tandem_tests::outside::safetensors`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tandem_tests::outside::safetensors(data));
