//! `tandem_tests::outside::tool_calls`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tandem_tests::outside::tool_calls(data));
