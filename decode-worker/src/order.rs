//! What the engine's loop is told, and by whom: requests that begin, and what a move needs to know.

use std::sync::Arc;

use engine::kv::pool::Block;
use proto::v1;
use telemetry::trace::Span;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tonic::Status;
use worker::Request;
use worker::attempts::Running;
use worker::request::Key;

use crate::outlook::Expected;
use crate::seal::Seal;

/// Where a request's events go. Closed by the client: the request is cancelled.
pub(crate) type Events = mpsc::UnboundedSender<Result<v1::DecodeEvent, Status>>;

/// A request that is ready to run.
pub(crate) struct Submission {
    pub request: Arc<Request>,
    pub events: Events,
    /// Blocks that hold the first `computed` tokens of the stem.
    pub blocks: Vec<Block>,
    pub computed: usize,
    /// How many of the blocks were here before anything landed.
    pub cached: usize,
    /// How it begins.
    pub start: Start,
    /// What guards its landed blocks.
    pub seal: Option<Seal>,
    /// Held until the request ends.
    pub hold: Hold,
}

/// How a request begins here.
pub(crate) enum Start {
    /// Its stem is prefilled here.
    Local,
    /// Its stem landed, with the tokens drawn at its end, already sent to the client.
    Landed(Vec<v1::SampledToken>),
    /// It ran elsewhere: by open choice, the blocks beyond the shared ones and the tokens drawn meanwhile.
    Moved(Vec<(Vec<Block>, Vec<u32>)>),
}

impl Submission {
    /// Gives up what landed damaged, and what stands on it: it is computed here again. Draws are a function, so
    /// tokens that the client has already come once more, and equal. `bad` counts landed blocks in their order.
    pub fn without(&mut self, bad: &[usize], block_tokens: usize) {
        let good = |from: usize, blocks: usize| {
            let first = bad.iter().filter(|at| (from..from + blocks).contains(*at)).min();
            first.map_or(blocks, |at| at - from)
        };
        let landed = self.blocks.len() - self.cached;
        let kept = good(0, landed);
        self.blocks.truncate(self.cached + kept);
        self.computed = self.computed.min(self.blocks.len() * block_tokens);
        match &mut self.start {
            Start::Landed(_) if kept < landed => self.start = Start::Local,
            Start::Local | Start::Landed(_) => {}
            Start::Moved(choices) => {
                let mut from = landed;
                for (own, _) in choices {
                    let blocks = own.len();
                    own.truncate(if kept < landed { 0 } else { good(from, blocks) });
                    from += blocks;
                }
            }
        }
    }
}

/// What the loop is told. Moves are described in [`crate::moving`].
pub(crate) enum Order {
    /// Run this.
    Run(Box<Submission>),
    /// Show what a running request consists of.
    Portray { key: Key, attempt: u32, reply: oneshot::Sender<Option<Portrait>> },
    /// Let a request stand still; the reply has the tokens of these choices beyond those that are known, and
    /// all blocks. Nothing is stopped when one of them has ended.
    Stop { group: u64, known: Vec<(u32, usize)>, reply: oneshot::Sender<Option<Stopped>> },
    /// A request that stands still goes on.
    GoOn(u64),
    /// A request runs elsewhere now.
    Moved(u64),
}

/// A request that stands still: its newest tokens, and its blocks.
pub(crate) type Stopped = (Vec<v1::SampledToken>, Portrait);

/// A running request at one instant. Keeps its blocks.
pub(crate) struct Portrait {
    pub group: u64,
    pub choices: Vec<(u32, Vec<Block>)>,
}

impl Portrait {
    /// Ids of the choice's blocks, from the start of the sequence.
    pub fn blocks(&self, choice: u32) -> Option<Vec<u32>> {
        let (_, blocks) = self.choices.iter().find(|(index, _)| *index == choice)?;
        Some(blocks.iter().map(Block::id).collect())
    }

    /// What must be kept while it is read.
    pub fn into_blocks(self) -> Vec<Block> {
        self.choices.into_iter().flat_map(|(_, blocks)| blocks).collect()
    }
}

/// What a running request occupies besides blocks.
pub(crate) struct Hold {
    pub _slot: OwnedSemaphorePermit,
    /// What it is expected to need yet.
    pub expected: Expected,
    pub attempt: Arc<Running>,
    /// Ends with the request.
    pub span: Span,
}
