//! From a worker's tokens to a client's chunks: text, stop strings, counts, ends.

use std::time::Instant;

use proto::v1::{self, FinishReason, generate_response::Event};
use tonic::Status;

use crate::request::Prepared;
use crate::text::detokenize::Detokenizer;
use crate::text::model::TextModel;
use crate::text::stop::{Shown, StopMatcher};
use crate::timeline::Timeline;

/// The output side of one request, over all its attempts.
pub struct Relay {
    choices: Vec<Choice>,
    ends: Vec<u32>,
    min_tokens: usize,
}

struct Choice {
    detokenizer: Detokenizer,
    stop: StopMatcher,
    stops: Vec<String>,
    /// All tokens that the client has.
    sent: Vec<u32>,
    /// How many of them the current attempt has produced again.
    replayed: usize,
    last_token: Option<Instant>,
    end: Option<v1::ChoiceEnd>,
}

impl Relay {
    /// For a request's choices.
    pub fn new(prepared: &Prepared) -> Self {
        let choice = || Choice {
            detokenizer: Detokenizer::default(),
            stop: StopMatcher::new(&prepared.stop),
            stops: prepared.stop.clone(),
            sent: Vec::new(),
            replayed: 0,
            last_token: None,
            end: None,
        };
        Self {
            choices: (0..prepared.sequence.n).map(|_| choice()).collect(),
            ends: prepared.ends.clone(),
            min_tokens: prepared.sequence.min_tokens as usize,
        }
    }

    /// A new attempt starts from the prompt: tokens are drawn by (seed, choice, position), so it produces
    /// what the client already has once more, and that is passed over.
    pub fn begin_attempt(&mut self) {
        self.choices.iter_mut().for_each(|choice| choice.replayed = 0);
    }

    /// Takes tokens in; returns the chunks that go out.
    pub fn tokens(
        &mut self,
        tokens: Vec<v1::SampledToken>,
        text: &TextModel,
        timeline: &mut Timeline,
    ) -> Result<Vec<v1::Chunk>, Status> {
        let mut chunks = Vec::with_capacity(tokens.len());
        for token in tokens {
            let index = token.choice;
            let Some(choice) = self.choices.get_mut(index as usize) else {
                return Err(Status::internal(format!("a worker sent choice {index}")));
            };
            if choice.end.is_some() || choice.is_replay(token.token_id)? {
                continue;
            }
            let now = Instant::now();
            timeline.token(now, choice.last_token.replace(now));
            choice.sent.push(token.token_id);
            choice.replayed = choice.sent.len();
            let is_end = self.ends.contains(&token.token_id) && choice.sent.len() >= self.min_tokens;
            let shown = match is_end {
                true => String::new(),
                false => choice.show(index, token.token_id, text),
            };
            if !shown.is_empty() {
                timeline.text(now);
            }
            chunks.push(v1::Chunk {
                index,
                text: shown,
                token_ids: vec![token.token_id],
                logprobs: token.logprob.into_iter().collect(),
            });
        }
        Ok(chunks)
    }

    /// Takes a worker's word on how choices ended; returns the text that was held back.
    pub fn finished(
        &mut self,
        finishes: &[v1::ChoiceFinish],
        text: &TextModel,
        timeline: &mut Timeline,
    ) -> Vec<v1::Chunk> {
        let mut chunks = Vec::new();
        for finish in finishes {
            let Some(choice) = self.choices.get_mut(finish.choice as usize) else { continue };
            if choice.end.is_some() {
                continue;
            }
            let held = choice.flush(finish.choice, finish.finish_reason(), text);
            if !held.is_empty() {
                timeline.text(Instant::now());
                chunks.push(v1::Chunk { index: finish.choice, text: held, ..v1::Chunk::default() });
            }
        }
        chunks
    }

    /// Whether every choice has ended.
    pub fn is_done(&self) -> bool {
        self.choices.iter().all(|choice| choice.end.is_some())
    }

    /// The last message.
    pub fn complete(self) -> (Vec<v1::ChoiceEnd>, u32) {
        let output = self.choices.iter().map(|c| c.sent.len() as u32).sum();
        (self.choices.into_iter().filter_map(|choice| choice.end).collect(), output)
    }
}

impl Choice {
    fn is_replay(&mut self, token: u32) -> Result<bool, Status> {
        let Some(known) = self.sent.get(self.replayed) else { return Ok(false) };
        if *known != token {
            return Err(Status::data_loss(format!(
                "output token {} was {known} before the worker was lost and is {token} after",
                self.replayed
            )));
        }
        self.replayed += 1;
        Ok(true)
    }

    fn show(&mut self, index: u32, token: u32, text: &TextModel) -> String {
        let new = self.detokenizer.push(token, |ids| text.decode(ids));
        self.pass(index, &new)
    }

    fn pass(&mut self, index: u32, new: &str) -> String {
        match self.stop.push(new) {
            Shown::Text(shown) => shown,
            Shown::Stopped(shown, number) => {
                self.close(index, FinishReason::Stop, self.stops[number].clone());
                shown
            }
        }
    }

    fn flush(&mut self, index: u32, reason: FinishReason, text: &TextModel) -> String {
        let rest = self.detokenizer.flush(|ids| text.decode(ids));
        let mut shown = self.pass(index, &rest);
        if self.end.is_none() {
            shown.push_str(&self.stop.flush());
            self.close(index, reason, String::new());
        }
        shown
    }

    fn close(&mut self, index: u32, reason: FinishReason, matched_stop: String) {
        self.end = Some(v1::ChoiceEnd {
            index,
            finish_reason: reason.into(),
            matched_stop,
            output_tokens: self.sent.len() as u32,
        });
    }
}

/// A chunk as a stream message.
pub fn chunk(chunk: v1::Chunk) -> v1::GenerateResponse {
    v1::GenerateResponse { event: Some(Event::Chunk(chunk)) }
}

/// The last message as a stream message.
pub fn complete(complete: v1::Complete) -> v1::GenerateResponse {
    v1::GenerateResponse { event: Some(Event::Complete(complete)) }
}
