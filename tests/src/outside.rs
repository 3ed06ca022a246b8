//! Every parser of outside bytes, each as a function of bytes: for `cargo fuzz` (`fuzz/`) and for the replay of its corpus.
//!
//! A function may not panic, hang, or allocate much more than it was given; where what was read can be written again, it must
//! be the same.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use constraint::Vocabulary;
use engine::model::ModelConfig;
use engine::model::weights::{WeightSource, Weights};
use kv_transport::ticket::Ticket;
use kv_transport::wire::{CellDescriptor, HEADER_BYTES, Header, Hello, HelloAck};
use prost::Message;
use proto::v1;
use router::text::model::TextModel;
use router::text::template::ChatTemplate;
use router::text::tools::{ToolFormat, ToolParser};

use crate::model;

/// A parser, fed with bytes.
pub type Target = fn(&[u8]);

/// All of them, by the name of their fuzz target.
pub const TARGETS: [(&str, Target); 13] = [
    ("kv_frames", kv_frames),
    ("ticket", ticket),
    ("worker_request", worker_request),
    ("generate_request", generate_request),
    ("http_body", http_body),
    ("template", template),
    ("tool_calls", tool_calls),
    ("grammar", grammar),
    ("gguf", gguf),
    ("safetensors", safetensors),
    ("config", config),
    ("tokenizer", tokenizer),
    ("trace", trace),
];

/// What a sender means to send has the right checksum; without it no fuzzer comes past the first check.
fn summed(data: &[u8]) -> Vec<u8> {
    [data, &crc32c::crc32c(data).to_le_bytes()].concat()
}

/// Frames of the KV plane, from either side.
pub fn kv_frames(data: &[u8]) {
    let framed = data.get(..HEADER_BYTES - 4).map(summed).unwrap_or_default();
    if let Some(header) = framed.first_chunk::<HEADER_BYTES>().and_then(Header::parse) {
        let mut again = Vec::new();
        header.put(&mut again);
        assert_eq!(Header::parse(again.first_chunk().unwrap()), Some(header));
        let _ = header.is_bounded();
    }
    if let Some((_, Some(hello))) = Hello::parse(data) {
        let _ = hello.encode();
    }
    if let Some(ack) = HelloAck::parse(data) {
        let _ = ack.encode();
    }
    let mut again = Vec::new();
    CellDescriptor::parse_all(data).for_each(|cell| cell.put(&mut again));
    assert!(data.starts_with(&again));
}

/// Tickets, which routers pass on unread.
pub fn ticket(data: &[u8]) {
    if let Ok(ticket) = Ticket::decode(&summed(data)) {
        let again = Ticket::decode(&ticket.encode().unwrap()).unwrap();
        assert_eq!((again.transfer, again.slots), (ticket.transfer, ticket.slots));
    }
}

/// What a worker is asked, and what rides in tickets and commits.
pub fn worker_request(data: &[u8]) {
    let _ = (v1::TicketMeta::decode(data), v1::Commit::decode(data), v1::MoveRequest::decode(data));
    let Ok(call) = v1::DecodeRequest::decode(data) else { return };
    SMALL.with_borrow(|small| {
        let read = worker::Request::from_wire(call.sequence, &small.limits.compat_hash, 0, &small.limits);
        if let Ok(request) = read {
            let _ = (request.reusable(16), request.stem_draws().len(), request.banned(3));
        }
    });
}

/// gRPC requests of clients, checked, tokenized and constrained.
pub fn generate_request(data: &[u8]) {
    if let Ok(call) = v1::GenerateRequest::decode(data) {
        SMALL.with_borrow(|small| drop(router::request::read(call, &small.text)));
    }
}

/// JSON bodies of OpenAI's clients, the same way on.
pub fn http_body(data: &[u8]) {
    for call in router::read_bodies(data) {
        SMALL.with_borrow(|small| drop(router::request::read(call, &small.text)));
    }
}

/// A model's chat template over a conversation; the first line is the message.
pub fn template(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (said, source) = text.split_once('\n').unwrap_or(("", text));
    let Ok(template) = ChatTemplate::new(source.to_owned(), None, vec![("bos_token", "<s>".into())]) else {
        return;
    };
    let message = |role: &str, content: &str| v1::ChatMessage {
        role: role.into(),
        content: content.into(),
        ..v1::ChatMessage::default()
    };
    let chat = v1::ChatMessages {
        messages: vec![message("system", "Be brief."), message("user", said)],
        ..Default::default()
    };
    let _ = template.render(&chat);
}

/// What a model says, cut into pieces anywhere: the calls found must not depend on where.
pub fn tool_calls(data: &[u8]) {
    let Some((&choice, data)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(data) else { return };
    let formats = [ToolFormat::Hermes, ToolFormat::Llama, ToolFormat::Mistral];
    let format = formats[choice as usize % formats.len()];
    let tools = [v1::Tool { name: "look".into(), ..v1::Tool::default() }];
    let read = |pieces: &mut dyn Iterator<Item = &str>| {
        let mut parser = ToolParser::new(format, &tools);
        let (mut shown, mut calls) = (String::new(), Vec::new());
        let mut take = |text: String, found: Vec<v1::ToolCall>| {
            shown.push_str(&text);
            calls.extend(found.into_iter().map(|call| (call.name, call.arguments)));
        };
        for piece in pieces {
            let parsed = parser.push(piece);
            take(parsed.text, parsed.calls);
        }
        let rest = parser.flush();
        take(rest.text, rest.calls);
        (shown, calls)
    };
    let whole = read(&mut std::iter::once(text));
    let step = 1 + choice as usize / 16;
    let ends: Vec<usize> = text.char_indices().map(|(at, _)| at).step_by(step).chain([text.len()]).collect();
    let pieces = read(&mut ends.windows(2).map(|pair| &text[pair[0]..pair[1]]));
    assert_eq!(whole, pieces);
}

/// Grammars, schemas and expressions that an answer must follow; the first byte says which.
pub fn grammar(data: &[u8]) {
    let Some((&kind, data)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(data) else { return };
    let lark = match kind % 3 {
        0 => text.to_owned(),
        1 => constraint::lark::regex(text),
        _ => match constraint::lark::json_schema(text) {
            Ok(lark) => lark,
            Err(_) => return,
        },
    };
    SMALL.with_borrow(|small| {
        if let Ok(constraint) = small.limits.vocabulary.compile(&lark) {
            let _ = constraint.restrict(0, &[], &mut vec![0.0; model::VOCAB]);
        }
    });
}

/// A GGUF file, imported.
pub fn gguf(data: &[u8]) {
    let scratch = Scratch::new();
    let _ =
        engine::import::import_gguf(&scratch.file("model.gguf", data), &scratch.path("out"), &mut |_, _| {});
    let _ = std::fs::remove_dir_all(scratch.path("out"));
}

/// A weights file, and tensors taken from it.
pub fn safetensors(data: &[u8]) {
    let scratch = Scratch::new();
    scratch.file("model.safetensors", data);
    let Ok(weights) = Weights::open(&scratch.0) else { return };
    for (rows, columns) in [(2, 3), (64, 64), (0, 0)] {
        if let Ok(matrix) = weights.matrix("a", rows, columns) {
            assert_eq!(matrix.numbers().len(), rows * columns);
        }
        let _ = weights.vector("a", columns);
    }
}

/// config.json.
pub fn config(data: &[u8]) {
    let scratch = Scratch::new();
    scratch.file("config.json", data);
    if let Ok(config) = ModelConfig::load(&scratch.0) {
        let _ = (config.parameters(), config.group(), config.rope.frequencies(config.head_dim.min(1 << 12)));
    }
}

/// tokenizer.json; the rest of the folder is as it should be.
pub fn tokenizer(data: &[u8]) {
    let scratch = Scratch::of_model();
    scratch.file("tokenizer.json", data);
    if let Ok(text) = TextModel::load(&scratch.0, "fuzz") {
        let ids = text.encode_text("The lamp burned, 12 times.").unwrap_or_default();
        let _ = (text.decode(&ids, true), text.vocabulary.token(3));
    }
}

/// Traces of requests, Mooncake's and Azure's.
pub fn trace(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(requests) = planner::trace::parse(text) {
        assert!(requests.windows(2).all(|pair| pair[0].at <= pair[1].at));
    }
}

/// A tiny model's text side and a worker's limits with it.
struct Small {
    text: TextModel,
    limits: worker::request::Limits,
    _dir: tempfile::TempDir,
    _runtime: tokio::runtime::Runtime,
}

thread_local! {
    static SMALL: RefCell<Small> = RefCell::new(Small::new());
}

impl Small {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        model::write(dir.path(), 1);
        let text = TextModel::load(dir.path(), "tiny").unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        // Grammars of worker requests compile on it; it stays entered.
        std::mem::forget(runtime.handle().clone().enter());
        let limits = worker::request::Limits {
            vocab_size: model::VOCAB,
            max_context_tokens: model::CONTEXT,
            layout: engine::KvLayout {
                layers: 4,
                blocks: 512,
                kv_heads: 2,
                block_tokens: 16,
                head_dim: 16,
                dtype: engine::KvDtype::Bf16,
            },
            compat_hash: "fuzz".into(),
            incarnation: 1,
            vocabulary: Vocabulary::of(dir.path(), model::VOCAB, &[model::EOS]),
        };
        Self { text, limits, _dir: dir, _runtime: runtime }
    }
}

thread_local! {
    static SCRATCH: RefCell<Option<PathBuf>> = const { RefCell::new(None) };
}

/// A folder in memory, one for each thread: files in it are written over, not made anew.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        let made = SCRATCH.with_borrow_mut(|dir| dir.get_or_insert_with(|| Self::made("plain")).clone());
        Self(made)
    }

    fn made(kind: &str) -> PathBuf {
        let root =
            if Path::new("/dev/shm").exists() { PathBuf::from("/dev/shm") } else { std::env::temp_dir() };
        let id = format!("{:?}", std::thread::current().id()).replace(['(', ')'], "-");
        let dir = root.join(format!("tandem-outside-{kind}-{}-{id}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    fn of_model() -> Self {
        thread_local! {
            static MODEL: PathBuf = {
                let dir = Scratch::made("model");
                model::write(&dir, 1);
                dir
            };
        }
        Self(MODEL.with(Clone::clone))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn file(&self, name: &str, data: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, data).unwrap();
        path
    }
}
