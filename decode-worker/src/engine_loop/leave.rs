//! How requests leave for another worker: shown, stopped, asked for. The move itself is [`crate::moving`].

use std::collections::BTreeSet;

use engine::EngineError;
use engine::kv::pool::Block;
use proto::v1::{self, decode_event::Event};
use worker::request::{Key, load_to_wire};

use super::{EngineLoop, Group};
use crate::choice::Choice;
use crate::order::{Portrait, Stopped};

impl EngineLoop {
    pub(super) fn portray(&mut self, key: &Key, attempt: u32) -> Result<Option<Portrait>, EngineError> {
        let is_it = |group: &Group| group.request.key == *key && group.request.attempt == attempt;
        let group = self.groups.iter().find(|(_, group)| is_it(group)).map(|(key, _)| *key);
        let Some(group) = group else { return Ok(None) };
        let ours = self.choices.iter().filter(|c| c.group == group && !c.is_stem());
        let choices: Vec<_> = ours.map(|c| (c.index, c.full_blocks(&self.layout).to_vec())).collect();
        self.publish(Portrait { group, choices }).map(Some)
    }

    /// Makes what a portrait shows readable for the transport.
    pub(super) fn publish(&mut self, portrait: Portrait) -> Result<Portrait, EngineError> {
        let blocks = portrait.choices.iter().flat_map(|(_, blocks)| blocks.iter().map(Block::id));
        // Choices share blocks.
        let ids: BTreeSet<u32> = blocks.collect();
        self.engine.publish_blocks(&ids.into_iter().collect::<Vec<_>>())?;
        Ok(portrait)
    }

    pub(super) fn stop(
        &mut self,
        group: u64,
        known: &[(u32, usize)],
    ) -> Result<Option<Stopped>, EngineError> {
        let mut since = Vec::new();
        let mut choices = Vec::new();
        for (index, known) in known {
            let ours = |c: &&Choice| c.group == group && c.index == *index && !c.is_stem();
            let Some(choice) = self.choices.iter().find(ours) else { return Ok(None) };
            for (position, token_id) in choice.output().iter().enumerate().skip(*known) {
                let position = u32::try_from(position).unwrap_or(u32::MAX);
                since.push(v1::SampledToken { choice: *index, token_id: *token_id, logprob: None, position });
            }
            choices.push((*index, choice.used_blocks(&self.layout).to_vec()));
        }
        self.set_stopped(group, true);
        let portrait = self.publish(Portrait { group, choices })?;
        Ok(Some((since, portrait)))
    }

    pub(super) fn set_stopped(&mut self, group: u64, stopped: bool) {
        if let Some(group) = self.groups.get_mut(&group) {
            group.stopped = stopped;
        }
    }

    /// While draining, every request whose choices all decode asks to be moved.
    pub(super) fn ask_to_leave(&mut self) {
        if !self.load.borrow().draining {
            self.groups.values_mut().for_each(|group| group.leaving = false);
            return;
        }
        let load = load_to_wire(&self.load_now());
        for (key, group) in self.groups.iter_mut().filter(|(_, group)| !group.leaving) {
            if self.choices.iter().any(|c| c.group == *key && (c.is_stem() || c.view().pending > 1)) {
                continue;
            }
            group.leaving = true;
            let event = Some(Event::Leaving(v1::Leaving {}));
            let _ = group.events.send(Ok(v1::DecodeEvent { event, load: Some(load) }));
        }
    }
}
