//! `tandem_tests::outside::tokenizer`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tandem_tests::outside::tokenizer(data));
