//! What a move carries: which blocks of which choices, in the ticket's order. Pure; both sides agree on it.

use proto::v1;
use worker::Request;
use worker::request::Limits;

/// Room for the tokens that a choice puts out while its full blocks are pushed. What does not fit is computed again.
const MEANWHILE_TOKENS: usize = 48;

/// The blocks of a moving request. A choice's newest token has no KV yet, so its last block never counts as full.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cargo {
    /// Blocks that all open choices share.
    pub shared: usize,
    /// What follows, choice by choice.
    pub choices: Vec<Own>,
}

/// One choice's part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Own {
    pub choice: u32,
    /// Output tokens that both workers know of.
    pub known: usize,
    /// Blocks beyond the shared ones: those it has, and room for what it puts out meanwhile.
    pub blocks: usize,
}

impl Cargo {
    /// For the receiving side, from what the router says the client has.
    pub fn of(request: &Request, block_tokens: usize) -> Self {
        let tokens = |choice: u32| request.prompt.len() + request.outputs[choice as usize].len();
        let longest = request.prompt.len() + request.max_tokens;
        let room = |choice: u32| (tokens(choice) + MEANWHILE_TOKENS).min(longest).div_ceil(block_tokens);
        let full = |choice: &u32| (tokens(*choice) - 1) / block_tokens;
        let least = request.open.iter().map(full).min().unwrap_or(0);
        let shared = least.min(request.stem.len() / block_tokens);
        let own = |choice: &u32| Own {
            choice: *choice,
            known: request.outputs[*choice as usize].len(),
            blocks: room(*choice) - shared,
        };
        Self { shared, choices: request.open.iter().map(own).collect() }
    }

    /// Blocks to move when the first `held` are there already.
    pub fn slots(&self, held: usize) -> usize {
        self.shared - held + self.choices.iter().map(|own| own.blocks).sum::<usize>()
    }

    /// For the ticket.
    pub fn to_meta(&self, held: usize, limits: &Limits) -> v1::TicketMeta {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let own = |own: &Own| v1::MovingChoice {
            choice: own.choice,
            known_tokens: count(own.known),
            own_blocks: count(own.blocks),
        };
        v1::TicketMeta {
            first_block: count(held),
            compat_hash: limits.compat_hash.clone(),
            form: Some(limits.form()),
            shared_blocks: count(self.shared),
            choices: self.choices.iter().map(own).collect(),
            // What runs goes on with the very numbers that it has: a repeated token must be equal.
            wire: String::new(),
        }
    }

    /// From a ticket, for the sending side. None when it does not add up to so many slots.
    pub fn from_meta(meta: &v1::TicketMeta, slots: usize) -> Option<(Self, usize)> {
        let own = |c: &v1::MovingChoice| Own {
            choice: c.choice,
            known: c.known_tokens as usize,
            blocks: c.own_blocks as usize,
        };
        let cargo =
            Self { shared: meta.shared_blocks as usize, choices: meta.choices.iter().map(own).collect() };
        let held = meta.first_block as usize;
        let adds_up = !cargo.choices.is_empty() && held <= cargo.shared && cargo.slots(held) == slots;
        adds_up.then_some((cargo, held))
    }
}

/// Tokens of a commit, by open choice, checked: they follow what is known, without a gap.
pub(crate) fn tokens_since(
    request: &Request,
    commit: &v1::Commit,
    vocab_size: usize,
) -> Option<Vec<Vec<u32>>> {
    let mut since: Vec<Vec<u32>> = vec![Vec::new(); request.open.len()];
    for token in &commit.first {
        let at = request.open.iter().position(|choice| *choice == token.choice)?;
        let next = request.outputs[token.choice as usize].len() + since[at].len();
        if token.position as usize != next
            || next >= request.max_tokens
            || token.token_id as usize >= vocab_size
        {
            return None;
        }
        since[at].push(token.token_id);
    }
    Some(since)
}
