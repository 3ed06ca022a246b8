//! `tandem_tests::outside::tokenizer`.
#![no_main]

use std::sync::Once;

static QUIET: Once = Once::new();

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    // The fuzzer's own hook ends the process at every panic, also at those of the library that we catch. Others still end it.
    QUIET.call_once(|| std::panic::set_hook(Box::new(|_| {})));
    tandem_tests::outside::tokenizer(data);
});
