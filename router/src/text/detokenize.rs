//! Tokens to text, as they come: never half a character, and in time proportional to the new text.

/// Decodes a growing list of tokens.
///
/// Some tokens end in the middle of a character, and some tokenizers write a token differently at the
/// start of a text. So each step decodes a short window that begins at the last cut, and gives out only
/// what stands after the text of the window's known part.
#[derive(Debug, Default)]
pub struct Detokenizer {
    window: Vec<u32>,
    known: usize,
}

/// What decoding an unfinished character gives.
const UNFINISHED: char = '\u{FFFD}';

impl Detokenizer {
    /// Adds a token; returns the new text, empty while a character is unfinished.
    pub fn push(&mut self, token: u32, decode: impl Fn(&[u32]) -> String) -> String {
        self.window.push(token);
        let text = decode(&self.window);
        if text.ends_with(UNFINISHED) {
            return String::new();
        }
        self.cut(text, decode)
    }

    /// The end: whatever is left, even if unfinished.
    pub fn flush(&mut self, decode: impl Fn(&[u32]) -> String) -> String {
        let text = decode(&self.window);
        self.cut(text, decode)
    }

    fn cut(&mut self, text: String, decode: impl Fn(&[u32]) -> String) -> String {
        let before = decode(&self.window[..self.known]);
        let new = text.get(before.len()..).unwrap_or_default().to_owned();
        if !new.is_empty() {
            self.window.drain(..self.known);
            self.known = self.window.len();
        }
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// One token per byte.
    fn bytes(ids: &[u32]) -> String {
        let raw: Vec<u8> = ids.iter().map(|i| *i as u8).collect();
        String::from_utf8_lossy(&raw).into_owned()
    }

    proptest! {
        #[test]
        fn whole_characters_only_and_nothing_lost(text in "[a-zé東😀 \n]{0,40}") {
            let mut detokenizer = Detokenizer::default();
            let mut out = String::new();
            for byte in text.bytes() {
                let piece = detokenizer.push(byte as u32, bytes);
                prop_assert!(!piece.contains(UNFINISHED));
                out.push_str(&piece);
            }
            out.push_str(&detokenizer.flush(bytes));
            prop_assert_eq!(out, text);
        }
    }

    #[test]
    fn an_unfinished_end_is_shown() {
        let mut detokenizer = Detokenizer::default();
        assert_eq!(detokenizer.push(b'a' as u32, bytes), "a");
        assert_eq!(detokenizer.push(0xF0, bytes), "");
        assert_eq!(detokenizer.flush(bytes), "\u{FFFD}");
    }
}
