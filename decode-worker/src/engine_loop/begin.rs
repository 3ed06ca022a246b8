//! How requests begin: landed KV is unsealed, then stems or choices join the others.

use std::sync::Arc;
use std::time::Instant;

use engine::kv::pool::Block;
use engine::{EngineError, Loading};

use super::{EngineLoop, Group};
use crate::choice::Choice;
use crate::order::{Start, Submission};
use crate::seal::Seal;

/// Landed KV in host memory that is compared between two steps, at most: a few milliseconds' worth.
const UNSEAL_BYTES: usize = 32 << 20;
/// Requests whose KV is brought to the device at once: enough that the next one's copy never waits for this loop.
const LOADS: usize = 4;

/// A request whose KV landed, and was not compared yet with what was sent.
pub(super) struct Sealed {
    submission: Submission,
    seal: Seal,
    /// How it comes to where steps read it, once that has begun.
    loading: Option<Loading>,
}

impl Sealed {
    pub(super) fn new(submission: Submission, seal: Seal) -> Self {
        Self { submission, seal, loading: None }
    }

    fn is_wanted(&self) -> bool {
        self.submission.hold.attempt.must_end().is_none() && !self.submission.events.is_closed()
    }
}

impl EngineLoop {
    /// Brings what landed to where steps read it and compares it; what is whole begins to run.
    pub(super) fn unseal(&mut self) -> Result<(), EngineError> {
        self.begin_loads()?;
        let began = Instant::now();
        let kv = self.engine.kv();
        let mut left = (UNSEAL_BYTES / self.layout.block_bytes().max(1)).max(1);
        let mut cells = 0;
        while let Some(sealed) = self.sealed.front_mut() {
            // Also of one that nobody wants any more: its blocks are being written.
            let (is_loaded, most) = match sealed.loading {
                None => (false, 0),
                Some(Loading::Done) => (true, left),
                // The checksums are there: comparing costs nothing.
                Some(Loading::Queued(load)) => (self.engine.is_loaded(load)?, usize::MAX),
            };
            let is_wanted = sealed.is_wanted();
            if !is_loaded && (is_wanted || sealed.loading.is_some()) {
                break;
            }
            let done = if is_wanted { sealed.seal.check(kv.as_ref(), most) } else { 0 };
            left = left.saturating_sub(done);
            cells += done;
            if is_wanted && !sealed.seal.is_checked() {
                break;
            }
            let Some(Sealed { mut submission, seal, .. }) = self.sealed.pop_front() else { break };
            if !is_wanted {
                continue;
            }
            if !seal.bad().is_empty() {
                tracing::error!(request = %submission.request.id, blocks = seal.bad().len(),
                    "landed KV changed in the pool before its first step; computing it again");
                self.metrics.corrupt_blocks.increment(seal.bad().len() as u64);
                submission.without(seal.bad(), self.layout.block_tokens);
            }
            self.admit(submission);
        }
        if cells > 0 {
            self.metrics.verified(cells * self.layout.block_bytes(), began.elapsed());
        }
        Ok(())
    }

    fn begin_loads(&mut self) -> Result<(), EngineError> {
        for sealed in self.sealed.iter_mut().take(LOADS) {
            if sealed.loading.is_none() && sealed.is_wanted() {
                sealed.loading = Some(self.engine.begin_load(sealed.seal.blocks(), sealed.seal.on_device())?);
            }
        }
        Ok(())
    }

    pub(super) fn admit(&mut self, submission: Submission) {
        let Submission { request, events, blocks, computed, start, hold, .. } = submission;
        let group = self.next_group;
        self.next_group += 1;
        self.groups.insert(
            group,
            Group {
                request: Arc::clone(&request),
                events,
                open: u32::try_from(request.open.len()).unwrap_or(u32::MAX),
                finishes: Vec::new(),
                submitted: Instant::now(),
                started: None,
                local: matches!(start, Start::Local),
                cached_tokens: u32::try_from(computed).unwrap_or(u32::MAX),
                stopped: false,
                leaving: false,
                hold,
            },
        );
        let stem = |blocks| {
            let mut stem = Choice::stem(Arc::clone(&request), group, blocks, 0);
            stem.advance(computed, &self.pool, &self.layout);
            stem
        };
        match start {
            Start::Local => {
                self.metrics.local_prefills.increment(1);
                self.choices.push(stem(blocks));
            }
            Start::Landed(tokens) => {
                let stem = stem(blocks);
                self.branch(stem, &tokens.iter().map(|t| (t.choice, t.token_id)).collect::<Vec<_>>());
            }
            Start::Moved(choices) => {
                for (index, (own, since)) in request.open.iter().zip(choices) {
                    let table: Vec<Block> = blocks.iter().cloned().chain(own).collect();
                    let room = table.len() * self.layout.block_tokens;
                    let mut choice = Choice::moved(Arc::clone(&request), group, *index, table, since);
                    choice.advance(room.min(choice.tokens.len() - 1), &self.pool, &self.layout);
                    if !self.finish_if_done(&choice) {
                        self.choices.push(choice);
                    }
                }
            }
        }
    }

    /// Turns a computed stem and the tokens drawn at its end into running choices.
    pub(super) fn branch(&mut self, stem: Choice, drawn: &[(u32, u32)]) {
        for mut choice in stem.branch(&self.layout) {
            choice.tokens.extend(drawn.iter().filter(|(index, _)| *index == choice.index).map(|(_, t)| t));
            if !self.finish_if_done(&choice) {
                self.choices.push(choice);
            }
        }
    }
}
