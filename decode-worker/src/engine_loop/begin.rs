//! How requests begin: landed KV is unsealed, then stems or choices join the others.

use std::sync::Arc;
use std::time::Instant;

use engine::EngineError;
use engine::kv::pool::Block;

use super::{EngineLoop, Group};
use crate::choice::Choice;
use crate::order::{Start, Submission};

/// Landed KV that is compared between two steps, at most: a few milliseconds' worth.
const UNSEAL_BYTES: usize = 32 << 20;

impl EngineLoop {
    /// Compares a bounded piece of what landed; what is whole begins to run.
    pub(super) fn unseal(&mut self) -> Result<(), EngineError> {
        let began = Instant::now();
        let kv = self.engine.kv();
        let mut left = (UNSEAL_BYTES / self.layout.block_bytes().max(1)).max(1);
        let mut cells = 0;
        while let Some((submission, seal)) = self.sealed.front_mut() {
            let is_wanted = submission.hold.attempt.must_end().is_none() && !submission.events.is_closed();
            let done = if is_wanted { seal.check(kv.as_ref(), left) } else { 0 };
            left -= done;
            cells += done;
            if is_wanted && !seal.is_checked() {
                break;
            }
            let Some((mut submission, seal)) = self.sealed.pop_front() else { break };
            if !is_wanted {
                continue;
            }
            if !seal.bad().is_empty() {
                tracing::error!(request = %submission.request.id, blocks = seal.bad().len(),
                    "landed KV changed in the pool before its first step; computing it again");
                self.metrics.corrupt_blocks.increment(seal.bad().len() as u64);
                submission.without(seal.bad(), self.layout.block_tokens);
            }
            self.admit(submission)?;
        }
        if cells > 0 {
            self.metrics.verified(cells * self.layout.block_bytes(), began.elapsed());
        }
        Ok(())
    }

    pub(super) fn admit(&mut self, submission: Submission) -> Result<(), EngineError> {
        let Submission { request, events, blocks, arrived, computed, start, hold, .. } = submission;
        self.engine.load_blocks(&arrived)?;
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
        Ok(())
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
