//! Admission, tokenizer, placement, relay.
