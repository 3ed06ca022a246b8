//! `tandem_tests::outside::gguf`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tandem_tests::outside::gguf(data));
