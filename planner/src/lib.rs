//! How many workers each pool needs, and why. Pure: no clock, no network, no threads.
//!
//! ```text
//!   Observation ──► need (queueing theory, per pool) ──► Planner (hysteresis, cooldown) ──► Decision with a Reason
//!        ▲                                                                                      │
//!        └── replay: a simulated fleet over a trace, the same code as on a live cluster ◄────────┘
//! ```

pub mod decide;
pub mod fleet;
pub mod naive;
pub mod need;
pub mod observe;
pub mod profile;
pub mod replay;
pub mod switch;
pub mod trace;

pub use decide::{Bounds, Decision, Planner, Policy};
pub use need::{Need, Reason, Slo};
pub use observe::Observation;
pub use profile::Profile;
pub use switch::{Staff, switch};

/// One of the two pools.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Pool {
    /// Computes prompts.
    Prefill,
    /// Streams tokens.
    Decode,
}

impl Pool {
    /// `prefill` or `decode`.
    pub fn name(self) -> &'static str {
        match self {
            Pool::Prefill => "prefill",
            Pool::Decode => "decode",
        }
    }
}
