//! From a worker's tokens to a client's chunks: text, stop strings, counts, ends.

use std::time::Instant;

use proto::v1::{self, FinishReason, generate_response::Event};
use tonic::Status;

use crate::request::Prepared;
use crate::text::detokenize::Detokenizer;
use crate::text::model::TextModel;
use crate::text::stop::{Shown, StopMatcher};
use crate::text::tools::ToolParser;
use crate::timeline::Timeline;

/// The output side of one request, over all its attempts.
pub struct Relay {
    choices: Vec<Choice>,
    ends: Vec<u32>,
    min_tokens: usize,
    max_tokens: usize,
}

struct Choice {
    detokenizer: Detokenizer,
    stop: StopMatcher,
    stops: Vec<String>,
    tools: Option<ToolParser>,
    /// All tokens that the client has.
    sent: Vec<u32>,
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
            tools: prepared.tools.as_ref().map(|(format, tools)| ToolParser::new(*format, tools)),
            sent: Vec::new(),
            last_token: None,
            end: None,
        };
        Self {
            choices: (0..prepared.sequence.n).map(|_| choice()).collect(),
            ends: prepared.ends.clone(),
            min_tokens: prepared.sequence.min_tokens as usize,
            max_tokens: prepared.sequence.max_tokens as usize,
        }
    }

    /// What another worker needs to know to go on from here; nothing before the first token.
    pub fn outputs(&self) -> Vec<v1::ChoiceOutput> {
        if self.sent() == 0 {
            return Vec::new();
        }
        let output = |c: &Choice| v1::ChoiceOutput { tokens: c.sent.clone(), ended: c.end.is_some() };
        self.choices.iter().map(output).collect()
    }

    /// Tokens that the client has, over all choices.
    pub fn sent(&self) -> usize {
        self.choices.iter().map(|choice| choice.sent.len()).sum()
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
            if choice.end.is_some() || choice.has(&token)? {
                continue;
            }
            let now = Instant::now();
            timeline.token(now, choice.last_token.replace(now));
            choice.sent.push(token.token_id);
            let is_end = self.ends.contains(&token.token_id) && choice.sent.len() >= self.min_tokens;
            let mut shown = match is_end {
                true => String::new(),
                false => choice.show(index, token.token_id, text),
            };
            if is_end {
                shown.push_str(&choice.flush(index, FinishReason::Stop, text));
            } else if choice.end.is_none() && choice.sent.len() >= self.max_tokens {
                shown.push_str(&choice.flush(index, FinishReason::Length, text));
            }
            let (text, tool_calls) = choice.without_calls(shown);
            if !text.is_empty() || !tool_calls.is_empty() {
                timeline.text(now);
            }
            chunks.push(v1::Chunk {
                index,
                text,
                tool_calls,
                token_ids: vec![token.token_id],
                logprobs: token.logprob.into_iter().collect(),
            });
        }
        Ok(chunks)
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
    /// Whether the client has this token already. A worker that goes on for another one may say again what that
    /// one said, but nothing else, and it may leave nothing out.
    fn has(&self, token: &v1::SampledToken) -> Result<bool, Status> {
        let position = token.position as usize;
        match self.sent.get(position) {
            Some(known) if *known == token.token_id => Ok(true),
            Some(known) => Err(Status::data_loss(format!(
                "output token {position} was {known} and is {} on another worker",
                token.token_id
            ))),
            None if position == self.sent.len() => Ok(false),
            None => Err(Status::internal(format!(
                "a worker sent output token {position}, the next is {}",
                self.sent.len()
            ))),
        }
    }

    fn show(&mut self, index: u32, token: u32, text: &TextModel) -> String {
        let special = self.tools.is_some();
        let new = self.detokenizer.push(token, |ids| text.decode(ids, special));
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
        let special = self.tools.is_some();
        let rest = self.detokenizer.flush(|ids| text.decode(ids, special));
        let mut shown = self.pass(index, &rest);
        if self.end.is_none() {
            shown.push_str(&self.stop.flush());
            self.close(index, reason, String::new());
        }
        shown
    }

    /// What is to be seen of new text, and the calls that it completed. A choice that has ended by itself after a call
    /// ended for that call.
    fn without_calls(&mut self, shown: String) -> (String, Vec<v1::ToolCall>) {
        let Some(tools) = &mut self.tools else { return (shown, Vec::new()) };
        let mut parsed = tools.push(&shown);
        if let Some(end) = &mut self.end {
            let rest = tools.flush();
            parsed.text.push_str(&rest.text);
            parsed.calls.extend(rest.calls);
            if tools.has_called() && end.finish_reason() == FinishReason::Stop {
                end.set_finish_reason(FinishReason::ToolCalls);
            }
        }
        (parsed.text, parsed.calls)
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

/// Why a choice ended, in OpenAI's words.
pub fn finish_reason(end: &v1::ChoiceEnd) -> &'static str {
    match end.finish_reason() {
        FinishReason::Length => "length",
        FinishReason::ToolCalls => "tool_calls",
        FinishReason::Cancelled => "cancelled",
        FinishReason::Stop | FinishReason::Unspecified => "stop",
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
