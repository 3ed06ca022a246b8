//! Who is alive, willing and how loaded.
