//! Which right to write still stands.

/// What tells one right to write from every earlier one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fence {
    /// The receiver's life.
    pub incarnation: u64,
    /// Its count of reservations in this life.
    pub generation: u64,
    /// The router's count of attempts for the request.
    pub attempt: u32,
}

impl Fence {
    /// Whether a writer that shows `shown` may write here: only with exactly this right, no older or newer one.
    pub fn admits(&self, shown: &Self) -> bool {
        self == shown || cfg!(feature = "sabotage-fencing")
    }
}
