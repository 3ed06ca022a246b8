//! `tandem_tests::outside::worker_request`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tandem_tests::outside::worker_request(data));
