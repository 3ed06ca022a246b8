//! `tandem generate`: prompts in, answers streamed to the terminal or as JSON lines.

use std::io::Write;
use std::time::Duration;

use anyhow::{Context, anyhow};
use futures::{StreamExt, stream};
use proto::v1::{self, generate_response::Event, inference_client::InferenceClient};

use crate::args::{DialArgs, GenerateArgs, SamplingArgs};
use crate::dial;
use crate::exit::{self, Interrupted};
use crate::local::{LocalCluster, LocalSpec, log_level};
use crate::prompts::{self, Prompt};
use crate::report::{self, ChoiceOutcome, Outcome};
use crate::signal;

/// How often a request is sent that never left, because its router was stopping.
const OPEN_TRIES: u32 = 3;

/// Runs the command; a temporary cluster is drained whatever happens.
pub async fn run(args: GenerateArgs) -> anyhow::Result<()> {
    let interrupted = async {
        signal::wait().await;
        Err(anyhow!(Interrupted))
    };
    let Some(address) = &args.addr else {
        let cluster = tokio::select! {
            started = LocalCluster::start(spec(&args)) => started?,
            ended = interrupted => return ended,
        };
        let address = cluster.address.to_string();
        let done = tokio::select! {
            done = ask(&args, &address) => done,
            () = signal::wait() => Err(anyhow!(Interrupted)),
        };
        return cluster.stop().await.and(done);
    };
    tokio::select! {
        done = ask(&args, address) => done,
        ended = interrupted => ended,
    }
}

fn spec(args: &GenerateArgs) -> LocalSpec<'_> {
    LocalSpec {
        prefill: args.prefill,
        decode: args.decode,
        listen: ([127, 0, 0, 1], 0).into(),
        model: &args.model,
        engine: &args.engine,
        transport: &args.transport,
        placement: &args.placement,
        trace: crate::trace::TraceArgs::default(),
        log: log_level(),
    }
}

async fn ask(args: &GenerateArgs, address: &str) -> anyhow::Result<()> {
    // A temporary cluster is on loopback and not encrypted, whatever the environment says of others.
    let dial = if args.addr.is_some() { args.dial.clone() } else { DialArgs::default() };
    let mut client = InferenceClient::new(dial::router(address, &dial).await?)
        .max_decoding_message_size(proto::MAX_MESSAGE_BYTES);
    let info = client.get_model_info(v1::GetModelInfoRequest {}).await?.into_inner();
    let prompts = prompts::read(args, info.has_chat_template)?;
    if !args.json && prompts.len() == 1 {
        let outcome = one(client, args, &prompts[0], true).await?;
        if !args.quiet {
            eprint!("\n{}", report::timeline_text(&outcome.complete));
        }
        return Ok(());
    }
    many(client, args, prompts).await
}

/// Every prompt, several at once, in the file's order; one that fails does not end the others.
async fn many(
    client: InferenceClient<dial::Channel>,
    args: &GenerateArgs,
    prompts: Vec<Prompt>,
) -> anyhow::Result<()> {
    let total = prompts.len();
    let mut failed = None;
    let mut outcomes = stream::iter(&prompts)
        .map(|prompt| {
            let client = client.clone();
            async move { (prompt, one(client, args, prompt, false).await) }
        })
        .buffered(args.concurrency.max(1));
    while let Some((prompt, outcome)) = outcomes.next().await {
        let line = match (&outcome, args.json) {
            (Ok(outcome), true) => outcome.to_json().to_string(),
            (Ok(outcome), false) => format!("[{}] {}", prompt.id, outcome.choices[0].text),
            (Err(error), true) => {
                serde_json::json!({"id": prompt.id, "error": exit::describe(error)}).to_string()
            }
            (Err(error), false) => format!("[{}] error: {}", prompt.id, exit::describe(error)),
        };
        println!("{line}");
        if let Err(error) = outcome {
            failed = Some(error);
        }
    }
    match failed {
        None => Ok(()),
        Some(error) if total == 1 => Err(error),
        Some(error) => Err(error.context("some prompts failed; the last error")),
    }
}

/// One prompt; with `show`, its first choice goes to the terminal as it comes.
async fn one(
    mut client: InferenceClient<dial::Channel>,
    args: &GenerateArgs,
    prompt: &Prompt,
    show: bool,
) -> anyhow::Result<Outcome> {
    let n = args.sampling.n.unwrap_or(1) as usize;
    let mut tries = 0;
    let mut events = loop {
        tries += 1;
        match client.generate(request(args, prompt)?).await {
            Ok(events) => break events.into_inner(),
            Err(status) if tries < OPEN_TRIES && dial::never_left(&status) => {}
            Err(status) => return Err(dial::named(status).into()),
        }
    };
    let mut outcome =
        Outcome { id: prompt.id.clone(), choices: vec![ChoiceOutcome::default(); n], ..Outcome::default() };
    let mut terminal = Terminal { show, labelled: n > 1 };
    while let Some(response) = events.message().await.map_err(dial::named)? {
        match response.event {
            Some(Event::Chunk(chunk)) => {
                terminal.chunk(&chunk)?;
                if let Some(choice) = outcome.choices.get_mut(chunk.index as usize) {
                    choice.text.push_str(&chunk.text);
                    choice.token_ids.extend(chunk.token_ids);
                    choice.logprobs.extend(chunk.logprobs);
                }
            }
            Some(Event::Complete(complete)) => {
                outcome.complete = complete;
                terminal.end(&outcome)?;
                return Ok(outcome);
            }
            None => {}
        }
    }
    Err(anyhow!("the stream ended without its last message"))
}

fn request(args: &GenerateArgs, prompt: &Prompt) -> anyhow::Result<tonic::Request<v1::GenerateRequest>> {
    let request = v1::GenerateRequest {
        input: Some(prompt.input.clone()),
        sampling: Some(sampling(&args.sampling)),
        request_id: prompt.request_id.clone(),
        ..v1::GenerateRequest::default()
    };
    let mut request = tonic::Request::new(request);
    if let Some(seconds) = args.timeout {
        let limit =
            Duration::try_from_secs_f64(seconds).context("--timeout: a positive number of seconds")?;
        request.set_timeout(limit);
    }
    Ok(request)
}

/// The live view of one prompt.
struct Terminal {
    show: bool,
    /// Several choices cannot be shown while they grow; they are printed at the end.
    labelled: bool,
}

impl Terminal {
    fn chunk(&mut self, chunk: &v1::Chunk) -> anyhow::Result<()> {
        if self.show && !self.labelled {
            let mut out = std::io::stdout().lock();
            out.write_all(chunk.text.as_bytes())?;
            out.flush()?;
        }
        Ok(())
    }

    fn end(&mut self, outcome: &Outcome) -> anyhow::Result<()> {
        if !self.show {
            return Ok(());
        }
        let mut out = std::io::stdout().lock();
        if self.labelled {
            for (number, choice) in outcome.choices.iter().enumerate() {
                writeln!(out, "[{number}] {}", choice.text)?;
            }
        } else {
            writeln!(out)?;
        }
        Ok(())
    }
}

fn sampling(args: &SamplingArgs) -> v1::SamplingParams {
    v1::SamplingParams {
        temperature: Some(args.temperature),
        top_p: args.top_p,
        top_k: args.top_k,
        min_p: args.min_p,
        repetition_penalty: args.repetition_penalty,
        seed: args.seed,
        max_tokens: args.max_tokens,
        stop: args.stop.clone(),
        ignore_eos: args.ignore_eos.then_some(true),
        logprobs: args.logprobs,
        n: args.n,
        ..v1::SamplingParams::default()
    }
}
