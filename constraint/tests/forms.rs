//! Grammars followed over a small vocabulary: only what they allow can be drawn, whoever asks and in whatever order.

#![allow(clippy::unwrap_used)]

use constraint::{Constraint, ConstraintError, Vocabulary, lark};
use proptest::prelude::*;
use serde_json::json;

const END: u32 = 0;
const VOCABULARY: usize = 140;

/// One token per printable ASCII character, some longer ones, padding without text up to [`VOCABULARY`].
fn vocabulary() -> (tempfile::TempDir, Vocabulary, Vec<String>) {
    let mut words = vec!["<|end|>".to_owned()];
    words.extend((b' '..=b'~').map(|byte| char::from(byte).to_string()));
    words.extend(["\": ", "true", "false", "{\"", "12", "yes", "no"].map(str::to_owned));
    // Byte-level BPE writes a space as Ġ.
    let vocab: serde_json::Map<_, _> =
        words.iter().enumerate().skip(1).map(|(id, word)| (word.replace(' ', "Ġ"), json!(id))).collect();
    let tokenizer = json!({
        "added_tokens": [{"id": 0, "content": "<|end|>", "special": true}],
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let vocabulary = Vocabulary::of(dir.path(), VOCABULARY, &[END]);
    (dir, vocabulary, words)
}

/// The tokens that may follow.
fn allowed(constraint: &Constraint, choice: u32, output: &[u32]) -> Vec<u32> {
    let mut logits = vec![0.0; VOCABULARY + 3];
    constraint.restrict(choice, output, &mut logits).unwrap();
    (0_u32..).zip(&logits).filter(|(_, logit)| **logit == 0.0).map(|(token, _)| token).collect()
}

/// Draws by `picks` until the end, or until they run out.
fn walk(constraint: &Constraint, choice: u32, picks: &[prop::sample::Index]) -> (Vec<u32>, bool) {
    let mut output = Vec::new();
    for pick in picks {
        let tokens = allowed(constraint, choice, &output);
        let token = tokens[pick.index(tokens.len())];
        if token == END {
            return (output, true);
        }
        output.push(token);
    }
    (output, false)
}

#[test]
fn a_choice_is_one_of_its_texts() {
    let (_dir, vocabulary, words) = vocabulary();
    let constraint = vocabulary.compile(&lark::choice(&["yes".into(), "no \"way\"".into()])).unwrap();
    let first: Vec<&str> = allowed(&constraint, 0, &[]).iter().map(|t| words[*t as usize].as_str()).collect();
    assert_eq!(first, ["n", "y", "yes", "no"]);
    let yes = words.iter().position(|word| word == "yes").unwrap() as u32;
    assert_eq!(allowed(&constraint, 0, &[yes]), [END]);
    // Another output of the same choice begins again.
    assert_eq!(allowed(&constraint, 0, &[]).len(), 4);
}

#[test]
fn wrong_grammars_are_refused_with_their_reason() {
    let (_dir, vocabulary, _) = vocabulary();
    for bad in ["start: undefined_rule", "start: /(/", &"x".repeat(constraint::MAX_GRAMMAR_BYTES + 1)] {
        let refused = vocabulary.compile(bad).unwrap_err();
        assert!(matches!(&refused, ConstraintError::Grammar(why) if !why.is_empty()), "{refused:?}");
    }
    let schema = lark::json_schema(r#"{"type": "nonsense"}"#).unwrap();
    assert!(matches!(vocabulary.compile(&schema), Err(ConstraintError::Grammar(_))));
    assert!(lark::json_schema("{").is_err() && lark::json_schema("[]").is_err());
    let missing = Vocabulary::of(std::path::Path::new("/nonexistent"), 10, &[0]);
    assert!(matches!(missing.compile("start: \"a\""), Err(ConstraintError::Vocabulary(_))));
}

#[test]
fn an_output_that_left_the_grammar_is_an_error() {
    let (_dir, vocabulary, words) = vocabulary();
    let constraint = vocabulary.compile(&lark::regex("[0-9]{2}")).unwrap();
    let x = words.iter().position(|word| word == "x").unwrap() as u32;
    let mut logits = vec![0.0; VOCABULARY];
    assert!(matches!(constraint.restrict(0, &[x], &mut logits), Err(ConstraintError::Lost(_))));
}

#[test]
fn tokens_have_their_bytes() {
    let (_dir, vocabulary, _) = vocabulary();
    assert_eq!(vocabulary.token(END).unwrap(), b"<|end|>");
    assert_eq!(vocabulary.token(1).unwrap(), b" ");
    assert!(vocabulary.token(u32::MAX).unwrap().is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// What is drawn under a schema parses and has its form; another worker that takes over in the middle, or another
    /// choice, has the same answers.
    #[test]
    fn json_has_the_form_of_its_schema(picks in prop::collection::vec(any::<prop::sample::Index>(), 200)) {
        let (_dir, vocabulary, words) = vocabulary();
        let schema = json!({
            "$defs": {"flag": {"type": "boolean"}},
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/flag"}, "b": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["a", "b"],
            "additionalProperties": false,
        });
        let grammar = lark::json_schema(&schema.to_string()).unwrap();
        let constraint = vocabulary.compile(&grammar).unwrap();
        let (output, ended) = walk(&constraint, 0, &picks);
        let elsewhere = vocabulary.compile(&grammar).unwrap();
        for len in [0, output.len() / 2, output.len()] {
            prop_assert_eq!(allowed(&constraint, 0, &output[..len]), allowed(&elsewhere, 7, &output[..len]));
        }
        if ended {
            let text: String = output.iter().map(|token| words[*token as usize].as_str()).collect();
            let value: serde_json::Value = serde_json::from_str(&text).unwrap();
            prop_assert!(value["a"].is_boolean(), "{text}");
            prop_assert!(value["b"].as_u64().is_some_and(|b| b <= 99), "{text}");
            prop_assert_eq!(value.as_object().unwrap().len(), 2);
        }
    }
}
