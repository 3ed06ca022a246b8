//! Reserve, land, stream tokens.
