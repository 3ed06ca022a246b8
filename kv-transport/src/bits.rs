//! A fixed set of small numbers.

/// Which of `0..len` are in the set.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Bits {
    words: Vec<u64>,
    len: usize,
}

impl Bits {
    pub(crate) fn new(len: usize) -> Self {
        Self { words: vec![0; len.div_ceil(64)], len }
    }

    pub(crate) fn has(&self, at: usize) -> bool {
        self.words.get(at / 64).is_some_and(|word| word >> (at % 64) & 1 == 1)
    }

    /// Adds; false when it was in already or lies outside.
    pub(crate) fn add(&mut self, at: usize) -> bool {
        self.set(at, true)
    }

    /// Removes; false when it was not in.
    pub(crate) fn remove(&mut self, at: usize) -> bool {
        self.set(at, false)
    }

    fn set(&mut self, at: usize, to: bool) -> bool {
        if at >= self.len || self.has(at) == to {
            return false;
        }
        if let Some(word) = self.words.get_mut(at / 64) {
            *word ^= 1 << (at % 64);
        }
        true
    }
}
