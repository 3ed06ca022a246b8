//! The words on the wire: `tandem.v1`, ids and generated code.
