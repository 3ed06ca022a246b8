//! What the planner is compared with: a fixed fleet, and an autoscaler that knows busy shares only.

use crate::fleet::Look;
use crate::{Bounds, Decision, Planner, Pool, Reason};

/// Something that sizes both pools.
pub trait Controller {
    /// Looks; says what changes.
    fn look(&mut self, look: &Look) -> Vec<Decision>;
}

impl Controller for Planner {
    fn look(&mut self, look: &Look) -> Vec<Decision> {
        Planner::look(self, look.seen)
    }
}

/// Always the same fleet.
pub struct Static;

impl Controller for Static {
    fn look(&mut self, _: &Look) -> Vec<Decision> {
        Vec::new()
    }
}

/// Kubernetes' HorizontalPodAutoscaler on utilisation, with its defaults: 10 % tolerance, down by the largest wish of
/// 5 minutes, up at once.
pub struct Hpa {
    target: f64,
    bounds: [Bounds; 2],
    size: [usize; 2],
    wishes: [Vec<(f64, usize)>; 2],
}

const TOLERANCE: f64 = 0.1;
const DOWN_WINDOW: f64 = 300.0;

impl Hpa {
    /// Aims at a busy share, such as 0.7.
    pub fn new(target: f64, prefill: Bounds, decode: Bounds, size: [usize; 2]) -> Self {
        Self { target, bounds: [prefill, decode], size, wishes: [Vec::new(), Vec::new()] }
    }

    fn pool(&mut self, pool: Pool, look: &Look) -> Option<Decision> {
        let (i, at) = (pool as usize, look.seen.now);
        let ratio = look.busy[i] / self.target;
        let wish = match (ratio - 1.0).abs() <= TOLERANCE {
            true => self.size[i],
            false => (look.ready[i] as f64 * ratio).ceil() as usize,
        };
        let wish = wish.clamp(self.bounds[i].min.max(1), self.bounds[i].max);
        self.wishes[i].push((at, wish));
        self.wishes[i].retain(|(then, _)| *then > at - DOWN_WINDOW);
        let highest = self.wishes[i].iter().map(|(_, wish)| *wish).max()?;
        let to = if wish > self.size[i] { wish } else { highest.min(self.size[i]) };
        let from = std::mem::replace(&mut self.size[i], to);
        (from != to).then_some(Decision { at, pool, from, to, reason: Reason::Bounds })
    }
}

impl Controller for Hpa {
    fn look(&mut self, look: &Look) -> Vec<Decision> {
        [Pool::Prefill, Pool::Decode].into_iter().filter_map(|pool| self.pool(pool, look)).collect()
    }
}
